"""A sampler as a table: one row per model evaluation, applied without the scheduler that it came from.

    x_in = c_in[i] * s[0]                              what the model sees
    phi  = clamp(r[i] . [s, m], lo[i], hi[i])          only where the sampler clips x0; else its weight is 0
    s'   = A[i] s + b[i] m + d[i] phi + C[i] eps       s[0] is the sample, s[1:] the sampler's own memory

Everything here is host-side float64; `pack` turns a table into the float32 rows that slots hold on a device.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = "1"

Draw = torch.dtype | None
"""The dtype of one noise draw; None follows the model output's."""


@dataclass(frozen=True, eq=False, repr=False)
class StepTable:
    """The rows of one sampler for one schedule: R rows, K latents (the sample counted), at most Z draws a row.

    All coefficients are float64 on the CPU. Immutable, hashed and compared by content, shared by every request that
    asks for the same schedule.
    """

    timesteps: Tensor  # [R], in the scheduler's own dtype: what the model is told
    c_in: Tensor  # [R]
    A: Tensor  # [R, K, K]
    b: Tensor  # [R, K]
    d: Tensor  # [R, K]
    C: Tensor  # [R, K, Z]
    r: Tensor  # [R, K + 1], over (s, m)
    lo: Tensor  # [R]
    hi: Tensor  # [R]
    x0_row: Tensor  # [R, K + 2 + Z], over (s, m, phi, eps); [0, 0] when the sampler tells no x0
    init_noise_sigma: float
    draws: tuple[tuple[Draw, ...], ...]  # one entry per row, one dtype per draw, weight 0 or not
    latents: tuple[tuple[str, ...], ...]  # R + 1 entries: the attribute behind each latent at that row's start
    x0_source: str | None  # "output", "convert_model_output", "sigma" or None
    source: str  # the scheduler's class name

    def __post_init__(self) -> None:
        rows, latents, draws = self.C.shape
        expected = {
            "timesteps": (rows,), "c_in": (rows,), "A": (rows, latents, latents), "b": (rows, latents),
            "d": (rows, latents), "r": (rows, latents + 1), "lo": (rows,), "hi": (rows,),
            "x0_row": (rows, latents + 2 + draws) if self.x0_source else (0, 0),
        }  # fmt: skip
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"StepTable.{name}: expected shape {shape}, got {tuple(getattr(self, name).shape)}")
        if len(self.draws) != rows or len(self.latents) != rows + 1:
            raise ValueError(f"StepTable: {rows} rows need {rows} draws entries and {rows + 1} latents entries")

    def __len__(self) -> int:
        """Rows, that is model evaluations (Heun with 12 steps has 23)."""
        return len(self.draws)

    @property
    def memory(self) -> int:
        """K: latents that a request carries from row to row, the sample counted. Euler 1, DPM++ 2M 2."""
        return self.A.shape[1]

    @property
    def max_draws(self) -> int:
        """Z: the most noise draws that any row makes."""
        return self.C.shape[2]

    @property
    def clips(self) -> bool:
        """Whether any row clamps its prediction of x0."""
        return bool(torch.isfinite(self.lo).any() | torch.isfinite(self.hi).any())

    @property
    def nbytes(self) -> int:
        """Host bytes of all coefficients."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @cached_property
    def digest(self) -> str:
        """sha256 over timesteps, rows and draws: two equal digests sample alike."""
        return self._hashed()

    def _hashed(self) -> str:
        content = hashlib.sha256(json.dumps(self._metadata(), sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            content.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            content.update(tensor.contiguous().numpy().tobytes())
        return content.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepTable) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        first, last = (self.timesteps[i].item() for i in (0, -1))
        drawn = sum(map(len, self.draws))
        return (
            f"StepTable({self.source}: {len(self)} rows, t {first:g} -> {last:g}, memory {self.memory}, "
            f"{drawn} draws, {'clips x0, ' if self.clips else ''}x0 from {self.x0_source or 'nowhere'}, "
            f"{self.nbytes} bytes, {self.digest[:12]})"
        )

    # The reference application: plain, one request, no capture. Slots apply the same rows for a whole batch.

    def init(self, sample: Tensor) -> Tensor:
        """The state [K, ...] before row 0, from a `sample` [...] already scaled by `init_noise_sigma`.

        Half precision is widened to float32, the dtype that states are kept in.
        """
        dtype = sample.dtype if sample.dtype == torch.float64 else torch.float32
        state = torch.zeros(self.memory, *sample.shape, dtype=dtype, device=sample.device)
        state[0] = sample
        return state

    def model_input(self, row: int, state: Tensor) -> Tensor:
        """What the model sees at `row`: the sample of `state` [K, ...], scaled."""
        return state[0] * self.c_in[row].item()

    def advance(self, row: int, state: Tensor, model_output: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """The state [K, ...] after `row`. `model_output` [...] after guidance; `noise`: one [...] tensor per draw."""
        terms = self._terms(row, state, model_output, noise)
        weights = torch.cat([self.A[row], self.b[row, :, None], self.d[row, :, None], self.C[row]], dim=1)
        return torch.stack([_combine(weights[k].tolist(), terms) for k in range(self.memory)])

    def x0(self, row: int, state: Tensor, model_output: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """The sampler's own prediction of the clean sample [...] at `row`."""
        if self.x0_source is None:
            raise ValueError(f"{self.source} predicts no x0: neither its output nor its steps tell one")
        return _combine(self.x0_row[row].tolist(), self._terms(row, state, model_output, noise))

    def _terms(self, row: int, state: Tensor, model_output: Tensor, noise: Sequence[Tensor] | None) -> list[Tensor]:
        noise = list(noise or ())
        if len(noise) != len(self.draws[row]):
            raise ValueError(
                f"{self.source} row {row}: expected {len(self.draws[row])} noise tensors, got {len(noise)}"
            )
        latents = [*state, model_output.to(state.dtype)]
        phi = _combine(self.r[row].tolist(), latents).clamp(self.lo[row].item(), self.hi[row].item())
        return [*latents, phi, *(eps.to(state.dtype) for eps in noise)]

    # Files

    def save(self, path: str | Path) -> None:
        """Write the table to a safetensors file."""
        tensors, metadata = self.to_tensors()
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> StepTable:
        """Read a table that `save` wrote; any other file is a ValueError."""
        return cls.from_tensors(*read_tensors(path, "StepTable.save"))

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the metadata of a safetensors file, for those who write more beside them."""
        if self._hashed() != self.digest:
            raise ValueError(
                f"{self.source}: this table was written into, and others who asked for the same have it too; clone a "
                "tensor before you change it, and tabulate anew after table_cache.clear()"
            )
        return self._tensors(), {**self._metadata(), "digest": self.digest}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> StepTable:
        """The inverse of `to_tensors`."""
        found = metadata.get("fastdiff.StepTable")
        if found != FORMAT_VERSION:
            raise ValueError(
                f"expected a StepTable of format version {FORMAT_VERSION}, got {found or 'another kind of file'}; "
                "tabulate the scheduler again and save it with this version"
            )
        missing = [name for name in _TENSOR_NAMES if name not in tensors]
        if missing:
            raise ValueError(f"expected the tensors of a StepTable, missing {', '.join(missing)}")
        table = cls(
            **{name: tensors[name] for name in _TENSOR_NAMES},
            init_noise_sigma=float(metadata["init_noise_sigma"]),
            draws=tuple(
                tuple(getattr(torch, name) if name else None for name in row) for row in json.loads(metadata["draws"])
            ),
            latents=tuple(map(tuple, json.loads(metadata["latents"]))),
            x0_source=metadata["x0_source"] or None,
            source=metadata["source"],
        )
        if table.digest != metadata.get("digest"):
            raise ValueError(f"{table!r} is not what was saved: the digest in the file is {metadata.get('digest')}")
        return table

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSOR_NAMES}

    def _metadata(self) -> dict[str, str]:
        draws = [[str(dtype).removeprefix("torch.") if dtype else "" for dtype in row] for row in self.draws]
        return {
            "fastdiff.StepTable": FORMAT_VERSION,
            "init_noise_sigma": repr(self.init_noise_sigma),
            "draws": json.dumps(draws),
            "latents": json.dumps(self.latents),
            "x0_source": self.x0_source or "",
            "source": self.source,
        }


def read_tensors(path: str | Path, writer: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file that `writer` wrote; ValueError for what is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not iterable itself
            return tensors, file.metadata() or {}
    except FileNotFoundError:  # which names the path itself
        raise
    except (SafetensorError, OSError) as error:  # the second of a folder
        raise ValueError(
            f"{path}: expected a file that {writer} wrote, got another or a cut one ({error}); save it again"
        ) from error


_TENSOR_NAMES = tuple(field.name for field in fields(StepTable) if field.type == "Tensor")


def _combine(weights: list[float], terms: Sequence[Tensor]) -> Tensor:
    """Sum of weight * term over the terms that have one: a term of weight 0 is never read, so it may be NaN.

    Accumulated in float64: some rows subtract terms hundreds of times their sum (SASolver predicting noise).
    """
    total = torch.zeros_like(terms[0], dtype=torch.float64)
    for weight, term in zip(weights, terms, strict=False):  # rows are padded to the most draws of any row
        if weight:
            total += weight * term.double()
    return total.to(terms[0].dtype)


def prune(table: StepTable) -> StepTable:
    """`table` without the memory that can no longer reach the sample or the x0 prediction.

    A backward pass over the rows finds, at each row's start, the latents that a later row still reads; those are
    packed into as few slots as the fullest row needs, so a list that only grows (IPNDM's `ets`) costs what is read.
    """
    live: list[list[int]] = [[0]]
    for row in reversed(range(len(table))):
        into = live[0]
        reads = (table.A[row, into] != 0).any(0)
        if (table.d[row, into] != 0).any():
            reads |= table.r[row, :-1] != 0
        if table.x0_source:
            x0_row = table.x0_row[row]
            reads |= x0_row[: table.memory] != 0
            if x0_row[table.memory + 1] != 0:
                reads |= table.r[row, :-1] != 0
        reads[0] = True
        live.insert(0, torch.nonzero(reads).flatten().tolist())
    memory, rows = max(map(len, live)), len(table)

    zeros = table.A.new_zeros  # on the CPU and in float64, whatever the caller's defaults
    A, C = zeros(rows, memory, memory), zeros(rows, memory, table.max_draws)
    b, d = zeros(rows, memory), zeros(rows, memory)
    r, x0_row = zeros(rows, memory + 1), zeros(rows, memory + 2 + table.max_draws)
    for row, (start, end) in enumerate(pairwise(live)):
        A[row, : len(end), : len(start)] = table.A[row][end][:, start]
        b[row, : len(end)] = table.b[row, end]
        d[row, : len(end)] = table.d[row, end]
        C[row, : len(end)] = table.C[row, end]
        r[row, : len(start)], r[row, -1] = table.r[row, start], table.r[row, -1]
        if table.x0_source:
            x0_row[row, : len(start)] = table.x0_row[row, start]
            x0_row[row, memory:] = table.x0_row[row, table.memory :]
    names = tuple(
        tuple(table.latents[row][index] for index in kept if index < len(table.latents[row]))
        for row, kept in enumerate(live)
    )
    return StepTable(
        timesteps=table.timesteps, c_in=table.c_in, A=A, b=b, d=d, C=C, r=r, lo=table.lo, hi=table.hi,
        x0_row=x0_row if table.x0_source else table.x0_row, init_noise_sigma=table.init_noise_sigma,
        draws=table.draws, latents=names, x0_source=table.x0_source, source=table.source,
    )  # fmt: skip


class RowLayout(NamedTuple):
    """Where each coefficient stands in a packed row of `width` floats, for K latents and Z draws."""

    memory: int
    draws: int

    @property
    def terms(self) -> int:
        """Columns of the weights: K latents, the model output, phi, Z draws."""
        return self.memory + 2 + self.draws

    @property
    def width(self) -> int:
        """F: floats in a row."""
        return SCALARS + (self.memory + 1) + self.memory * self.terms


SCALARS = 5  # columns that come first: t, c_in, guidance, lo, hi
GUIDANCE = 2  # the column of a packed row that belongs to the request and not to the table


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def pack(table: StepTable, layout: RowLayout) -> Tensor:
    """The rows as slots hold them: float32 [R + 1, F], in the order t, c_in, guidance (1), lo, hi, r, [A | b | d | C].

    The last row stands there twice: a spent slot gathers it, so that the model sees a valid timestep. The table's K and
    Z may be smaller than the layout's; the rest is zero. Cached: callers must not write to it.
    """
    if table.memory > layout.memory or table.max_draws > layout.draws:
        raise ValueError(f"{table!r} does not fit a layout of {layout.memory} latents and {layout.draws} draws")
    rows, K, Z = len(table), table.memory, table.max_draws
    packed = table.A.new_zeros(rows, layout.width)
    packed[:, 0], packed[:, 1], packed[:, 3], packed[:, 4] = table.timesteps, table.c_in, table.lo, table.hi
    packed[:, GUIDANCE] = 1.0
    clip, weights = packed[:, SCALARS:].split([layout.memory + 1, layout.memory * layout.terms], dim=1)
    clip[:, :K], clip[:, layout.memory] = table.r[:, :K], table.r[:, K]
    weights = weights.unflatten(1, (layout.memory, layout.terms))
    weights[:, :K, :K] = table.A
    weights[:, :K, layout.memory] = table.b
    weights[:, :K, layout.memory + 1] = table.d
    weights[:, :K, layout.memory + 2 : layout.memory + 2 + Z] = table.C
    return torch.cat([packed, packed[-1:]]).float()


class CacheInfo(NamedTuple):
    """Counters of a `TableCache`: how often a table was found, built, joined while being built, or dropped."""

    hits: int
    misses: int
    joined: int
    evictions: int
    size: int


class TableCache:
    """Least recently used tables by key, each built once however many threads ask for it at the same time."""

    def __init__(self, max_size: int = 256) -> None:
        self._max_size = max_size
        self._entries: OrderedDict[Hashable, StepTable | Future[StepTable]] = OrderedDict()
        self._by_digest: dict[str, StepTable] = {}
        self._lock = threading.Lock()
        self._hits = self._misses = self._joined = self._evictions = 0

    def get(self, key: Hashable, build: Callable[[], StepTable]) -> StepTable:
        """The table for `key`; `build()` runs in the first caller's thread, later callers wait for it.

        A `build` that raises is forgotten, and every caller that waited for it gets the same exception.
        """
        with self._lock:
            entry = self._entries.get(key)
            if isinstance(entry, StepTable):
                self._hits += 1
                self._entries.move_to_end(key)
                return entry
            if entry is not None:
                self._joined += 1
            else:
                self._misses += 1
                mine = self._entries[key] = Future()
        if entry is not None:
            return entry.result()
        try:
            with torch.inference_mode(False), torch.no_grad():  # for callers in any mode
                table = build()
        except BaseException as error:
            with self._lock:
                self._entries.pop(key, None)
            mine.set_exception(error)
            raise
        with self._lock:
            table = self._entries[key] = self._by_digest.setdefault(table.digest, table)
            while len(self._entries) > self._max_size:
                self._entries.popitem(last=False)
                self._evictions += 1
            if len(self._by_digest) > 2 * self._max_size:
                self._by_digest = {kept.digest: kept for kept in self._entries.values() if isinstance(kept, StepTable)}
        mine.set_result(table)
        return table

    def info(self) -> CacheInfo:
        """A snapshot of the counters."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, self._joined, self._evictions, len(self._entries))

    def clear(self) -> None:
        """Forget every table and reset the counters; tables in use live on with their requests."""
        with self._lock:
            self._entries.clear()
            self._by_digest.clear()
            self._hits = self._misses = self._joined = self._evictions = 0
