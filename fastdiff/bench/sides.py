"""Two revisions side by side: a worktree of each, and pairs of processes that answer questions, one on either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from select import select
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from fastdiff.bench.arguments import refuse

SIDES = ("base", "head")
ANSWER_S = 600.0  # a compiler may be at work meanwhile; who is silent for longer hangs
WORKER = Path(__file__).with_name("worker.py")


class Revision(NamedTuple):
    """One side of a comparison."""

    ref: str
    commit: str


class Work(NamedTuple):
    """A case in one mode, by the name that a worker knows it by; or a canary, which is everyone's."""

    name: str
    kind: Literal["row", "image", "canary"]
    max_s: float


class CannotMeasure(Exception):
    """What a worker could not do, and why."""


class Gone(CannotMeasure):
    """A worker that answers no more questions, and why."""


# Git


def git(*arguments: str) -> str:
    """What git prints; its own words and exit code 2 where it refuses."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        refuse(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def uncommitted(head: Revision) -> list[str]:
    """The files whose changes no commit has, where `head` is what is checked out."""
    if resolve("HEAD").commit != head.commit:
        return []
    return [line[3:] for line in git("status", "--porcelain", "--untracked-files=no").splitlines()]


def resolve(ref: str) -> Revision:
    """A ref and the commit that it names now."""
    asked = ["git", "rev-parse", "--quiet", "--verify", "--end-of-options", f"{ref}^{{commit}}"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if not commit:
        refuse(f"expected a branch, tag or commit of this repository, got {ref!r}")
    return Revision(ref, commit)


def check_dependencies(base: Revision, head: Revision) -> None:
    """Both sides run on the packages that are installed: refuse revisions that ask for different ones."""
    for name, read in (("pyproject.toml", _dependencies), ("constraints.txt", str)):
        wanted = [read(git("show", f"{revision.commit}:{name}")) for revision in (base, head)]
        if wanted[0] != wanted[1]:
            refuse(
                f"{name}: {base.ref} and {head.ref} want different packages, and both would run on the installed ones; "
                f"make an environment for each and compare two runs instead: python -m fastdiff.bench compare"
            )


def _dependencies(text: str) -> Any:
    project = tomllib.loads(text)["project"]
    return project.get("dependencies"), project.get("optional-dependencies", {}).get("bench")


@contextmanager
def worktrees(revisions: Mapping[str, Revision], folder: Path) -> Iterator[dict[str, Path]]:
    """A checkout of each, gone again afterwards, whatever happens meanwhile."""
    trees = {side: folder / side for side in revisions}
    try:
        for side, revision in revisions.items():
            git("worktree", "add", "--quiet", "--detach", str(trees[side]), revision.commit)
        yield trees
    finally:
        for tree in trees.values():
            if tree.exists():
                git("worktree", "remove", "--force", str(tree))


# Processes


class Bench(NamedTuple):
    """What a pair of processes is started from."""

    trees: Mapping[str, Path]
    folder: Path
    suite: Mapping[str, Any]
    device: str
    seed: int

    @contextmanager
    def pair(self, sides: Sequence[str] = SIDES) -> Iterator[dict[str, Process]]:
        """One process of each side, alive together."""
        with ExitStack() as stack:
            pair = {side: stack.enter_context(Process(self, side)) for side in sides}
            for process in pair.values():
                process.start()
            yield pair


class Process:
    """One side, in a process of its own that runs `worker.py` on that side's worktree."""

    def __init__(self, bench: Bench, side: str) -> None:
        self.side = side
        self._tree, self._log = bench.trees[side].resolve(), bench.folder / f"{side}.log"
        self._task = {"suite": bench.suite, "device": bench.device, "seed": bench.seed}
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(self._tree), os.environ.get("PYTHONPATH")))),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": str(bench.suite["threads"]),
            "TORCHINDUCTOR_CACHE_DIR": str(bench.folder / f"inductor-{side}"),  # warm from the second pair on
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],  # -P: not its folder, which has a profile.py
                cwd=self._tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )  # fmt: skip
        self.tell("start", self._task)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # it holds nothing that it would have to save
        self._process.communicate()

    def start(self) -> None:
        """Wait until it is ready."""
        imported = Path(self.answer())
        if not imported.is_relative_to(self._tree):
            raise CannotMeasure(f"{self.side}: expected fastdiff from {self._tree}, got {imported}")

    def tell(self, name: str, *arguments: Any) -> None:
        """Ask for something, and do not wait for it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def answer(self) -> Any:
        """What it says to the question. Gone if it ended, or says nothing for so long that it must hang."""
        assert self._process.stdout is not None
        if not select([self._process.stdout], [], [], ANSWER_S)[0]:
            self._process.kill()
            raise Gone(f"{self.side}: no answer within {ANSWER_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        answer = json.loads(line)
        if "error" in answer:
            raise CannotMeasure(f"{self.side}: {answer['error']}")
        return answer["value"]

    def ask(self, name: str, *arguments: Any) -> Any:
        """Ask, and wait for the answer."""
        self.tell(name, *arguments)
        return self.answer()

    def _death(self) -> Gone:
        last = (self._log.read_text(errors="replace").strip().splitlines() or ["it left no message"])[-1]
        return Gone(f"{self.side}: the process ended: {last}")


def ask_both(pair: Mapping[str, Process], name: str, arguments: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """One question to both at once: for what no clock measures."""
    for side, process in pair.items():
        process.tell(name, *arguments[side])
    answers: dict[str, Any] = {}
    failures: list[CannotMeasure] = []
    for side, process in pair.items():
        try:
            answers[side] = process.answer()
        except CannotMeasure as error:
            failures.append(error)
    if failures:
        kind = Gone if any(isinstance(failure, Gone) for failure in failures) else CannotMeasure
        raise kind("; ".join(map(str, failures)))
    return answers


def in_turn(
    bench: Bench,
    sides: Sequence[str],
    work: Sequence[Work],
    prepare: Callable[[Mapping[str, Process]], object],
    measure: Callable[[Mapping[str, Process], Work], object],
) -> dict[str, str]:
    """Have a pair of processes measure one case after the other; by name, what could not be measured and why.

    A case that fails does so alone: where a process of the pair is gone with it, another pair takes up the rest.
    """
    failed: dict[str, str] = {}
    waiting = list(work)
    while waiting:
        try:
            with bench.pair(sides) as pair:
                prepare(pair)
                failed |= _until_gone(pair, waiting, measure)
        except CannotMeasure as error:  # of the start, which is nobody's alone
            return failed | {one.name: str(error) for one in waiting}
    return failed


def _until_gone(
    pair: Mapping[str, Process], waiting: list[Work], measure: Callable[[Mapping[str, Process], Work], object]
) -> dict[str, str]:
    failed = {}
    while waiting:
        one = waiting.pop(0)
        try:
            measure(pair, one)
        except CannotMeasure as error:
            failed[one.name] = str(error)
            if isinstance(error, Gone):
                break
    return failed
