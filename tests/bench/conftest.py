"""A pipeline small enough to run whole suites on, of random weights and the shipped model's kind."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def run(command: ModuleType, *arguments: str) -> int:
    """A command of `python -m fastdiff.bench`, without the command line around it: its exit code."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    code: int = command.main(parser.parse_args(arguments))
    return code


@pytest.fixture(scope="session")
def tiny_pipe() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from fastdiff.models.train_digits import build_autoencoder, build_text_encoder, build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=text_encoder.config.hidden_size,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae=build_autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (unet, pipe.vae, text_encoder):
        part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipe.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """Commands set torch's threads, also those that then refuse; with another number other tests have other bits."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
