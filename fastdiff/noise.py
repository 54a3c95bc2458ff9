"""Draws from a request's own generator, in diffusers' order, shape and dtype, so that a seed gives diffusers' image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.table import Draw


def normal(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One standard normal latent of `shape`, drawn on the generator's device (diffusers' `randn_tensor`)."""
    return torch.randn((1, *shape), generator=generator, dtype=dtype, device=generator.device)[0].to(device)


def row_noise(
    generator: torch.Generator,
    draws: Sequence[Draw],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """The draws of one row, in order; a draw without a dtype of its own takes the model output's, `dtype`.

    A draw that weighs nothing is made all the same: it moves the generator on.
    """
    return [normal(generator, shape, own or dtype, device) for own in draws]


def seeded(seed: int) -> torch.Generator:
    """The generator of a request: on the CPU, as diffusers recommends for results that no device changes."""
    return torch.Generator().manual_seed(seed)


def copy_generator(generator: torch.Generator) -> torch.Generator:
    """An independent generator in the same state."""
    copied = torch.Generator(generator.device)
    copied.set_state(generator.get_state())
    return copied
