"""How a model is called inside a step: a pure function of device tensors. Any callable of this form will do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Denoiser(Protocol):
    """The model and its guidance, for n slots at once; output sample i depends on input sample i alone."""

    def __call__(
        self, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor
    ) -> Tensor:
        """The guided model output [n, C, H, W].

        `sample` [n, C, H, W] in the plan's dtype, already scaled; `timestep` and `guidance` [n] float32;
        `conditioning`: [n, ...] per name, as the plan says. Must not write to its arguments.
        """
        ...


def guide(unconditional: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance in float32, Ho & Salimans 2022 (arXiv 2207.12598), per sample.

    `scale` [n]; where it is 1 the conditional output [n, C, H, W] passes unchanged, whatever the other one holds.
    """
    scale = scale.view(-1, *[1] * (conditional.ndim - 1))
    unconditional, conditional = unconditional.float(), conditional.float()
    return torch.where(scale == 1, conditional, unconditional + scale * (conditional - unconditional))


def rescale(guided: Tensor, conditional: Tensor, phi: Tensor) -> Tensor:
    """Guidance brought back towards the deviation of the conditional output, Lin et al. 2023 (arXiv 2305.08891, 3.4).

    `phi` [n], per sample; where it is 0 the guided output [n, C, H, W] float32 passes unchanged.
    """
    phi = phi.view(-1, *[1] * (guided.ndim - 1))
    dimensions = list(range(1, guided.ndim))
    ratio = conditional.float().std(dimensions, keepdim=True) / guided.std(dimensions, keepdim=True)
    return torch.where(phi == 0, guided, phi * (guided * ratio) + (1 - phi) * guided)


def paired(
    sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The inputs of one call at batch 2n: sample and timestep of each slot twice, [2n, ...] of [n, 2, ...] per name."""
    return (
        sample.repeat_interleave(2, dim=0),
        timestep.repeat_interleave(2),
        {name: tensor.flatten(0, 1) for name, tensor in conditioning.items()},
    )


def guide_pairs(output: Tensor, scale: Tensor) -> Tensor:
    """`guide` of one call at batch 2n: [n, ...] of [2n, ...]."""
    return guide(*unpaired(output), scale)


def unpaired(output: Tensor) -> tuple[Tensor, Tensor]:
    """The unconditional and the conditional output, [n, ...] each, of one call at batch 2n."""
    unconditional, conditional = output.unflatten(0, (-1, 2)).unbind(1)
    return unconditional, conditional
