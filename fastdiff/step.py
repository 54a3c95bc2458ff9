"""The one function that is run eagerly, compiled, recorded or captured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.denoiser import Denoiser
from fastdiff.slots import Batch


def denoise_step(denoiser: Denoiser, batch: Batch) -> None:
    """Advance every slot of `batch` by one row, in place. No host reads, no branches on data.

    Each slot applies its own row of its own table: x_in = c_in s[0]; phi = clamp(r . [s, m]);
    s' = [A | b | d | C] . [s, m, phi, eps]. Spent and idle slots are held.
    """
    n, _, P = batch.latents.shape
    row = batch.current()

    latents = batch.terms()  # K times [n, 1, P]
    sample = (latents[0] * row.c_in).to(batch.dtype).view(n, *batch.latent_shape)
    model_output = denoiser(sample, row.t, batch.conditioning, row.guidance).float().reshape(n, 1, P)

    phi = weighted_sum(row.clip, (*latents, model_output)).clamp(row.lo, row.hi)  # [n, 1, P]
    eps = batch.noise[batch.slot, batch.row % batch.noise.shape[1]]  # [n, Z, P]
    advanced = weighted_sum(row.weights, (*latents, model_output, phi, *eps[:, :, None].unbind(1)))  # [n, K, P]

    active = (batch.row < batch.end)[:, None, None]
    batch.latents.copy_(torch.where(active, advanced, batch.latents))  # never a product: 0 * nan is nan
    batch.row.add_(active.view(n))


def weighted_sum(weights: Sequence[Tensor], terms: Sequence[Tensor]) -> Tensor:
    """The sum of weight * term, one multiply-add each: stacked into one product it would need K times the memory."""
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = torch.addcmul(total, weight, term)
    return total
