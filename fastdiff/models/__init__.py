"""Models that come with fastdiff, for its tests, examples and first runs.

`digits` is a trained Stable Diffusion pipeline of 1.8 M parameters that draws 32x32 handwritten digits from prompts
such as "a handwritten seven". Its folder is data alone; `train_digits` is the script that made it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["DIGITS_FOLDER", "digits"]

DIGITS_FOLDER = Path(__file__).parent / "digits"


def digits() -> StableDiffusionPipeline:
    """The `digits` pipeline, freshly loaded on the CPU in float32, its progress bar off."""
    from diffusers import StableDiffusionPipeline

    # `low_cpu_mem_usage` needs accelerate, which so small a pipeline has no use for.
    pipeline: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
        DIGITS_FOLDER, local_files_only=True, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
