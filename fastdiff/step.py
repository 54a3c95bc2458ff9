"""The one function that is run eagerly, compiled, recorded or captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdiff.denoiser import Denoiser
from fastdiff.slots import Batch, Row


def update(batch: Batch, row: Row, model_output: Tensor) -> None:
    """The next latents of every slot from the model's output, in place, and on to the next row.

    phi = clamp(r . [s, m]); s' = [A | b | d | C] . [s, m, phi, eps]. Spent and idle slots are held.
    """
    n, _, P = batch.planes[0].shape
    latents = batch.latents()  # K times [n, 1, P]
    model_output = model_output.float().reshape(n, 1, P)
    phi = weighted_sum(row.clip, (*latents, model_output)).clamp(row.lo, row.hi)  # [n, 1, P]
    eps = batch.noise[batch.slot, batch.row % batch.noise.shape[1]]  # [n, Z, P]
    terms = (*latents, model_output, phi, *eps[:, :, None].unbind(1))

    active = batch.row < batch.end
    if batch.begin is not None:
        active = active & (batch.row >= batch.begin)
    advances = active[:, None, None]
    advanced = [
        torch.where(advances, weighted_sum(weights, terms), plane)  # never a product: 0 * nan is nan
        for weights, plane in zip(row.weights, batch.planes, strict=True)
    ]
    for plane, latent in zip(batch.planes, advanced, strict=True):
        plane.copy_(latent)
    batch.row.add_(active)


def denoise_step(denoiser: Denoiser, batch: Batch, update: Callable[[Batch, Row, Tensor], None] = update) -> None:
    """Advance every slot of `batch` by one row, in place. No host reads, no branches on data.

    Each slot applies its own row of its own table; x_in = c_in s[0] is what the model sees.
    """
    row = batch.current()
    sample = (batch.latents()[0] * row.c_in).to(batch.dtype).view(len(batch.slot), *batch.latent_shape)
    update(batch, row, denoiser(sample, row.t, batch.conditioning, row.guidance))


def weighted_sum(weights: Sequence[Tensor], terms: Sequence[Tensor]) -> Tensor:
    """The sum of weight * term, one multiply-add each: stacked into one product it would need K times the memory."""
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = torch.addcmul(total, weight, term)
    return total
