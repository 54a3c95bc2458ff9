"""Bytes and counts on planted tensors, exactly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastdiff.bench.rows import RowBench, counts, memory
from fastdiff.bench.suite import CountCase, MemoryCase
from fastdiff.bench.vram import CountingDevice, live_tensors, reachable_tensors, storage_bytes
from fastdiff.emulated import on_host


def test_every_tensor_is_found_once_however_deep() -> None:
    planted = [torch.zeros(3), torch.zeros(5), torch.zeros(7)]
    inner = SimpleNamespace(buffers={"a": [planted[0], None, (planted[1],)]}, name="x", steps=3)
    holder = SimpleNamespace(inner=inner, again=inner, last=planted[2])
    inner.back = holder  # a cycle
    assert {id(one) for one in reachable_tensors(holder)} == {id(one) for one in planted}
    assert storage_bytes(reachable_tensors(holder)) == 4 * (3 + 5 + 7)


def test_views_share_their_storage() -> None:
    whole = torch.zeros(10, 4)
    assert storage_bytes([whole[0], whole[5:], whole]) == 160
    assert storage_bytes([whole[0]]) == 160  # one view keeps all of it alive


def test_live_tensors_are_those_that_python_holds_on_the_device() -> None:
    before = storage_bytes(live_tensors(torch.device("cpu")))
    held, elsewhere = torch.zeros(1000), torch.zeros(1000, device="meta")
    holder = [held[10:]]
    holder.append(torch.zeros(500))
    assert storage_bytes(live_tensors(torch.device("cpu"))) == before + 4000 + 2000
    assert any(one is elsewhere for one in live_tensors(torch.device("meta")))
    del held, holder[:]
    assert storage_bytes(live_tensors(torch.device("cpu"))) == before


def test_what_comes_of_a_device_tensor_is_on_the_device() -> None:
    device = CountingDevice()
    latent, host = device.put(torch.ones(4)), torch.ones(4)
    with device:
        derived, other = (latent * 2)[1:], host * 2
    assert not on_host(derived)
    assert on_host(other)
    assert device.operations == 2  # the slice is a view
    assert device.syncs == 0


def test_host_reads_of_device_tensors_are_syncs() -> None:
    device = CountingDevice()
    timestep, alphas = device.put(torch.tensor(3)), torch.arange(10.0)
    with device:
        alpha = alphas[timestep]  # indexing a host tensor by a device one
        bool(timestep >= 0)
        (torch.arange(5) == timestep).nonzero()
        torch.linalg.solve(torch.eye(2, device=timestep.device), torch.ones(2, device=timestep.device))  # checks itself
        alphas.sum().item()  # a host tensor costs nothing
    assert device.syncs == 4
    assert on_host(alpha)


def test_the_peak_counts_what_was_alive_at_once() -> None:
    device = CountingDevice()
    latent = device.put(torch.ones(100))
    with device:
        first = latent * 2
        second = first + latent
        del first
        latent = second * 3
        del second
    assert device.peak_bytes == 3 * 400


@pytest.fixture(scope="module")
def row_bench(tiny_pipe: object) -> RowBench:
    from fastdiff.bench.arms import Workbench

    return RowBench(Workbench(tiny_pipe), seed=0)


LATENT = (4, 6, 5)
LATENT_BYTES = 4 * 4 * 6 * 5


@pytest.mark.parametrize(
    ("sampler", "history"), [("Euler", 0), ("DPMSolverMultistep", 2), ("UniPCMultistep", 3), ("PNDM", 4)]
)
def test_a_shared_template_keeps_its_history_and_a_clone_takes_it_along(
    row_bench: RowBench, sampler: str, history: int
) -> None:
    case = MemoryCase(name="planted", latent_shape=LATENT, samplers=(sampler,), steps=6)
    entries = {one["ownership"]: one for one in memory(row_bench, case)}
    for ownership in ("shared", "cloned-deepcopy", "cloned-shallow"):
        entry = entries[ownership]
        assert entry["before_bytes"] == 0
        timesteps_bytes = entry["during_bytes"] - history * LATENT_BYTES
        assert 0 < timesteps_bytes <= 8 * 8  # at most eight of at most eight bytes: no latent hides in there
        assert entry["after_bytes"] == (entry["during_bytes"] if ownership == "shared" else 0)


def test_a_slot_is_its_rows_and_latents_before_and_after(row_bench: RowBench) -> None:
    case = MemoryCase(name="planted", latent_shape=LATENT, samplers=("UniPCMultistep",), steps=6)
    slot = next(one for one in memory(row_bench, case) if one["ownership"] == "tensorized")
    assert slot["before_bytes"] == slot["during_bytes"] == slot["after_bytes"]
    memory_of_table = 4
    rows_bytes = slot["before_bytes"] - memory_of_table * LATENT_BYTES
    assert 0 < rows_bytes < 2048


def test_a_tensorized_row_never_syncs_and_costs_the_same_for_all(row_bench: RowBench) -> None:
    case = CountCase(
        mixes=(("Euler",), ("PNDM",), ("DDIM", "UniPCMultistep", "EulerAncestral")), steps=4, latent_shape=LATENT
    )
    counted = list(counts(row_bench, case))
    assert {syncs for one in counted for syncs in one["fastdiff"]["syncs"]} == {0}
    assert len({operations for one in counted for operations in one["fastdiff"]["operations"]}) == 1
    by_case = {(tuple(one["samplers"]), one["batch"]): one["diffusers"] for one in counted}
    alone, eight = by_case[("PNDM",), 1], by_case[("PNDM",), 8]
    assert sum(alone["syncs"]) > 0
    assert eight["operations"] == [8 * operations for operations in alone["operations"]]
