"""The session that hosts drive: isolation, forks, saves, and whose turn it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
import fastdiff.session as session_module
from fastdiff import PlanMismatch, Request, RequestState, Runtime, Session, StaleGraph, stages
from fastdiff.capture import Steps
from fastdiff.session import Turn, _Occupant
from fastdiff.slots import Slots
from fastdiff.table import pack
from tests.conftest import table

REQUEST = Request(prompt="a handwritten one", steps=4, guidance_scale=3.0, seed=1, scheduler="Euler")


@pytest.fixture
def session(runtime: Runtime) -> Iterator[Session]:
    with runtime.session() as own:
        yield own


def finish(session: Session, slot: int) -> RequestState:
    while slot not in session.step():
        pass
    return session.take(slot)


@pytest.mark.parametrize("scheduler", ["DDIM", "UniPCMultistep", "EulerAncestral", "PNDM", "DPMSolverMultistep"])
def test_saved_after_three_rows_and_resumed_it_is_bitwise_the_same(
    session: Session, runtime: Runtime, tmp_path: Path, scheduler: str
) -> None:
    request = Request(prompt="a handwritten four", steps=6, seed=11, scheduler=scheduler)
    slot = session.add(runtime.prepare(request))
    for _ in range(3):
        session.step()
    session.save(slot, tmp_path / "state.safetensors")
    whole = finish(session, slot)
    resumed = finish(session, session.load(tmp_path / "state.safetensors"))
    assert torch.equal(whole.prepared[1], resumed.prepared[1])
    assert whole.generator is not None
    assert resumed.generator is not None
    assert torch.equal(whole.generator.get_state(), resumed.generator.get_state())


RESUME = """
import sys, torch, fastdiff
torch.set_num_threads(1)
runtime = fastdiff.Runtime(fastdiff.models.digits(), max_batch=4, memory=6)
with runtime.session() as session:
    slot = session.load(sys.argv[1])
    while slot not in session.step(): pass
    session.save(slot, sys.argv[2])
"""


def test_another_process_that_gets_only_the_file_makes_bitwise_the_same_image(
    session: Session, runtime: Runtime, tmp_path: Path
) -> None:
    slot = session.add(runtime.prepare(Request(prompt="a handwritten four", steps=10, scheduler="EulerAncestral")))
    for _ in range(7):
        session.step()
    session.save(slot, tmp_path / "seven-rows.safetensors")
    subprocess.run(
        [sys.executable, "-c", RESUME, tmp_path / "seven-rows.safetensors", tmp_path / "done.safetensors"], check=True
    )
    whole, resumed = finish(session, slot), RequestState.load(tmp_path / "done.safetensors")
    assert torch.equal(whole.prepared[1], resumed.prepared[1])
    assert torch.equal(runtime.family.decode(whole.sample), runtime.family.decode(resumed.sample))


@pytest.mark.parametrize("scheduler", ["EulerAncestral", "LCM"])
def test_noise_drawn_row_by_row_is_the_noise_drawn_for_a_whole_run(pipe: Any, runtime: Runtime, scheduler: str) -> None:
    """Large latents have a ring of one row; a fork in mid-run still has the generator state of its own row."""
    row_by_row = Runtime(pipe, max_batch=4, memory=6, ring_bytes=0)
    assert (row_by_row.plan.ring_depth, runtime.plan.ring_depth) == (1, runtime.plan.rows)
    request = Request(prompt="a handwritten two", steps=5, seed=2, scheduler=scheduler)
    for own in (row_by_row, runtime):
        assert torch.equal(own.generate([request])[0].latents, runtime.generate([request])[0].latents)
        with own.session() as session:
            slot = session.add(own.prepare(request))
            states = []
            for _ in range(5):
                states.append(session.fork(slot))
                session.step()
            for state in states:
                finished = stages.denoise(own.family, state)
                torch.testing.assert_close(finished.prepared[1], session.fork(slot).prepared[1])


@pytest.mark.parametrize("scheduler", ["UniPCMultistep", "EulerAncestral"])
def test_a_fork_is_independent_and_runs_on_as_its_origin_does(
    session: Session, runtime: Runtime, scheduler: str
) -> None:
    origin = session.add(runtime.prepare(Request(prompt="a handwritten two", steps=5, seed=2, scheduler=scheduler)))
    for _ in range(2):
        session.step()
    forked = session.fork(origin)
    kept = forked.prepared[1].clone()
    whole = finish(session, origin)
    assert torch.equal(forked.prepared[1], kept)
    assert torch.equal(finish(session, session.add(forked)).prepared[1], whole.prepared[1])


@pytest.mark.parametrize("what", ["generator", "guidance_scale", "conditioning", "row", "latents"])
def test_a_session_keeps_nothing_of_the_callers_state(session: Session, runtime: Runtime, what: str) -> None:
    state = runtime.prepare(Request(prompt="a handwritten two", steps=5, seed=2, scheduler="EulerAncestral"))
    expected = stages.denoise(runtime.family, state).prepared[1]
    slot = session.add(state)
    session.step()
    if what == "generator":
        assert state.generator is not None
        torch.randn(5, generator=state.generator)
    elif what == "guidance_scale":
        state.guidance_scale = 9.0
    elif what == "row":
        state.row = 3
    else:
        for tensor in (state.prepared[1], *state.conditioning.values()):
            tensor.zero_()
    forked = session.fork(slot)
    for own in (finish(session, slot), stages.denoise(runtime.family, forked)):
        torch.testing.assert_close(own.prepared[1], expected)


@pytest.mark.parametrize("row", [-1, 5, 2.0])
def test_a_row_that_no_table_has_is_refused_and_stops_no_neighbour(
    session: Session, runtime: Runtime, row: Any
) -> None:
    state = runtime.prepare(Request(prompt="a handwritten two", steps=4))
    slot = session.add(state)
    with pytest.raises(ValueError, match=rf"row: expected 0 to 4, the rows of DDIMScheduler's table, got {row}"):
        session.add(replace(state, row=row))
    assert finish(session, slot).finished
    assert session.add(replace(state, row=4)) in session.step()  # finished as it came


def test_a_request_is_bitwise_the_same_whatever_runs_beside_it(session: Session, runtime: Runtime) -> None:
    """Same slot, same batch size; the neighbours' contents change, to NaN at the worst."""
    request = Request(prompt="a handwritten three", steps=5, seed=4, scheduler="DPMSolverMultistep")
    neighbour = runtime.prepare(Request(prompt="a handwritten eight", steps=5, seed=1, scheduler="Heun"))
    found = []
    for fill in (0.0, 1.0, float("nan")):
        other = neighbour.fork()
        other.latents = other.prepared[1] * fill
        slot, beside = session.add(runtime.prepare(request)), session.add(other)
        found.append(finish(session, slot).prepared[1])
        session.cancel(beside)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_slot_never_moves_and_holes_are_filled(session: Session, runtime: Runtime) -> None:
    states = [runtime.prepare(Request(prompt="x", steps=steps, seed=steps)) for steps in (6, 2, 6)]
    assert [session.add(state) for state in states] == [0, 1, 2]
    assert session.step() == []
    assert session.step() == [1]
    assert session.step() == [1]  # until it is taken
    assert session.take(1).row == 2
    assert session.add(states[1]) == 1
    assert session.free == 1
    session.cancel(0)
    assert session.add(states[0]) == 0


def test_sessions_refuse_misuse_in_one_line(session: Session, runtime: Runtime, tmp_path: Path) -> None:
    state = runtime.prepare(REQUEST)
    with pytest.raises(ValueError, match="expected a prepared state"):
        session.add(RequestState(request=REQUEST))
    with pytest.raises(TypeError, match=r"expected a RequestState, got Request; runtime.prepare\(request\) makes one"):
        session.add(REQUEST)  # type: ignore[arg-type]
    for _ in range(4):
        session.add(state)
    with pytest.raises(PlanMismatch, match="all 4 slots are taken"):
        session.add(state)
    with pytest.raises(ValueError, match=r"slot: expected one of \[0, 1, 2, 3\], got 9"):
        session.take(9)
    with pytest.raises(RuntimeError, match="has a session of this runtime open"):
        runtime.session()
    session.close()
    uses: list[Callable[[], Any]] = [session.step, lambda: session.free, lambda: session.add(state)]
    for use in uses:
        with pytest.raises(RuntimeError, match="session is closed"):
            use()
    runtime.session().close()


def test_a_session_is_of_the_thread_that_opened_it(session: Session, runtime: Runtime) -> None:
    state = runtime.prepare(REQUEST)
    slot = session.add(state)
    uses: list[Callable[[], Any]] = [session.step, lambda: session.add(state), lambda: session.take(slot)]
    with ThreadPoolExecutor(1) as elsewhere:
        for use in uses:
            with pytest.raises(RuntimeError, match="belongs to the thread that opened it: use it there"):
                elsewhere.submit(use).result()
    assert finish(session, slot).finished


def test_a_session_closes_in_its_own_thread_or_when_that_is_over(runtime: Runtime) -> None:
    """Closed in the midst of its step it would let the next one in, whose slots the step then writes over."""
    state = runtime.prepare(REQUEST)
    with runtime.session() as session:
        session.add(state)
        with ThreadPoolExecutor(1) as elsewhere:
            closing = elsewhere.submit(session.close)
        with pytest.raises(RuntimeError, match="belongs to the thread that opened it"):
            closing.result()
        assert session.step() == []
    with ThreadPoolExecutor(1) as elsewhere:
        left = elsewhere.submit(runtime.session).result()
    left.close()
    runtime.session().close()


def test_a_session_that_is_interrupted_as_it_closes_lets_the_next_one_in(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked: list[int] = []

    def interrupted(self: Slots, slot: int) -> None:
        parked.append(slot)
        if len(parked) == 2:
            raise KeyboardInterrupt
        own_park(self, slot)

    own_park = Slots.park
    monkeypatch.setattr(Slots, "park", interrupted)
    session = runtime.session()
    for _ in range(3):
        session.add(runtime.prepare(REQUEST))
    with pytest.raises(KeyboardInterrupt):
        session.close()
    runtime.session().close()
    assert parked == [0, 1, 0, 1, 2]


def test_hosts_that_cannot_be_ordered_by_an_event_are_waited_for() -> None:
    """Those that were dropped, with nothing in the slots even, and those whose thread ended before they closed."""
    turn = Turn(torch.device("cpu"))
    for left in (None, (), (1,)):
        turn.take()
        turn.give(left)
        assert turn._left == left
        turn._left = None


@pytest.mark.parametrize("where", ["drawn", "put"])
def test_noise_that_could_not_be_had_is_drawn_again(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Not taken for drawn: the step that raised is repeated, and nobody can tell from the image."""
    request = Request(prompt="a handwritten two", steps=5, seed=2, scheduler="EulerAncestral")
    expected = runtime.generate([request])[0].latents
    own, name = (session_module, "run_noise") if where == "drawn" else (Slots, "put_noise")
    rightly, calls = getattr(own, name), []

    def fails_at_first(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            if where == "drawn":
                torch.randn(5, generator=args[0])
            raise torch.OutOfMemoryError("none left for the noise")
        return rightly(*args)

    monkeypatch.setattr(own, name, fails_at_first)
    with runtime.session() as session:
        slot = session.add(runtime.prepare(request))
        with pytest.raises(torch.OutOfMemoryError):
            session.step()
        assert torch.equal(finish(session, slot).sample, expected)


def test_a_hosts_default_device_is_not_fastdiffs(pipe: Any, runtime: Runtime) -> None:
    """On which no generator of a request can draw; "meta" stands for any other."""
    request = Request(prompt="a handwritten two", steps=5, seed=2, scheduler="EulerAncestral")
    expected, state = runtime.generate([request])[0].latents, runtime.prepare(request)
    pack.cache_clear()
    fastdiff.table_cache.clear()
    with torch.device("meta"):
        assert fastdiff.renoise(pipe.scheduler, [900, 500]).A.device.type == "cpu"
        assert Runtime(pipe, max_batch=2).certificate is not None
        with runtime.session() as session:
            made = finish(session, session.add(state)).sample
    assert torch.equal(made, expected)


def test_a_session_that_is_dropped_open_warns_and_lets_the_next_one_in(runtime: Runtime) -> None:
    state = runtime.prepare(REQUEST)
    own = runtime.session()
    own.add(state)
    with pytest.warns(ResourceWarning, match="a session was dropped open: close it"):
        del own
    end = runtime.slots.batch(4).end
    assert end.any()
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(lambda: runtime.session().close()).result(timeout=60)
    assert not end.any()  # parked
    with runtime.session() as session:
        assert session.free == 4
        assert finish(session, session.add(state)).finished


def test_a_stale_model_stops_the_step_and_loses_no_request(pipe: Any) -> None:
    """Nothing is compiled for it: what a compiled step would have frozen is looked at before it."""
    runtime = Runtime(pipe, max_batch=2, mode="compiled", certify=False)
    state = runtime.prepare(Request(prompt="a handwritten four", steps=2))
    weight = pipe.unet.conv_in.weight
    try:
        with runtime.session() as session:
            slot = session.add(state)
            pipe.unet.conv_in.weight = torch.nn.Parameter(weight.detach().clone())
            for _ in range(2):
                with pytest.raises(StaleGraph, match=r"compiled step is stale: conv_in.*recapture\(\)"):
                    session.step()
            taken = session.take(slot)
    finally:
        pipe.unet.conv_in.weight = weight
    assert taken.row == 0
    assert torch.equal(taken.prepared[1], state.prepared[1])


def test_the_model_is_looked_at_once_for_each_step_after_an_addition(session: Session, runtime: Runtime) -> None:
    """Not in every row: it looks at every module. What `check` does when it is called, the tests of weights say."""
    looked: list[int] = []
    watched = Steps(runtime.family.denoisers, runtime.slots)
    watched.check = lambda: looked.append(len(looked))  # type: ignore[method-assign]
    session._steps = watched
    for _ in range(2):
        session.add(runtime.prepare(REQUEST))
    for _ in range(3):
        session.step()
    assert len(looked) == 1
    session.add(runtime.prepare(REQUEST))
    for _ in range(3):
        session.step()
    assert len(looked) == 2


def test_a_call_of_several_rows_ends_with_its_segment() -> None:
    """What a loop graph of four rows makes of a slot of ten rows, six of them in the first segment."""
    state, own = RequestState(request=None), table("EulerDiscreteScheduler")
    one = _Occupant(state, own, row=0, end=10, boundary=6, generator=None, drawn_from=0, drawn_to=0)
    rows = []
    while one.row < one.end:
        rows.append((one.segment, one.row))
        one.row = one.after(4)
    assert rows == [(0, 0), (0, 4), (1, 6)]
