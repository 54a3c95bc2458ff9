"""What makes a denoise step unsafe to capture, found on any machine, with file and line; and the recorded step.

A CUDA graph is a list of kernels with their addresses and numbers frozen. Whatever else a step does (a read on the
host, a number of Python's that changes, a tensor that is made anew) is wrong in it, and mostly silently so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_iter, tree_map, tree_map_only, tree_unflatten

from fastdiff import emulated
from fastdiff.denoiser import Denoiser
from fastdiff.emulated import DeviceTensor, EmulatedDevice, Operation, Uncapturable
from fastdiff.errors import CannotCapture
from fastdiff.frames import innermost
from fastdiff.slots import Batch
from fastdiff.step import denoise_step
from fastdiff.table import GUIDANCE

Kind = Literal[Uncapturable, "frozen scalar", "frozen branch", "carried tensor", "row coupling"]

_ADVICE: dict[Kind, str] = {
    "host read": "the host waits for a device tensor, which a capture forbids: choose with torch.where, gather with "
    "index_select, or read it before the step",
    "host operand": "a host tensor meets device tensors, and a graph keeps the value that it had at capture: make it "
    "a buffer of the model or a conditioning tensor",
    "host-to-device copy": "a graph would copy again from host memory that is gone: make the tensor on the device, or "
    "once before the step",
    "data-dependent shape": "the host must read the values to know the shape, which a capture forbids: mask with "
    "torch.where instead",
    "random draw": "a graph's draws are not the request's own: draw ahead into the slot's noise",
    "frozen scalar": "this number differs between two steps, and a graph keeps the first: pass it as a static tensor",
    "frozen branch": "Python ran other operations in another step from here on, and a graph keeps the first: compute "
    "both sides and choose with torch.where; what follows was not compared",
    "rebound tensor": "a static tensor was replaced by another, whose address no graph knows: write into it with copy_",
    "carried tensor": "a tensor that an earlier step made is used in this one, and a graph keeps its first address: "
    "keep it in a buffer and write into it with copy_",
    "row coupling": "what one slot gets depends on what its neighbours hold, first of all here: serve it with "
    "max_batch=1, or take the statistics over each sample alone",
}


@dataclass(frozen=True)
class Finding:
    """One thing in a step that a captured graph would get wrong, and the line that does it."""

    kind: Kind
    operation: str  # such as aten.mul.Tensor; for a rebound tensor, its name
    message: str
    file: str
    line: int
    count: int  # times in one step


def audit(denoiser: Denoiser, batch: Batch, model: nn.Module | None = None) -> list[Finding]:
    """Everything in `denoise_step(denoiser, batch)` that is unsafe to capture; nothing for a step that is safe.

    `model` is the module behind `denoiser`: its parameters and buffers are on the device, any other tensor that the
    denoiser holds is where it says. Runs eight steps on the CPU, or on the batch's device, over copies of the slots
    with random contents; slots and model are as before afterwards. Not seen: CUDA calls that no operation makes
    (`torch.cuda.synchronize`), and the inside of kernels that are not torch's. Errors of the step itself pass through.
    """
    elements = batch.table.device
    auditor, copy = _Auditor(elements), _copied(batch)
    with auditor.holding(model):
        static = auditor.batch(copy)
        for run in range(3):  # the first fills the caches that a warm-up fills before capture
            randomize(copy, run)
            auditor.start(run)
            with auditor:
                denoise_step(denoiser, static)
    findings = auditor.findings()
    if len(batch.slot) > 1:
        couplings = _Couplings(elements)
        with couplings.holding(model):
            static = couplings.batch(*_coupling_worlds(batch))
            with couplings:
                denoise_step(denoiser, static)
        findings += couplings.findings()
    return findings


class RecordedStep:
    """The operations of a denoise step, traced once and replayed on the static tensors: frozen as a graph freezes.

    A tool of tests. It shows what a graph would compute, not that one can be made: it replays copies to the host and
    data-dependent shapes, which `audit` finds.
    """

    def __init__(self, denoiser: Denoiser, batch: Batch) -> None:
        leaves, structure = tree_flatten(batch._replace(static=None))
        self._static = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def step(*static: Tensor) -> None:
            given = iter(static)
            denoise_step(
                denoiser,
                tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure),
            )

        before = [tensor.clone() for tensor in self._static]
        try:
            with torch.no_grad():
                self._operations = make_fx(step)(*self._static)
        except RuntimeError as error:  # of the tracer, where Python asks for a value
            raise CannotCapture(f"the step cannot be recorded; fastdiff.audit.audit says where: {error}") from error
        finally:
            for tensor, value in zip(self._static, before, strict=True):
                tensor.copy_(value)

    def replay(self) -> None:
        """Advance every slot of the batch by one row, in place."""
        with torch.no_grad():
            self._operations(*self._static)


class _Watched(dict[str, Any]):
    """Named static tensors; a step that puts another one in their place is told on."""

    def __init__(self, auditor: _StepDevice, owner: str, tensors: dict[str, Any]) -> None:
        super().__init__(tensors)
        self._auditor, self._owner = auditor, owner

    def __setitem__(self, name: str, value: Any) -> None:
        if value is not self.get(name):
            self._auditor.rebound(f"{self._owner}.{name}", value)
        super().__setitem__(name, value)


_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


class _StepDevice(EmulatedDevice):
    """A device that holds a model for a while, and gives everything back as it was."""

    def batch(self, *worlds: Batch) -> Batch:
        """Slots on the device, whose conditioning is watched."""
        static: Batch = self.put(*worlds)
        return static._replace(conditioning=_Watched(self, "conditioning", static.conditioning))

    @contextmanager
    def holding(self, model: nn.Module | None) -> Iterator[None]:
        """Parameters and buffers are device tensors within, buffers copies; what a step kept is plain again after."""
        modules = [(module, module._parameters, module._buffers) for module in model.modules()] if model else []
        moved: dict[int, DeviceTensor] = {}  # by id: tied weights stay one

        def move(tensor: Tensor | None, copies: bool) -> Tensor | None:
            if tensor is None or tensor.device != self._elements:
                return tensor
            if id(tensor) not in moved:
                worlds = [tensor.detach().clone() for _ in range(self._worlds)] if copies else [tensor.detach()]
                moved[id(tensor)] = self.put(*worlds)
            return moved[id(tensor)]

        try:
            for module, parameters, buffers in modules:
                for tree, tensors, copies in (("_parameters", parameters, False), ("_buffers", buffers, True)):
                    ours = {name: move(tensor, copies) for name, tensor in tensors.items()}
                    vars(module)[tree] = _Watched(self, type(module).__name__, ours)
            # A view must keep no hold on its base, or what a step kept could not be freed of its device.
            untracked = torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING)
            with torch.no_grad(), untracked, torch.random.fork_rng(devices=[]):
                yield
        finally:
            for module, parameters, buffers in modules:
                vars(module).update(_parameters=parameters, _buffers=buffers)
            kept = self.tensors()
            self._live.clear()
            for tensor in kept:  # caches of the model: from here on they hold plain tensors of the same values
                torch.utils.swap_tensors(tensor, tensor.worlds[0].detach())


class _Fault(NamedTuple):
    """What is counted."""

    kind: Kind
    operation: str
    file: str
    line: int

    def finding(self, count: int = 1) -> Finding:
        return Finding(self.kind, self.operation, _ADVICE[self.kind], self.file, self.line, count)


class _Issued(NamedTuple):
    """What of an operation a graph would freeze."""

    where: tuple[str, str, int]  # operation, file, line
    shapes: list[torch.Size]
    scalars: list[Any]


class _Auditor(_StepDevice):
    """Sees all but row coupling: faults as they are issued, frozen Python by comparing the last two steps."""

    def __init__(self, elements: torch.device) -> None:
        super().__init__(elements)
        self._traces: list[list[_Issued]] = []
        self._counts: list[Counter[_Fault]] = []

    def start(self, run: int) -> None:
        """From here on this is step number `run`, of which 0 is warm-up."""
        self.run = run
        self._traces.append([])
        self._counts.append(Counter())

    def issued(self, operation: Operation) -> None:
        where = (str(operation.func), *_place())
        shapes = [tensor.shape for tensor in operation.inputs]
        scalars = [value for value in tree_iter((operation.args, operation.kwargs)) if not isinstance(value, Tensor)]
        self._traces[-1].append(_Issued(where, shapes, scalars))
        self._counts[-1].update(_Fault(kind, *where) for kind in operation.faults())
        if any(0 < self.born(tensor) < self.run for tensor in operation.inputs):
            self._counts[-1][_Fault("carried tensor", *where)] += 1

    def rebound(self, name: str, value: Any) -> None:
        self._counts[-1][_Fault("rebound tensor", name, *_place())] += 1
        if isinstance(value, DeviceTensor):
            self._live[value] = 0  # said once: that the next step uses it is the same fault

    def findings(self) -> list[Finding]:
        """Of all steps but the first, in the order in which they were met."""
        _, counts, *others = self._counts
        for other in (*others, Counter(self._frozen())):
            counts |= other  # the most of any step
        return [fault.finding(count) for fault, count in counts.items()]

    def _frozen(self) -> Iterator[_Fault]:
        """What Python decided otherwise in the last step than in the one before it."""
        for one, other in zip_longest(*self._traces[-2:]):
            if one is None or other is None or one.where != other.where:
                yield _Fault("frozen branch", *(other or one).where)  # from here on the traces do not match
                return
            # Where shapes differ, so do the numbers that follow from them. By their text: nan is not equal to itself.
            if one.shapes == other.shapes and repr(one.scalars) != repr(other.scalars):
                yield _Fault("frozen scalar", *one.where)


_WORLDS = 5  # as many as _coupling_worlds gives


class _Couplings(_StepDevice):
    """Runs one step in all worlds at once; an element that slot 0 and its neighbours both change is of no one slot."""

    def __init__(self, elements: torch.device) -> None:
        super().__init__(elements, _WORLDS)
        self._first: list[Finding] = []

    def issued(self, operation: Operation) -> None:
        if self._first:  # all that is computed from it is coupled too
            return
        for tensor in tree_iter(operation.output):
            if isinstance(tensor, DeviceTensor):
                own, *others = tensor.worlds
                if all(_is_same(own, other) for other in others):  # a weight, or a view of one
                    continue
                by_first_1, by_first_2, by_rest_1, by_rest_2 = (_changed(own, other) for other in others)
                if ((by_first_1 | by_first_2) & (by_rest_1 | by_rest_2)).any():
                    self._first = [_Fault("row coupling", str(operation.func), *_place()).finding()]
                    return

    def findings(self) -> list[Finding]:
        """The first operation that couples rows, if any."""
        return self._first


def _coupling_worlds(batch: Batch) -> list[Batch]:
    """Batches that differ from the first in slot 0 alone, by value and by NaN, and in all slots but that one."""
    own, foreign = _copied(batch), _copied(batch)
    randomize(own, seed=1)
    randomize(foreign, seed=2)
    for name, tensor in own.conditioning.items():
        if not tensor.is_floating_point():
            foreign.conditioning[name].copy_(tensor == 0)  # of two valid values, the other one
    nan = tree_map_only(Tensor, lambda tensor: tensor * torch.nan if tensor.is_floating_point() else tensor, own)
    nan = nan._replace(table=own.table)

    def joined(first: Any, rest: Any) -> Any:
        """Slot 0 of the one, the other slots of the other."""
        return torch.cat([first[:1], rest[1:]]) if isinstance(first, Tensor) else first

    pairs = ((foreign, own), (nan, own), (own, foreign), (own, nan))
    return [own, *(tree_map(joined, first, rest) for first, rest in pairs)]


def _copied(batch: Batch) -> Batch:
    copied: Batch = tree_map_only(Tensor, torch.clone, batch._replace(static=None))
    return copied


def randomize(batch: Batch, seed: int) -> None:
    """Fill the slots with requests that could be: each at a row of its own, of a table of its own."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, shape: Sequence[int]) -> Tensor:
        return torch.rand(tuple(shape), generator=generator) * (high - low) + low

    def whole(below: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(below, tuple(shape), generator=generator)

    n, rows, _ = batch.table.shape
    table = uniform(-0.3, 0.3, batch.table.shape)
    table[..., 0], table[..., 1] = whole(1000, (n, rows)), uniform(0.5, 1, (n, rows))  # t, c_in
    table[..., GUIDANCE] = uniform(1, 8, (n, rows))
    table[..., 3], table[..., 4] = -1, 1  # lo, hi
    batch.table.copy_(table)
    batch.row.copy_(whole(rows - 1, (n,)))
    batch.end.fill_(rows - 1)
    for tensor in (*batch.planes, batch.noise, *batch.conditioning.values()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor.copy_(whole(2, tensor.shape))  # 0 and 1 are valid labels, tokens and mask entries in any model


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def _changed(before: Tensor, after: Tensor) -> Tensor:
    return (before != after) & ~((before != before) & (after != after))


def _place() -> tuple[str, int]:
    """File and line of the innermost frame outside torch and the audit."""
    frame = innermost(__file__, emulated.__file__)
    return ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
