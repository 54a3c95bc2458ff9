"""What cannot be run is refused in one line, with exit code 2."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.bench.__main__ import _parser, main
from tests.bench.reports import COMMITTED

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
README_COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python -m fastdiff.bench")
]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error that says why."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if "error:" in line]
    return line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--batch", "0"), "expected an integer >= 1, got '0'"),
        (("--steps", "-3"), "expected an integer >= 1"),
        (("--seed", "x"), "invalid int value: 'x'"),
        (("--model", "nowhere"), "expected a folder with a model_index.json, got 'nowhere'"),
        (("--device", "tpu"), "expected cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "torch finds no such CUDA device as 'cuda:99'"),
        (("--save", "../out"), "expected a plain folder name"),
        (("--scheduler", "Foo"), "expected one of "),
        (("--suite", "full"), "expected a suite's file or one of "),
        (("--suite", "pyproject.toml"), "--suite: "),
        (("--quick", "--suite", "ci"), "not allowed with argument"),
        (("--quick", "-k", "nothing like it"), "no piece of smoke has 'nothing like it' in its title"),
        (("compare", "nowhere.json", "nowhere.json"), "nowhere.json: No such file"),
        (("compare",), "the following arguments are required: BASE, HEAD"),
        (("--model", "{folder}", "--update-baseline"), "a baseline is of the shipped model's figures"),
        (("--quick", "-k", "images", "--update-baseline"), "leaves out the piece 'deterministic figures'"),
        (("measure",), "invalid choice: 'measure'"),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert expected in refused(capsys, *(one.format(folder=tmp_path) for one in arguments))


def test_list_and_dry_run_say_what_would_run_and_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--quick", "--list"]) == 0
    titles = capsys.readouterr().out.splitlines()
    assert len(titles) == 13
    assert "images: mixed" in titles
    assert main(["--quick", "--list", "-k", "images"]) == 0
    assert capsys.readouterr().out.splitlines() == ["images: sequential", "images: mixed", "canaries"]
    assert main(["--quick", "--dry-run", "-k", "mixed"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "     1 s  rows: mixed, hot",
        "    10 s  images: mixed",
        "     3 s  canaries",
        "3 pieces, at most 14 s of sampling in 3 of them. "
        "Warm-up, compilation and the pieces without a clock come on top; "
        "reports/ has no report of the same work that tells how long.",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", README_COMMANDS)
def test_the_commands_of_the_readme_are_ones(line: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    here = {"DIR": str(tmp_path), "cuda": "cuda" if torch.cuda.is_available() else "cpu"}
    given = [here.get(one, one) for one in shlex.split(line, comments=True)[3:]]
    if "--help" in given:
        with pytest.raises(SystemExit, match="0"):
            _parser().parse_args(given)
    else:
        options = _parser().parse_args(given if given and not given[0].startswith("-") else ["run", *given])
        assert callable(options.main)


def test_a_folder_that_holds_no_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    line = refused(capsys, "--model", str(tmp_path))
    assert f"{tmp_path} is not a saved diffusers pipeline" in line


@pytest.mark.parametrize(
    "arguments", [("--quick",), ("doctor",), ("memory",), ("profile",), ("report", str(COMMITTED[0]))]
)
def test_without_the_extra_a_command_that_draws_says_what_to_install(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "rich is missing: pip install 'fastdiff-runtime[bench]'" in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []  # and has measured nothing


@pytest.mark.parametrize("arguments", [("--quick", "--list"), ("gpu", "--tiny", "--list", "--device", "cpu")])
def test_a_command_that_draws_nothing_needs_no_extra(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(arguments) == 0
    assert capsys.readouterr().out


def test_the_command_itself_exits_with_two_and_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fastdiff.bench", "--batch", "0"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.endswith("--batch: expected an integer >= 1, got '0'")
    assert not (tmp_path / "reports").exists()
