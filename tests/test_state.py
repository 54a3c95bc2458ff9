"""A request between two rows: forked, restarted, saved and loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastdiff.noise import normal
from fastdiff.state import RequestState
from tests.conftest import LATENT_SHAPE, random_state, table


def advanced_state() -> RequestState:
    state = random_state(table("UniPCMultistepScheduler"), 3)
    own, latents = state.prepared
    for row in range(2):
        latents = own.advance(row, latents, torch.sin(latents[0]))
    return replace(state, latents=latents, row=2, conditioning={"text": torch.arange(6.0).bfloat16().view(2, 3)})


def test_a_fork_shares_the_table_and_nothing_else() -> None:
    state = advanced_state()
    forked = state.fork()
    assert forked.table is state.table
    before = state.prepared[1].clone()
    forked.prepared[1].zero_()
    forked.conditioning["text"].zero_()
    assert forked.generator is not None
    assert state.generator is not None
    normal(forked.generator, (3,), torch.float32, torch.device("cpu"))
    assert torch.equal(state.prepared[1], before)
    assert state.conditioning["text"].any()
    assert not torch.equal(forked.generator.get_state(), state.generator.get_state())


def test_a_restart_is_row_zero_with_cleared_memory_and_the_same_table() -> None:
    """A causal pipeline restarts per chunk (a finding of the review of SGLang's PR #23716)."""
    state = advanced_state()
    own = state.prepared[0]
    sample = torch.randn(LATENT_SHAPE)
    chunk = state.restart(sample)
    assert (chunk.row, chunk.table is own) == (0, True)
    assert torch.equal(chunk.prepared[1], own.init(sample * own.init_noise_sigma))
    assert not chunk.prepared[1][1:].any()
    assert state.row == 2
    assert state.prepared[1][1:].any()


def test_a_restart_without_a_sample_draws_the_next_one_from_the_requests_generator() -> None:
    state = advanced_state()
    twin = state.fork()
    assert twin.generator is not None
    expected = normal(twin.generator, LATENT_SHAPE, torch.float32, torch.device("cpu"))
    own = state.prepared[0]
    assert torch.equal(state.restart().prepared[1][0], expected * own.init_noise_sigma)
    with pytest.raises(ValueError, match="without a generator"):
        replace(state, generator=None).restart()


def test_a_restart_refuses_a_sample_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"sample: expected shape \(2, 3, 5\), .*got \(3, 3\); bring it into"):
        advanced_state().restart(torch.zeros(3, 3))


def test_save_and_load_give_the_same_state(tmp_path: Path) -> None:
    state = replace(advanced_state(), guidance_scale=4.5, dtype=torch.bfloat16)
    state.save(tmp_path / "state.safetensors")
    loaded = RequestState.load(tmp_path / "state.safetensors")
    assert loaded.table == state.table
    assert torch.equal(loaded.prepared[1], state.prepared[1])
    assert torch.equal(loaded.conditioning["text"], state.conditioning["text"])
    assert loaded.conditioning["text"].dtype == torch.bfloat16
    assert loaded.generator is not None
    assert state.generator is not None
    assert torch.equal(loaded.generator.get_state(), state.generator.get_state())
    assert (loaded.row, loaded.guidance_scale, loaded.dtype) == (2, 4.5, torch.bfloat16)


def test_a_file_is_a_few_kilobytes_plus_latents(tmp_path: Path) -> None:
    state = random_state(table("EulerDiscreteScheduler", 20), 0)
    state.save(tmp_path / "state.safetensors")
    assert (tmp_path / "state.safetensors").stat().st_size < 16_384


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "folder"])
def test_what_is_no_whole_file_is_refused_with_its_path(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state.safetensors"
    if kind == "folder":
        path.mkdir()
    else:
        advanced_state().save(path)
        path.write_bytes({"cut": path.read_bytes()[:-9], "empty": b"", "text": b"a handwritten seven"}[kind])
    with pytest.raises(
        ValueError, match=rf"^{path}: expected a file that RequestState.save wrote, got another or a cut"
    ):
        RequestState.load(path)


@pytest.mark.parametrize("missing", ["latents", "row", "dtype", "generator", "short generator", "init_noise_sigma"])
def test_a_file_that_lacks_a_part_is_refused_with_its_path(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "state.safetensors"
    replace(advanced_state(), generator=torch.Generator()).save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fields = json.loads(metadata["fields"])
    if missing == "short generator":
        tensors["generator"] = tensors["generator"][:100]
    elif missing == "dtype":
        fields["dtype"] = "save"
    elif missing in fields:
        del fields[missing]
    else:
        del (tensors if missing in tensors else metadata)[missing]
    save_file(tensors, path, metadata | {"fields": json.dumps(fields)})
    with pytest.raises(ValueError, match=rf"^{path}: expected all that RequestState.save writes, got "):
        RequestState.load(path)


def test_a_file_that_is_not_there_is_not_called_another_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors"):
        RequestState.load(tmp_path / "state.safetensors")


def test_another_kind_of_file_is_refused_in_one_line(tmp_path: Path) -> None:
    table("EulerDiscreteScheduler").save(tmp_path / "table.safetensors")
    with pytest.raises(ValueError, match="expected a RequestState of format version 1, got another kind of file"):
        RequestState.load(tmp_path / "table.safetensors")


def test_an_unprepared_state_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Runtime\.prepare"):
        RequestState(request=None).save(tmp_path / "state.safetensors")
