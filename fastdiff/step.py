"""The one function that is run eagerly, compiled, recorded or captured."""

from __future__ import annotations

import torch

from fastdiff.denoiser import Denoiser
from fastdiff.slots import Batch


def denoise_step(denoiser: Denoiser, batch: Batch) -> None:
    """Advance every slot of `batch` by one row, in place. No host reads, no branches on data.

    Each slot applies its own row of its own table: x_in = c_in s[0]; phi = clamp(r . [s, m]);
    s' = [A | b | d | C] . [s, m, phi, eps]. Spent and idle slots are held.
    """
    n, K, P = batch.latents.shape
    terms = batch.layout.terms
    coefficients = batch.table[batch.slot, batch.row]  # [n, F], the only gather
    scalars, clip, weights = coefficients.split([batch.layout.scalars, K + 1, K * terms], dim=1)
    t, c_in, guidance, lo, hi = scalars.unbind(1)  # [n] each

    state = batch.latents  # [n, K, P]
    sample = (state[:, 0] * c_in[:, None]).to(batch.dtype).view(n, *batch.latent_shape)
    model_output = denoiser(sample, t, batch.conditioning, guidance).float().reshape(n, 1, P)

    latents = torch.cat([state, model_output], dim=1)  # [n, K + 1, P]
    phi = (clip[:, :, None] * latents).sum(1).clamp(lo[:, None], hi[:, None])  # [n, P]
    eps = batch.noise[batch.slot, batch.row % batch.noise.shape[1]]  # [n, Z, P]
    basis = torch.cat([latents, phi[:, None], eps], dim=1)  # [n, K + 2 + Z, P]
    advanced = (weights.view(n, K, terms, 1) * basis[:, None]).sum(2)  # [n, K, P]

    active = batch.row < batch.end  # [n]
    state.copy_(torch.where(active[:, None, None], advanced, state))  # never a product: 0 * nan is nan
    batch.row.add_(active)
