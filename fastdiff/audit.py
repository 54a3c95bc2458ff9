"""What makes a denoise step unsafe to capture, found on any machine, with file and line; and the recorded step.

A CUDA graph is a list of kernels with their addresses and numbers frozen. Whatever else a step does (a read on the
host, a number of Python's that changes, a tensor that is made anew) is wrong in it, and mostly silently so.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_iter, tree_map, tree_map_only, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from fastdiff.denoiser import Denoiser
from fastdiff.errors import CannotCapture
from fastdiff.slots import Batch
from fastdiff.step import denoise_step
from fastdiff.table import GUIDANCE

aten = torch.ops.aten

Kind = Literal[
    "host read", "host operand", "host-to-device copy", "data-dependent shape", "random draw", "frozen scalar",
    "frozen branch", "rebound tensor", "carried tensor", "row coupling",
]  # fmt: skip

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
    "frozen branch": "Python ran other operations in another step, and a graph keeps the first: compute both sides and "
    "choose with torch.where",
    "rebound tensor": "a static tensor was replaced by another, whose address no graph knows: write into it with copy_",
    "carried tensor": "a tensor that an earlier step made is used in this one, and a graph keeps its first address: "
    "keep it in a buffer and write into it with copy_",
    "row coupling": "what one slot gets depends on what its neighbours hold: serve it with max_batch=1, or take the "
    "statistics over each sample alone",
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


class DeviceTensor(Tensor):
    """A tensor that says it is on a CUDA device, wherever its elements are.

    To torch's own code it is a meta tensor: like CUDA it is no host memory, and unlike CUDA every build has it.
    """

    home: EmulatedDevice
    worlds: tuple[Tensor, ...]  # its elements, in each variant of the run

    device = property(lambda self: self.home.device)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # none of its own

    @staticmethod
    def __new__(cls, home: EmulatedDevice, worlds: Sequence[Tensor]) -> DeviceTensor:
        like = worlds[0]
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls, like.size(), strides=like.stride(), storage_offset=like.storage_offset(), dtype=like.dtype,
            layout=like.layout, device=torch.device("meta"),
        )  # fmt: skip
        made.home, made.worlds = home, tuple(worlds)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func}: expected its EmulatedDevice to be entered, got a tensor of one outside of it")

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.worlds = value.worlds if isinstance(value, DeviceTensor) else (value,) * len(self.worlds)
        self.home.rebound("Tensor.data", value)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, **options)


class Operation(NamedTuple):
    """One dispatched operation as it was issued, device tensors and all."""

    func: Any  # the overload
    args: Any
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    output: Any

    def faults(self) -> Iterator[Kind]:
        """What of it no graph can hold, seen by itself."""
        op, tags = self.func.overloadpacket, self.func.tags
        hosts = [tensor for tensor in self.inputs if on_host(tensor)]
        if torch.Tag.nondeterministic_seeded in tags and _argument(self, "dropout_p") != 0:
            yield "random draw"
        if op is aten._to_copy or op is aten.copy_:
            source = self.args[op is aten.copy_]
            target = self.args[0] if op is aten.copy_ else self.output
            if on_host(source) != on_host(target):
                yield "host-to-device copy" if on_host(source) else "host read"
        elif len(hosts) == len(self.inputs):
            return
        elif torch.Tag.data_dependent_output in tags or op is aten._linalg_check_errors or _indexes_host(self):
            yield "host read"
        elif _has_dynamic_shape(self):
            yield "data-dependent shape"
        elif op is aten.set_:
            yield "rebound tensor"
        elif hosts:
            yield "host operand"


class EmulatedDevice(TorchDispatchMode):
    """A CUDA device on any machine: its tensors report it, and what is made of them or asked for on it is on it.

    Within `with device:` a model and torch's own code behave as on a GPU, except that nothing fails for being on the
    wrong side; values are computed where the elements are. `put` names the first tensors. Subclasses see
    each operation in `issued`. A tensor has one value for each of `worlds`; Python sees the first.
    """

    def __init__(self, elements: torch.device | None = None, worlds: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is
        self._elements = elements or torch.device("cpu")
        self.device = self._elements if self._elements.type == "cuda" else torch.device("cuda", 0)
        self.run = 0
        self._worlds = worlds
        self._live: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()  # each tensor with its run
        self._without_cuda = _WithoutCuda()

    def put(self, *worlds: Any) -> Any:
        """Tensors, or a tree of them, as device tensors over the same elements: one for all worlds, or one for each."""

        def hold(*one: Any) -> Any:
            if not isinstance(one[0], Tensor):
                return one[0]
            made = DeviceTensor(self, one * self._worlds if len(one) == 1 else one)
            self._live[made] = self.run
            return made

        return tree_map(hold, *worlds)

    def tensors(self) -> list[DeviceTensor]:
        """Those that are alive."""
        return list(self._live)  # type: ignore[arg-type]  # put stores no others

    def born(self, tensor: Tensor) -> int:
        """The run in which it was put or made; 0 for one of no device."""
        return self._live.get(tensor, 0)

    def issued(self, operation: Operation) -> None:
        """Called after each operation."""

    def rebound(self, name: str, value: Any) -> None:
        """Called when a static tensor is replaced by `value`, which no operation does."""

    def __enter__(self) -> Self:
        self._without_cuda.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._without_cuda.__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._can_decompose():  # else `linear` and `to` come here whole
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten._to_copy.default and self._is_there(args[0], **kwargs):
            return args[0]
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        issued = Operation(func, args, kwargs, inputs, None)
        with _disable_current_modes():
            issued = issued._replace(output=self._output(issued))
            self.issued(issued)
        return issued.output

    def _is_there(self, tensor: Tensor, dtype: Any = None, device: Any = None, **_: Any) -> bool:
        """Whether a copy would change nothing: torch's own code takes cuda and meta for two devices."""
        on_device = isinstance(tensor, DeviceTensor) and device is not None and device.type != "cpu"
        return on_device and dtype in (None, tensor.dtype)

    def _output(self, issued: Operation) -> Any:
        func, args, kwargs, inputs, _ = issued
        target = kwargs.get("device")
        from_device = any(isinstance(tensor, DeviceTensor) for tensor in inputs)
        if target is None:
            on_device = from_device and not _indexes_host(issued)
        elif on_device := target.type != "cpu":
            kwargs = {**kwargs, "device": self._elements}

        def compute(world: int) -> Any:
            its_args, its_kwargs = tree_map_only(DeviceTensor, lambda tensor: tensor.worlds[world], (args, kwargs))
            return func(*its_args, **its_kwargs)

        results = [compute(0)]
        one_for_all = (
            _has_dynamic_shape(issued)
            or torch.Tag.nondeterministic_seeded in func.tags
            or func.overloadpacket in _UNINITIALISED
        )
        for world in range(1, self._worlds if on_device else 1):
            results.append(tree_map_only(Tensor, torch.clone, results[0]) if one_for_all else compute(world))
        written = {id(tensor.worlds[0] if isinstance(tensor, DeviceTensor) else tensor): tensor for tensor in inputs}

        def wrap(*worlds: Any) -> Any:
            tensor = written.get(id(worlds[0]))
            if tensor is None:
                return self.put(*worlds) if on_device else worlds[0]
            if one_for_all and isinstance(tensor, DeviceTensor):
                for world in tensor.worlds[1:]:
                    world.copy_(worlds[0])
            return tensor

        output = tree_map(wrap, *results)
        if torch.Tag.inplace_view in func.tags and isinstance(args[0], DeviceTensor):
            with torch._C._DisableTorchDispatch():  # the wrapper's own shape
                func(*args, **kwargs)
        return output


def elements(tensor: Tensor) -> Tensor:
    """The tensor that holds the values of `tensor`, on a device or not."""
    return tensor.worlds[0] if isinstance(tensor, DeviceTensor) else tensor


def on_host(tensor: Tensor) -> bool:
    """Whether a GPU run would hold it in host memory."""
    return not isinstance(tensor, DeviceTensor) and tensor.device.type == "cpu"


class _WithoutCuda(FakeTensorMode):
    """Not for its fake tensors, which it never makes: under this mode torch takes `device="cuda"` without starting it,
    and `torch.tensor(..., device=)` dispatches its copy."""

    avoid_device_init = True


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


_UNINITIALISED = {  # whatever memory held, which says nothing of what depends on what
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}
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


def _changed(before: Tensor, after: Tensor) -> Tensor:
    return (before != after) & ~((before != before) & (after != after))


def _argument(operation: Operation, name: str) -> Any:
    """An argument by its name in the schema, with its default; None where there is no such."""
    for position, argument in enumerate(operation.func._schema.arguments):
        if argument.name == name:
            given = operation.args[position] if position < len(operation.args) else argument.default_value
            return operation.kwargs.get(name, given)
    return None


def _indexes_host(operation: Operation) -> bool:
    """A host tensor gathered by a device one: the index is copied to the host, and the result stays there."""
    return operation.func.overloadpacket is aten.index and on_host(operation.args[0])


def _has_dynamic_shape(operation: Operation) -> bool:
    """Whether values decide the output's shape, or how many elements are written."""
    op = operation.func.overloadpacket
    if op is aten.index or op is aten.index_put or op is aten.index_put_:
        masks = any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in operation.args[1]
        )
        return masks and (op is aten.index or operation.args[2].numel() > 1)  # one value is a masked_fill
    if op is aten.repeat_interleave:
        return _argument(operation, "output_size") is None
    return torch.Tag.dynamic_output_shape in operation.func.tags


_NOT_OURS = (f"{Path(torch.__file__).parent}{os.sep}", __file__)


def _place() -> tuple[str, int]:
    """File and line of the innermost frame outside torch and this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_OURS):
        frame = frame.f_back
    return ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
