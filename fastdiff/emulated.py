"""A CUDA device on any machine: what a model and torch do on a GPU, told operation by operation."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

Uncapturable = Literal[
    "host read", "host operand", "host-to-device copy", "data-dependent shape", "random draw", "rebound tensor"
]
"""What one operation, seen by itself, can do that no graph can hold."""

_UNINITIALISED = {  # whatever memory held, which says nothing of what depends on what
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}


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

    def faults(self) -> Iterator[Uncapturable]:
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
