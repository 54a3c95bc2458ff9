"""Requests in, results out."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from traceback import format_tb
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastdiff import stages
from fastdiff.capture import Counters, Mode, Steps, smallest
from fastdiff.errors import FastdiffError, NumericalError, PlanMismatch, RowsCoupled
from fastdiff.families import Family, family_of
from fastdiff.fingerprint import Unsettled
from fastdiff.isolation import Certificate, certify
from fastdiff.plan import CapturePlan
from fastdiff.profile import Choice, Profile, choose, profile_step
from fastdiff.request import Request, Result, is_scale
from fastdiff.session import Session, Turn, check_fits
from fastdiff.slots import Slots
from fastdiff.state import RequestState
from fastdiff.table import StepTable


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one runtime. What only CUDA can tell is None elsewhere."""

    weights_bytes: int  # of the model that is called in every row; the pipeline's other parts are not counted
    state_bytes: int  # all slots: rows, latents, noise, conditioning
    conditioning_bytes: int  # the part of it that is conditioning
    pool_bytes: int | None  # the graphs' activations, which all batch sizes share
    graph_bytes: Mapping[int, int]  # by batch size: what its graphs took beside the pool of those before them
    left_out: tuple[int, ...]  # batch sizes that the byte budget left without a graph
    reserved_bytes: int | None  # by torch, for everything in the process
    driver_bytes: int | None  # in use on the device, other processes included


class Runtime:
    """Serves requests on `pipe`, any samplers, step counts, guidance scales and seeds mixed in one batch.

    `mode` is how a step runs. "eager" runs at exactly the occupied size; "compiled" at the next of the plan's batch
    sizes, powers of two where no plan says otherwise, each of which costs a compilation when it is first used;
    "step-graph" and "loop-graph" replay CUDA graphs of one row and of `unroll` rows, all captured here; "auto"
    measures a row and chooses, and `choice` says why: a row is compiled for it too where graphs do not pay, unless
    `compile` is "none".

    `height`, `width`, `num_frames` and `max_sequence_length`, the tokens that texts are padded to, are those of the
    pipeline's own call, and fixed here; None is its default. Shorter texts make a cheaper row.

    The capacities come from `plan`, or from the pipeline and `max_batch`; `capacities` are fields of `CapturePlan` that
    replace the plan's. Unless `certify` is False the model is asked here whether it treats the requests of a batch
    apart, bit by bit, in its graphs or, where there are none, eagerly at the largest size; one that does not raises
    RowsCoupled. `progress` shows a bar while graphs are captured. Compiling is of the whole step unless `regional` is
    True: repeated blocks once for all, which large models want.

    Threads: `generate` and `denoise` may be called from many, one runs at a time; a session belongs to the thread
    that opened it.
    Streams: all device work is enqueued on the caller's current stream, and nothing waits for it but the copy of
    finished images to the host and the looks for NaN, in given tensors and finished samples. Aliasing: tensors that
    come back are copies, tensors that go in are copied.
    """

    def __init__(
        self,
        pipe: Any,
        max_batch: int | None = None,
        mode: Mode | Literal["auto"] = "eager",
        *,
        plan: CapturePlan | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        max_sequence_length: int | None = None,
        certify: bool = True,
        progress: bool = True,
        **capacities: Any,
    ) -> None:
        if mode not in (modes := (*get_args(Mode), "auto")):
            raise ValueError(f"mode: expected one of {', '.join(modes)}, got {mode!r}")
        self.family: Family = family_of(
            pipe, height=height, width=width, num_frames=num_frames, max_sequence_length=max_sequence_length
        )
        models = self.family.models
        self._parts = [_Part(pipe, name) for name, part in vars(pipe).items() if any(part is one for one in models)]
        plan_for = partial(_plan_for, self.family, max_batch, plan=plan, capacities=capacities)
        self._turn = Turn(self.family.device)
        self.choice: Choice | None = None
        if mode != "auto":
            self._make_room(mode, plan_for(mode), progress)
        else:
            self._make_room("eager", plan_for("eager"), progress)
            eager, unroll = self.profile(), self.plan.unroll
            self.choice = choose(eager, unroll=unroll)
            if self.choice.mode == "eager" and self.plan.compile != "none":
                self._make_room("compiled", plan_for("compiled"), progress)
                self.choice = choose(eager, compiled=self.profile(), unroll=unroll)
            if self.choice.mode != self.steps.mode:
                self._make_room(self.choice.mode, plan_for(self.choice.mode), progress)
        self.certificate = self._certify() if certify and self.plan.max_batch > 1 else None
        self._turn.mark()

    def _make_room(self, mode: Mode, plan: CapturePlan, progress: bool) -> None:
        self.plan = plan
        self.slots = Slots(self.plan, self.family.device, planar=mode != "eager" and self.plan.compile != "none")
        self.steps = Steps(self.family.denoisers, self.slots, mode, self.family.models, progress=progress)

    def _certify(self) -> Certificate:
        if self.steps.graphs is not None:
            return certify(self.steps, self.slots, self.steps.graphs.sizes())
        eager = Steps(self.family.denoisers, self.slots)  # a model couples rows in any mode; this compiles none
        return certify(eager, self.slots, self.plan.batch_sizes[-1:])

    def profile(self, n: int | None = None) -> Profile:
        """What a row of n slots (all of them if None) costs, and what it waits for: see `fastdiff.profile`.

        Of a schedule's first segment, where there are two.
        """
        self._check_open()
        sizes = self.steps.graphs.sizes() if self.steps.graphs else self.plan.batch_sizes
        size = smallest(sizes, self.plan.max_batch if n is None else n)
        with self.session(), torch.inference_mode(False):  # as steps run, for which it may compile
            return profile_step(
                lambda: self.steps(size),
                self.family.denoiser,
                self.slots.batch(size),
                self._weights(),
                self.steps.rows_per_call,
            )

    def _weights(self) -> list[Tensor]:
        return [tensor for model in self.family.models for tensor in (*model.parameters(), *model.buffers())]

    def memory(self) -> MemoryUse:
        """What this runtime takes, in bytes."""
        self._check_open()
        graphs, cuda = self.steps.graphs, self.family.device.type == "cuda"
        captured = [graphs.sizes(segment) for segment in range(self.plan.segments)] if graphs else []
        graph_bytes: Counter[int] = Counter()
        for (_, n), built in graphs.built.items() if graphs else ():
            graph_bytes[n] += built.torch_bytes + built.driver_bytes
        free, total = torch.cuda.mem_get_info(self.family.device) if cuda else (0, 0)
        return MemoryUse(
            weights_bytes=sum(tensor.nbytes for tensor in self._weights()),
            state_bytes=self.slots.nbytes,
            conditioning_bytes=self.slots.conditioning_bytes,
            pool_bytes=graphs.pool_bytes if graphs else None,
            graph_bytes=graph_bytes,
            left_out=tuple(n for n in self.plan.batch_sizes if any(n not in sizes for sizes in captured)),
            reserved_bytes=torch.cuda.memory_reserved(self.family.device) if cuda else None,
            driver_bytes=total - free if cuda else None,
        )

    @property
    def counters(self) -> Counters | None:
        """Of replays, captures and evictions; None in a mode without graphs."""
        self._check_open()
        return self.steps.graphs.counters if self.steps.graphs else None

    def recapture(self) -> None:
        """Capture, or compile, and certify anew, after weights were replaced, moved, wrapped or rescaled.

        RowsCoupled, which closes the runtime, if the model no longer treats the requests of a batch apart.
        """
        with self.session():
            self.steps.recapture()
            if self.certificate is not None:
                try:
                    self.certificate = self._certify()
                except RowsCoupled:
                    self._release()  # before anybody else comes in
                    raise

    def capture(self, batch_size: int) -> None:
        """Capture a batch size that the byte budget left out, in the place of less used ones."""
        with self.session():
            self.steps.capture(batch_size)

    def close(self) -> None:
        """Release graphs, compiled steps and all static memory; the runtime is of no use afterwards.

        A second call does nothing.
        """
        if hasattr(self, "slots"):
            with self.session():
                self._release()

    def _release(self) -> None:
        self.steps.close()
        if self.family.device.type == "cuda":  # memory is free for the stream that it was taken on, at once
            torch.cuda.synchronize(self.family.device)
        del self.slots, self.steps

    def _check_open(self) -> None:
        if not hasattr(self, "slots"):
            raise RuntimeError("this runtime was closed; build another")

    def _check_model(self) -> None:
        self._check_open()
        for part in self._parts:
            part.check()

    def supports(self, request: Request) -> str | None:
        """None if `generate` would take the request, else the reason why not. No model work."""
        try:
            self._check(request)
        except (FastdiffError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def prepare(self, request: Request) -> RequestState:
        """The request encoded, scheduled and with its first latents: what a session takes."""
        self._check(request)
        return self._prepare(request)

    def decode(self, state: RequestState) -> Tensor:
        """The image [C, H, W], or the video [F, C, H, W], float32 in [0, 1] on the CPU, of what a session gave back."""
        image = stages.decode(self.family, state).image
        assert image is not None
        return image

    def generate(self, requests: Iterable[Request]) -> list[Result]:
        """One result per request, in order. A request that cannot be served raises before any model work."""
        if not isinstance(requests, Iterable):
            raise TypeError(
                f"requests: expected a list of requests, got one {type(requests).__name__}: put it in a list"
            )
        requests = list(requests)
        if not requests:
            raise ValueError("requests: expected at least one request, got none")
        for index, request in enumerate(requests):
            try:
                self._check(request)
            except (FastdiffError, TypeError, ValueError) as error:
                raise type(error)(f"requests[{index}]: {error}") from error
        mode = self.steps.mode  # now: another thread may close the runtime as soon as the rows have run
        states = []
        for index, request in enumerate(requests):
            try:
                states.append(self._prepare(request))
            except Exception as error:
                error.add_note(f"in requests[{index}]")  # of whichever type the pipeline's own text encoder raises
                raise
        states = self._run(states)
        return [self._result(request, state, mode) for request, state in zip(requests, states, strict=True)]

    def denoise(
        self,
        latents: Tensor,
        conditioning: Mapping[str, Tensor],
        table: StepTable | Sequence[StepTable],
        guidance: float | Sequence[float] = 1.0,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Run whole schedules over latents [N, C, H, W] already scaled, as a host's own latents stage leaves them.

        `conditioning`: [N, ...] by the plan's names; `table` and `guidance` (1 is none) for all or one each;
        `generators`, one each, where a table draws noise: they are read and not moved on. Returns [N, C, H, W] in the
        dtype of the pipeline's latents; what a model made NaN or infinite comes back so.
        """
        shape = self.plan.latent_shape
        if not isinstance(latents, Tensor) or latents.shape[1:] != shape or not latents.is_floating_point():
            got = f"{tuple(latents.shape)} {latents.dtype}" if isinstance(latents, Tensor) else type(latents).__name__
            raise PlanMismatch(f"latents: expected shape (N, {str(shape)[1:]} of a floating dtype, got {got}")
        count = len(latents)
        if not count:
            raise ValueError("latents: expected at least one latent, got none")
        tables = _each("table", table if isinstance(table, Sequence) else [table] * count, count, StepTable)
        scales = _each("guidance", guidance if isinstance(guidance, Sequence) else [guidance] * count, count, float)
        if not all(map(is_scale, scales)):
            raise ValueError(f"guidance: expected finite numbers of float32, got {scales}")
        draws = [None] * count if generators is None else _each("generators", generators, count, torch.Generator)
        for name, tensor in {"latents": latents, **conditioning}.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"conditioning {name}: expected a tensor [N, ...], got {type(tensor).__name__}")
            if tensor.shape[:1] != (count,):
                found = str(len(tensor)) if tensor.ndim else "one number"
                raise ValueError(f"conditioning {name}: expected one for each of {count} latents, got {found}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: expected finite values, got NaN or infinity")
        states = [
            RequestState(
                request=None,
                guidance_scale=scales[i],
                conditioning={name: tensor[i] for name, tensor in conditioning.items()},
                table=tables[i],
                generator=draws[i],
                latents=tables[i].init(latents[i]),
                dtype=self.family.latent_dtype,
            )
            for i in range(count)
        ]
        for state in states:
            check_fits(self.plan, state)  # all of them, before any model work
        return torch.stack([state.sample for state in self._run(states)])

    def session(self) -> Session:
        """A host's own loop over the slots. Waits for other threads' work; close it, or use it in a `with` block."""
        self._turn.take()
        try:
            self._check_open()
            self._turn.prepare(self.slots)
            return Session(self._turn, self.family, self.steps, self.slots, self._check_model)
        except BaseException:
            self._turn.give()
            raise

    def _check(self, request: Request) -> None:
        if not isinstance(request, Request):
            raise TypeError(f"expected a fastdiff.Request, got {type(request).__name__}")
        self._check_model()
        if request.guidance_scale_2 is not None and self.plan.segments == 1:
            raise ValueError("guidance_scale_2: expected none: this pipeline has one model for all rows; leave it out")
        self.family.check(request)
        table = self._table(request)
        self.plan.check(table)
        self.family.boundary(table)  # which refuses what would cross it twice

    def _table(self, request: Request) -> StepTable:
        try:
            return stages.table_of(self.family, request)
        except Exception as error:  # of diffusers or of the caller's own scheduler: it may be anything
            if isinstance(error, (FastdiffError, Unsettled)) or type(error) in (TypeError, ValueError):
                raise
            asked = request.scheduler or self.family.scheduler
            name = asked if isinstance(asked, str) else type(asked).__name__
            raise ValueError(
                f"scheduler: expected one that can make this schedule, got {name}, which raises "
                f"{type(error).__name__}: {error}; ask for another schedule or another scheduler"
            ) from error

    def _prepare(self, request: Request) -> RequestState:
        state = RequestState(request=request)
        for stage in (stages.encode, stages.schedule, stages.prepare_latents):
            state = stage(self.family, state)
        return state

    def _run(self, states: Sequence[RequestState]) -> list[RequestState]:
        finished: dict[int, RequestState] = {}
        waiting = deque(enumerate(states))
        with self.session() as session:
            owner: dict[int, int] = {}
            while waiting or owner:
                while waiting and session.free:
                    index, state = waiting.popleft()
                    owner[session.add(state)] = index
                for slot in session.step():
                    finished[owner.pop(slot)] = session.take(slot)
        return [finished[index] for index in range(len(states))]

    def _result(self, request: Request, state: RequestState, mode: Mode) -> Result:
        error: Exception | None = None
        if not torch.isfinite(state.sample).all():
            error = NumericalError(f"seed {request.seed}: the sample is not finite after {state.row} rows")
        else:
            try:
                state = stages.decode(self.family, state)
            except Exception as raised:  # whatever an autoencoder raises for one image; the others are still to come
                error = _without_frames(raised)
        return Result(request=request, latents=state.sample, image=state.image, rows=state.row, mode=mode, error=error)


def _without_frames(error: Exception) -> Exception:
    """The error with its traceback as a note: the frames of what ran out of memory would hold what it had till then."""
    error.add_note("".join(format_tb(error.__traceback__)))
    one: BaseException | None = error
    while one is not None:
        one.__traceback__, one = None, one.__cause__ or one.__context__
    return error


class _Part:
    """A pipeline's model as a runtime found it: its static memory, and the denoiser, are made for that one."""

    def __init__(self, pipe: Any, name: str) -> None:
        self._pipe, self._name, self._model = pipe, name, getattr(pipe, name)
        self._place = self._now()

    def _now(self) -> str | None:
        weight = next(self._model.parameters())
        return None if hasattr(self._model, "_hf_hook") else f"{weight.dtype} on {weight.device}"  # which moves it

    def check(self) -> None:
        """Raise PlanMismatch if the pipeline has another model by now, or this one in another place."""
        name = self._name
        if getattr(self._pipe, name, None) is not self._model:
            raise PlanMismatch(
                f"expected the {name} that this runtime was built with, got another; build a new runtime"
            )
        if self._now() != self._place:
            raise PlanMismatch(
                f"expected the {name} in {self._place}, as this runtime was built, got {self._now()}; build a new one"
            )


def _each(name: str, values: Any, count: int, kind: type) -> list[Any]:
    """`values` as a list, of so many of that kind; where `kind` is float, integers will do."""
    if not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a list of {count}, one for each latent, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"{name}: expected one for each of {count} latents, got {len(values)}")
    for value in values:
        if not isinstance(value, (int, float) if kind is float else kind):
            raise TypeError(f"{name}: expected a {kind.__name__} for each latent, got {type(value).__name__}")
    return list(values)


def _plan_for(
    family: Family, max_batch: int | None, mode: Mode, *, plan: Any, capacities: Mapping[str, Any]
) -> CapturePlan:
    """The given plan, or the family's own, with `capacities` in place of its fields."""
    own = {name: getattr(family, name) for name in ("latent_shape", "dtype", "conditioning")}
    own["segments"] = len(family.denoisers)
    known = [field.name for field in fields(CapturePlan) if field.name not in own]
    for name in capacities:
        if name not in known:
            raise TypeError(
                f"Runtime takes no {name!r}: its capacities are {', '.join(known)}; {', '.join(own)} are the pipeline's"
            )
    if plan is not None:
        if not isinstance(plan, CapturePlan):
            name = str(plan) if isinstance(plan, (str, Path)) else "digits"
            raise TypeError(f"plan: expected a CapturePlan, such as CapturePlan.load({name!r}), got {plan!r}")
        if max_batch is not None:
            raise ValueError("expected at most one of plan and max_batch; a plan has batch_sizes")
        for name, value in own.items():
            if getattr(plan, name) != value:
                raise PlanMismatch(f"{name}: the pipeline has {value}, the plan {getattr(plan, name)}")
        return replace(plan, **capacities)
    slots = 8 if max_batch is None else max_batch
    if not isinstance(slots, int) or slots < 1:
        raise ValueError(f"max_batch: expected an integer >= 1, got {max_batch!r}")
    sizes = set(range(1, slots + 1))
    if mode == "compiled":
        sizes = {size for size in sizes if size.bit_count() == 1} | {slots}
    derived = CapturePlan(**{**own, "batch_sizes": tuple(sorted(sizes)), **capacities})
    if max_batch not in (None, derived.max_batch):
        raise ValueError(
            f"max_batch: expected {derived.max_batch}, the last of batch_sizes {derived.batch_sizes}, got {max_batch}; "
            "give one of the two"
        )
    return derived
