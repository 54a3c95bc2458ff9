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
    coefficients = batch.table[batch.slot, batch.row]  # [n, F], the only gather
    scalars, clip, weights = coefficients.split([layout.scalars, K + 1, K * layout.terms], dim=1)
    t, c_in, guidance, lo, hi = scalars.unbind(1)  # [n] each

    state = batch.latents  # [n, K, P]
    sample = (state[:, 0] * c_in[:, None]).to(batch.dtype).view(n, *batch.latent_shape)
    model_output = denoiser(sample, t, batch.conditioning, guidance).float().reshape(n, P)

    terms = [*state.unbind(1), model_output]  # K + 1 times [n, P]
    phi = weighted_sum(clip[:, :, None].unbind(1), terms).clamp(lo[:, None], hi[:, None])  # [n, P]
    eps = batch.noise[batch.slot, batch.row % batch.noise.shape[1]]  # [n, Z, P]
    terms = [term[:, None] for term in (*terms, phi, *eps.unbind(1))]  # K + 2 + Z times [n, 1, P]
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
