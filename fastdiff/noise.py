"""Draws from a request's own generator, in diffusers' order, shape and dtype, so that a seed gives diffusers' image."""

from __future__ import annotations

import math
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


def run_noise(
    generator: torch.Generator,
    draws: Sequence[Sequence[Draw]],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The draws of several rows, [rows, Z, *shape] float32: bitwise those of `row_noise` row by row, zero where a row
    makes fewer than Z.

    On the CPU a generator fills a tensor sixteen numbers at a time, so latents of a multiple of sixteen can be drawn
    all at once, at a sixth of the cost of one by one.
    """
    dtypes = [own or dtype for row in draws for own in row]
    count, Z = len(dtypes), max(map(len, draws), default=0)
    if not count:
        return torch.zeros(len(draws), Z, *shape, dtype=torch.float32, device=device)
    if generator.device.type == "cpu" and math.prod(shape) % 16 == 0 and len(set(dtypes)) == 1:
        drawn = torch.randn(count, *shape, generator=generator, dtype=dtypes[0], device=generator.device)
    else:
        drawn = torch.stack([normal(generator, shape, own, generator.device).float() for own in dtypes])
    drawn = drawn.to(device, torch.float32)
    if count == len(draws) * Z:
        return drawn.view(len(draws), Z, *shape)
    noise, taken = torch.zeros(len(draws), Z, *shape, dtype=torch.float32, device=device), 0
    for row, own in enumerate(draws):
        noise[row, : len(own)] = drawn[taken : taken + len(own)]
        taken += len(own)
    return noise


def seeded(seed: int) -> torch.Generator:
    """The generator of a request: on the CPU, as diffusers recommends for results that no device changes."""
    return torch.Generator().manual_seed(seed)


def copy_generator(generator: torch.Generator) -> torch.Generator:
    """An independent generator in the same state."""
    copied = torch.Generator(generator.device)
    copied.set_state(generator.get_state())
    return copied
