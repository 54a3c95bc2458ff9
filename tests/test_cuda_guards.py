"""No line that needs CUDA is reached without a guard: read off the sources, on any machine.

A guard is a condition around the line that speaks of CUDA, or an early end of the block on such a condition. A function
without one passes the need on to whoever calls it without one, by its bare name, those of a file before all others.
What nobody calls, or a module calls as it is imported, must not need CUDA. Every method of a class whose constructor
refuses other devices is guarded.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import fastdiff

PACKAGE = Path(fastdiff.__file__).parent
ANYWHERE = ("is_available", "device_count")  # torch.cuda's that any machine answers
WORDS = ("cuda", "graph")  # of a condition: StepGraphs refuses other devices, so whoever holds graphs is on CUDA
IN_PROCESSES = {"ready_once"}  # called in a process that a guarded function starts
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Unit:
    """A function, or what a module does on import: what it needs and calls without a guard, and calls at all."""

    where: str
    name: str  # of its class where Python calls it by itself
    needs: list[str] = field(default_factory=list)
    unguarded_calls: set[str] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)


class Reader:
    """Reads a module's units; `carriers` are attributes and variables that are only set, and not None, on CUDA."""

    def __init__(self, file: str, tree: ast.Module) -> None:
        self.file, self.units = file, list[Unit]()
        self.carriers = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and (uses(node.value) or _speaks(node.value, frozenset()))
            for target in node.targets
            if (name := _name(target)) and not isinstance(node.value, ast.Constant)
        }
        self.block(tree.body, self.unit("<module>"), False)

    def unit(self, name: str) -> Unit:
        self.units.append(Unit(self.file, name))
        return self.units[-1]

    def block(self, body: Sequence[ast.stmt], unit: Unit, guarded: bool, owner: str | None = None) -> None:
        for statement in body:
            self.node(statement, unit, guarded, owner)
            guarded |= self.ends_elsewhere(statement)

    def ends_elsewhere(self, statement: ast.stmt) -> bool:
        """Whether what comes after a statement is reached on CUDA alone."""
        match statement:
            case ast.If(test=test, body=[*_, ast.Return() | ast.Raise() | ast.Continue()]):
                return self.sides(test)[1]
            case ast.Assert(test=test):
                return self.sides(test)[0]
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="require_cuda"))):
                return True
        return False

    def node(self, node: ast.AST, unit: Unit, guarded: bool, owner: str | None = None) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                special = owner is not None and node.name.startswith("__")
                for default in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.decorator_list):
                    self.node(default, unit, guarded)
                self.block(node.body, self.unit(owner if special and owner else node.name), guarded)
            case ast.ClassDef():
                refuses = any(
                    isinstance(one, Function) and one.name == "__init__" and any(map(self.ends_elsewhere, one.body))
                    for one in node.body
                )
                self.block(node.body, unit, guarded or refuses, node.name)
            case ast.If() | ast.IfExp():
                self.node(node.test, unit, guarded)
                for branch, here in zip((node.body, node.orelse), self.sides(node.test), strict=True):
                    if isinstance(branch, list):
                        self.block(branch, unit, guarded or here)
                    else:
                        self.node(branch, unit, guarded or here)
            case ast.BoolOp(op=ast.And()):
                for value in node.values:
                    self.node(value, unit, guarded)
                    guarded |= self.sides(value)[0]
            case ast.AnnAssign():
                if node.value is not None:
                    self.node(node.value, unit, guarded)
            case ast.Attribute() if use := uses_itself(node):
                if not guarded:
                    unit.needs.append(f"{self.file}:{node.lineno} {use}")
            case _:
                if isinstance(node, ast.Call):
                    given = (node.func, *node.args, *(keyword.value for keyword in node.keywords))
                    for name in filter(None, map(_name, given)):
                        unit.calls.add(name)
                        if not guarded:
                            unit.unguarded_calls.add(name)
                for _, value in ast.iter_fields(node):
                    parts = value if isinstance(value, list) else [value]
                    if parts and all(isinstance(part, ast.stmt) for part in parts):
                        self.block(parts, unit, guarded)
                        continue
                    for part in parts:
                        if isinstance(part, ast.AST):
                            self.node(part, unit, guarded)

    def sides(self, test: ast.expr) -> tuple[bool, bool]:
        """Whether a condition speaks of CUDA so that only CUDA comes into its body, and into what is else."""
        match test:
            case ast.UnaryOp(op=ast.Not()):
                body, other = self.sides(test.operand)
                return other, body
            case ast.BoolOp():
                both = [self.sides(value) for value in test.values]
                one, all_of = (any, all) if isinstance(test.op, ast.And) else (all, any)
                return one(body for body, _ in both), all_of(other for _, other in both)
            case ast.Compare(ops=[ast.NotEq() | ast.Is()]) if _speaks(test, self.carriers):
                return False, True
            case _ if _speaks(test, self.carriers):
                return True, False
        return False, False


def uses_itself(node: ast.AST) -> str | None:
    """What an expression needs CUDA for: torch.cuda.NAME or torch._C._cuda_NAME."""
    match node:
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="torch"), attr="cuda"), attr=name):
            return None if name in ANYWHERE else f"torch.cuda.{name}"
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="torch"), attr="_C"), attr=name):
            return f"torch._C.{name}" if name.startswith("_cuda") else None
    return None


def uses(node: ast.AST) -> bool:
    return any(uses_itself(one) for one in ast.walk(node))


def _speaks(test: ast.AST, carriers: frozenset[str] | set[str]) -> bool:
    names = {_name(node) for node in ast.walk(test)}
    words = {node.value for node in ast.walk(test) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return bool(names & carriers) or any(word in one for one in filter(None, names | words) for word in WORDS)


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def unguarded(sources: Mapping[str, str]) -> list[str]:
    """The uses of CUDA that can be reached without a guard, as "file:line use"."""
    units = [unit for file, text in sources.items() for unit in Reader(file, ast.parse(text)).units]
    called = {name for unit in units for name in unit.calls} | IN_PROCESSES
    needs = [set(unit.needs) for unit in units]
    while True:
        by_name: dict[tuple[str | None, str], set[str]] = {}
        for unit, own in zip(units, needs, strict=True):
            for where in (unit.where, None):
                by_name.setdefault((where, unit.name), set()).update(own)
        more = [
            own.union(
                *(
                    # a function of the same file, else any of that name
                    by_name.get((unit.where, name), by_name.get((None, name), set()))
                    for name in unit.unguarded_calls
                )
            )
            for unit, own in zip(units, needs, strict=True)
        ]
        if more == needs:
            return sorted(
                {use for unit, own in zip(units, needs, strict=True) if unit.name not in called for use in own}
            )
        needs = more


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def test_no_line_that_needs_cuda_is_reached_without_a_guard() -> None:
    assert unguarded(dict(sources())) == []


GUARDED = {
    "a condition around it": "def f(device):\n    if device.type == 'cuda':\n        torch.cuda.synchronize()",
    "the other side of one": "def f(device):\n    return 0 if device.type != 'cuda' else torch.cuda.memory_allocated()",
    "a return before it": "def f(device):\n    if device.type != 'cuda':\n        return\n    torch.cuda.synchronize()",
    "and": "def f(on_cuda):\n    return on_cuda and torch.cuda.memory_allocated()",
    "an assertion": "def f(self):\n    assert self.graphs is not None\n    torch.cuda.synchronize()",
    "what is only set on CUDA": (
        "def make(self, device):\n    self.done = torch.cuda.Event() if device.type == 'cuda' else None\n"
        "def wait(self):\n    if self.done is not None:\n        torch.cuda.synchronize()"
    ),
    "its caller": "def f():\n    torch.cuda.synchronize()\ndef g(on_cuda):\n    if on_cuda:\n        f()",
    "a constructor that refuses": (
        "class Graphs:\n    def __init__(self, device):\n"
        "        if device.type != 'cuda':\n            raise ValueError\n"
        "    def close(self):\n        torch.cuda.synchronize()"
    ),
    "what any machine answers": "def f():\n    return torch.cuda.is_available()",
    "an annotation": "def f(stream: torch.cuda.Stream):\n    done: torch.cuda.Event | None = None",
}
UNGUARDED = {
    "nothing around it": "def f():\n    torch.cuda.synchronize()",
    "the wrong side": "def f(device):\n    if device.type != 'cuda':\n        torch.cuda.synchronize()",
    "what is else": "def f(on_cuda):\n    if on_cuda:\n        pass\n    else:\n        torch.cuda.synchronize()",
    "or": "def f(on_cuda, other):\n    if on_cuda or other:\n        torch.cuda.synchronize()",
    "a condition on something else": "def f(n):\n    if n > 1:\n        torch.cuda.synchronize()",
    "a condition that is over": "def f(on_cuda):\n    if on_cuda:\n        pass\n    torch.cuda.synchronize()",
    "one caller of two": (
        "def f():\n    torch.cuda.synchronize()\ndef g(on_cuda):\n    if on_cuda:\n        f()\ndef h():\n    f()"
    ),
    "a caller's caller": "def f():\n    torch.cuda.synchronize()\ndef g():\n    f()\ndef h():\n    g()",
    "passed on, not called": "def f(call):\n    call(torch.cuda.synchronize)",
    "on import": "torch.cuda.synchronize()",
    "a private name of torch's": "def f():\n    torch._C._cuda_clearCublasWorkspaces()",
    "a method": "class A:\n    def close(self):\n        torch.cuda.synchronize()",
}


@pytest.mark.parametrize("source", GUARDED.values(), ids=GUARDED.keys())
def test_a_guard_is_seen(source: str) -> None:
    assert unguarded({"planted.py": source}) == []


@pytest.mark.parametrize("source", UNGUARDED.values(), ids=UNGUARDED.keys())
def test_a_planted_fault_is_found(source: str) -> None:
    (found,) = unguarded({"planted.py": source})
    assert found.startswith("planted.py:")
