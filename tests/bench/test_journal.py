"""A run that is killed goes on to the same report; a journal that is another run's is refused in one line."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from fastdiff.bench import schema
from fastdiff.bench.__main__ import main
from fastdiff.bench.journal import RUNS, CannotResume, Journal, append_line, commit, read_lines, stamp, unfinished

ROOT = Path(__file__).parents[2]
SUITE = """
threads = 1
row_max_s = 0
canary_max_s = 0

[[setup]]
samplers = ["Euler", "DDIM"]
steps = 4

[[count]]
mixes = [["Euler"], ["PNDM"]]
batches = [1]
steps = 4
latent_shape = [4, 8, 8]

[[fate]]
samplers = ["Euler", "PNDM"]
arms = ["shared-racing", "tensorized"]
steps = 3
unequal = 4

[[error]]
samplers = ["Euler", "UniPCMultistep"]
latent_shape = [4, 8, 8]
steps = 5
seeds = 1

[[row]]
name = "Euler"
samplers = ["Euler"]
latent_shape = [4, 8, 8]
steps = 4
modes = ["eager"]
"""
TITLES = [
    "deterministic figures", "set-up: Euler", "set-up: DDIM", "operations and syncs", "interleaved requests: Euler",
    "interleaved requests: PNDM", "error against float64", "rows: Euler", "canaries",
]  # fmt: skip
HEADER = {
    "suite": "ci 0", "only": "", "seed": 0, "model": "", "machine": "m", "commit": "c", "created": "", "command": []
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite, in which a run was killed."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "small.toml").write_text(SUITE)
    return folder


def arguments(tiny_folder: Path) -> list[str]:
    return ["run", "--suite", "small.toml", "--model", str(tiny_folder), "--json"]


@pytest.fixture(scope="module")
def killed(place: Path, tiny_folder: Path) -> Path:
    """The folder of a run that was killed once it had finished a few pieces, its last line half written."""
    with (place / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastdiff.bench", *arguments(tiny_folder)],
            cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while len(pieces_of(place)) < 3:
                assert process.poll() is None, (place / "log.txt").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    (folder,) = (place / "reports" / "runs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["journal.jsonl"]
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('{"section": "counts", "title": "oper')
    return folder


def pieces_of(place: Path) -> list[dict[str, Any]]:
    """What the journal has finished so far; its first line says what the run is, a half line nothing."""
    lines = [line for path in place.glob("reports/runs/*/journal.jsonl") for line in path.read_text().splitlines(True)]
    return [json.loads(line) for line in lines[1:] if line.endswith("\n")]


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.mark.usefixtures("there")
def test_a_killed_run_resumes_to_the_same_report(
    killed: Path, place: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = pieces_of(place)
    for flags, reason in (
        (("--seed", "1"), "its seed is 0, this run's is 1"),
        (("--steps", "3"), "its suite is 'small.toml "),
        (("-k", "Euler"), "its only is '', this run's is 'Euler'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments(tiny_folder), *flags, "--resume", str(killed)])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
    assert main([*arguments(tiny_folder), "--resume"]) == 0
    resumed = json.loads(capsys.readouterr().out)["fastdiff"]
    after = pieces_of(place)
    assert after[: len(before)] == before  # nothing that was finished is measured again
    assert [one["title"] for one in after] == TITLES
    assert resumed == schema.load(killed)
    assert (resumed["resumed"], resumed["complete"]) == (len(before), True)
    assert list(resumed["seconds"]["pieces"]) == TITLES

    # What no clock measures is what a run in one go reports, and its times are of the same cases.
    assert main(arguments(tiny_folder)) == 0
    whole = json.loads(capsys.readouterr().out)["fastdiff"]
    assert whole["resumed"] == 0
    timed = {"setup", "rows", "canaries", "summary", "seconds", "created", "command", "machine", "resumed", "compile_s"}
    assert whole.keys() == resumed.keys()
    for part in whole.keys() - timed:
        assert whole[part] == resumed[part], part
    names = [[one["fullname"] for one in schema.benchmarks(report)] for report in (whole, resumed)]
    assert names[0] == names[1]


def test_a_commit_is_named() -> None:
    known = commit()
    assert known.keys() == {"id", "time", "author_time", "dirty", "project", "branch"}
    assert len(known["id"]) == 40


def test_a_journal_holds_what_was_added_and_drops_a_half_line(tmp_path: Path) -> None:
    journal = Journal.start(tmp_path, HEADER)
    journal.add({"title": "a"})
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"title": "b')
    again = Journal.resume(tmp_path, HEADER)
    assert again.finished == [{"title": "a"}]
    again.add({"title": "c"})
    assert path.read_bytes() == whole + b'{"title": "c"}\n'
    assert Journal.resume(tmp_path, HEADER).finished == [{"title": "a"}, {"title": "c"}]
    with pytest.raises(FileExistsError):
        Journal.start(tmp_path, HEADER)


@pytest.mark.parametrize("name", ["suite", "only", "seed", "model", "machine", "commit"])
def test_another_runs_journal_is_refused(tmp_path: Path, name: str) -> None:
    Journal.start(tmp_path, HEADER)
    with pytest.raises(CannotResume, match=f"its {name} is .*, this run's is 'another'; start a new run"):
        Journal.resume(tmp_path, {**HEADER, name: "another"})


@pytest.mark.parametrize("content", [b"", b"[]\n", b"{}\n", b"\xff\n", b'{"suite": 1}\nnothing\n'])
def test_what_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(CannotResume, match="expected a run's journal, got something else"):
        Journal.resume(tmp_path, HEADER)


def test_a_folder_without_a_journal_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, reason in (([], "no run has been started here"), (["nowhere"], "expected a run's folder")):
        with pytest.raises(SystemExit) as stopped:
            main(["--quick", "--resume", *given])
        assert stopped.value.code == 2
        assert reason in capsys.readouterr().err


def test_the_newest_run_without_a_report_is_the_one_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CannotResume, match="no run has been started here that has not finished; start a new run"):
        unfinished()
    for name in ("20251231-235959", "20260101-000000", "20260102-000000", "gpu", "zz-20260103-000000"):
        Journal.start(RUNS / name, HEADER)
    (RUNS / "20260104-000000").mkdir()  # which has no journal
    assert unfinished() == RUNS / "20260102-000000"
    (RUNS / "20260102-000000" / "report.json").touch()
    assert unfinished() == RUNS / "20260101-000000"
    for name in ("20251231-235959", "20260101-000000"):
        (RUNS / name / "report.json").touch()
    with pytest.raises(CannotResume, match="no run has been started here that has not finished"):
        unfinished()


def test_two_processes_that_append_to_one_journal_lose_no_line(tmp_path: Path) -> None:
    path, count = tmp_path / "journal.jsonl", 500
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fastdiff.bench.journal import append_line\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        f"for number in range({count}):\n"
        f"    append_line(Path({str(path)!r}), {{'who': sys.argv[1], 'number': number, 'text': 'x' * 2000}})\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, who], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for who in "ab"
    ]  # fmt: skip
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=120)
    assert [process.returncode for process in both] == [0, 0]
    lines = read_lines(path)
    for who in "ab":
        assert [line["number"] for line in lines if line["who"] == who] == list(range(count))


def test_a_line_that_another_process_is_writing_is_not_taken_for_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    other = Thread(target=append_line, args=(path, {"title": "b"}))
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b'{"title": ')
        other.start()
        other.join(0.2)
        file.write(b'"a"}\n')
    other.join(60)
    assert read_lines(path) == [{"title": "a"}, {"title": "b"}]


def test_a_report_is_stamped_with_its_command_and_when_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastdiff/bench/__main__.py", "ab", "--base", "main"])
    stamped = stamp()
    assert stamped["command"] == ["python", "-m", "fastdiff.bench", "ab", "--base", "main"]
    assert datetime.fromisoformat(stamped["created"]).utcoffset() == timedelta(0)
