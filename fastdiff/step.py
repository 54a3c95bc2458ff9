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
    n, K, P = batch.latents.shape
    layout = batch.layout
    coefficients = batch.table[batch.slot, batch.row][:, :, None, None]  # [n, F, 1, 1], the only gather of rows
    scalars, clip, weights = coefficients.split([layout.scalars, K + 1, K * layout.terms], dim=1)
    t, c_in, guidance, lo, hi = scalars.unbind(1)  # [n, 1, 1] each

    state = batch.latents  # [n, K, P]
    latents = state[:, :, None].unbind(1)  # K times [n, 1, P]
    sample = (latents[0] * c_in).to(batch.dtype).view(n, *batch.latent_shape)
    model_output = denoiser(sample, t.view(n), batch.conditioning, guidance.view(n)).float().reshape(n, 1, P)

    terms = [*latents, model_output]
    phi = weighted_sum(clip.unbind(1), terms).clamp(lo, hi)  # [n, 1, P]
    eps = batch.noise[batch.slot, batch.row % batch.noise.shape[1]]  # [n, Z, P]
    terms += [phi, *eps[:, :, None].unbind(1)]  # K + 2 + Z times [n, 1, P]
    advanced = weighted_sum(weights.view(n, K, layout.terms, 1).unbind(2), terms)  # [n, K, P]

    active = batch.row < batch.end  # [n]
    state.copy_(torch.where(active[:, None, None], advanced, state))  # never a product: 0 * nan is nan
    batch.row.add_(active)


def weighted_sum(weights: Sequence[Tensor], terms: Sequence[Tensor]) -> Tensor:
    """The sum of weight * term, one multiply-add each: stacked into one product it would need K times the memory."""
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = torch.addcmul(total, weight, term)
    return total
