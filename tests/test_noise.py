"""Draws in diffusers' order, shape and dtype."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from fastdiff.noise import copy_generator, normal, row_noise, run_noise, seeded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_draw_is_diffusers_own(dtype: torch.dtype) -> None:
    ours, theirs = seeded(7), seeded(7)
    for _ in range(3):
        drawn = normal(ours, (4, 3, 2), dtype, torch.device("cpu"))
        assert torch.equal(drawn, randn_tensor((1, 4, 3, 2), generator=theirs, dtype=dtype)[0])


def test_a_draw_with_a_dtype_of_its_own_keeps_it() -> None:
    ours, theirs = seeded(0), seeded(0)
    drawn = row_noise(ours, (None, torch.float32), (2, 2), torch.bfloat16, torch.device("cpu"))
    assert [eps.dtype for eps in drawn] == [torch.bfloat16, torch.float32]
    assert torch.equal(drawn[0], torch.randn(1, 2, 2, generator=theirs, dtype=torch.bfloat16)[0])
    assert torch.equal(drawn[1], torch.randn(1, 2, 2, generator=theirs)[0])


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 64, 64), (16,), (3, 5, 5), (2, 4), (1, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "draws",
    [
        [(None,)] * 5,
        [(None,), (), (None,)],
        [(None, torch.float32), (None,)],
        [(torch.float32, None)] * 2,
        [(), ()],
        [],
    ],
)
def test_a_run_drawn_at_once_is_bitwise_the_rows_drawn_one_by_one(
    shape: tuple[int, ...], dtype: torch.dtype, draws: list[tuple[torch.dtype | None, ...]]
) -> None:
    ours, theirs, cpu = seeded(3), seeded(3), torch.device("cpu")
    for generator in (ours, theirs):
        torch.randn(5, generator=generator)  # an odd position in the stream
    noise = run_noise(ours, draws, shape, dtype, cpu)
    for row, own in enumerate(draws):
        drawn = row_noise(theirs, own, shape, dtype, cpu)
        for index, eps in enumerate(drawn):
            assert torch.equal(noise[row, index], eps.float())
        assert not noise[row, len(drawn) :].any()
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_a_copied_generator_goes_its_own_way() -> None:
    generator = seeded(5)
    copied = copy_generator(generator)
    first = torch.randn(3, generator=generator)
    assert torch.equal(torch.randn(3, generator=copied), first)
