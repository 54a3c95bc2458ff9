"""Everything mutable of one request. It can be forked, restarted, saved, moved to another process and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.noise import copy_generator, normal
from fastdiff.request import Request
from fastdiff.table import StepTable, read_tensors

FORMAT_VERSION = "1"
Noise = Callable[[Callable[[tuple[int, ...]], Tensor]], Tensor]  # a first latent, from draws of any shape


@dataclass(eq=False, kw_only=True)
class RequestState:
    """A request between two rows. Stages fill it in from top to bottom; `Slots` holds a copy while it is denoised."""

    request: Request | None  # None after load: a file carries what is left to do, not what was asked
    guidance_scale: float = 1.0
    guidance_scale_2: float | None = None  # of the rows of the second segment; None: the same
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)  # one slot's tensors by name
    table: StepTable | None = None
    generator: torch.Generator | None = None  # in the state that it has before `row` draws
    latents: Tensor | None = None  # [K, C, H, W] float32: the sample, then the sampler's memory
    row: int = 0
    dtype: torch.dtype = torch.float32  # of noise draws and of the returned sample, as the pipeline has them
    image: Tensor | None = None  # [C, H, W] float32 in [0, 1], on the CPU

    @property
    def finished(self) -> bool:
        """Whether every row has run."""
        return self.row >= len(self.prepared[0])

    @property
    def sample(self) -> Tensor:
        """The sample [C, H, W] in the pipeline's dtype."""
        return self.prepared[1][0].to(self.dtype)

    @property
    def prepared(self) -> tuple[StepTable, Tensor]:
        """The table and the latents [K, C, H, W], which a state has once the schedule and latents stages have run."""
        if self.table is None or self.latents is None:
            raise ValueError("expected a prepared state, got one without table or latents; see Runtime.prepare")
        return self.table, self.latents

    def fork(self) -> RequestState:
        """An independent copy: same table object, tensors and generator of its own."""
        return replace(
            self,
            conditioning={name: tensor.clone() for name, tensor in self.conditioning.items()},
            generator=None if self.generator is None else copy_generator(self.generator),
            latents=None if self.latents is None else self.latents.clone(),
        )

    def restart(self, sample: Tensor | None = None, *, noise: Noise | None = None) -> RequestState:
        """This request at row 0 again with cleared memory and the same table: the next chunk of a causal pipeline.

        `sample` [C, H, W] is standard normal; None draws it from the request's generator, which moves on. `noise` is
        the family's own (`runtime.family.noise`): packed latents, which diffusers draws as images, need it.
        """
        table, latents = self.prepared
        if sample is None:
            generator = self.generator
            if generator is None:
                raise ValueError("a state without a generator cannot draw its next sample: pass one to restart()")
            if noise is None and latents.ndim == 3:
                raise ValueError("packed latents are drawn as images: pass restart() noise=runtime.family.noise")
            draw = partial(normal, generator, dtype=self.dtype, device=latents.device)
            sample = draw(latents.shape[1:]) if noise is None else noise(draw)
        if sample.shape != latents.shape[1:]:
            raise ValueError(
                f"sample: expected shape {tuple(latents.shape[1:])}, as this request's latents have it, "
                f"got {tuple(sample.shape)}; bring it into that shape, or leave it out to draw one"
            )
        return replace(self, latents=table.init(sample * table.init_noise_sigma), row=0, image=None)

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, from which `load` resumes in any process.

        Bitwise where it goes on in the same slot at the same batch size: kernels of another size, at which an eager
        runtime runs with other neighbours, may round the last bits differently.
        """
        table, latents = self.prepared
        tensors, metadata = table.to_tensors()
        tensors = {f"table.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {f"conditioning.{name}": tensor.contiguous() for name, tensor in self.conditioning.items()}
        tensors["latents"] = latents.contiguous()
        if self.generator is not None:
            tensors["generator"] = self.generator.get_state()
        fields = {"row": self.row, "guidance_scale": self.guidance_scale, "dtype": str(self.dtype)[6:]}
        fields["guidance_scale_2"] = self.guidance_scale_2
        fields["generator"] = self.generator.device.type if self.generator else None
        save_file(tensors, path, metadata | {"fastdiff.RequestState": FORMAT_VERSION, "fields": json.dumps(fields)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> RequestState:
        """Read a state that `save` wrote; any other file is a ValueError."""
        tensors, metadata = read_tensors(path, "RequestState.save")
        found = metadata.get("fastdiff.RequestState")
        if found != FORMAT_VERSION:
            raise ValueError(
                f"{path}: expected a RequestState of format version {FORMAT_VERSION}, "
                f"got {found or 'another kind of file'}"
            )
        try:
            return cls._of(tensors, metadata, device)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # a part is missing, or is something else
            raise ValueError(
                f"{path}: expected all that RequestState.save writes, got {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], metadata: dict[str, str], device: torch.device | str) -> RequestState:
        fields, generator = json.loads(metadata["fields"]), None
        if "generator" in tensors:
            generator = torch.Generator(fields["generator"])
            generator.set_state(tensors["generator"])
        return cls(
            request=None,
            guidance_scale=fields["guidance_scale"],
            guidance_scale_2=fields.get("guidance_scale_2"),
            conditioning={name: tensor.to(device) for name, tensor in _under("conditioning.", tensors).items()},
            table=StepTable.from_tensors(_under("table.", tensors), metadata),
            generator=generator,
            latents=tensors["latents"].to(device),
            row=fields["row"],
            dtype=torch.empty(0, dtype=getattr(torch, fields["dtype"])).dtype,  # TypeError for another name of torch's
        )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
