"""Trains the judge of the ``digits`` gate on real digits alone and writes its two files beside this script.

    python -m tests.digits.train_classifier

Split by index in MNIST: the classifier learns from training digits 0..59,999; the held-out digits are test
digits 0..999, which neither the classifier nor the pipeline ever sees.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.models.train_digits import fetch_digits
from tests.digits.classifier import HELD_OUT, WEIGHTS, DigitClassifier, read_digits, to_ink

EPOCHS = 4
BATCH = 128
PEAK_LEARNING_RATE = 3e-3
HELD_OUT_COUNT = 1000

LOG = logging.getLogger(__name__)


def jitter(ink: Tensor) -> Tensor:
    """Rotates by up to 10 degrees, scales by up to 10 % and shifts by up to two pixels."""
    count = len(ink)
    angle = (torch.rand(count) * 2 - 1) * 0.175
    scale = 1.0 + (torch.rand(count) * 2 - 1) * 0.1
    shift = (torch.rand(count, 2) * 2 - 1) * (2 / 16)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    affine = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], dim=1).view(count, 2, 3)
    grid = functional.affine_grid(affine, list(ink.shape), align_corners=False)
    return functional.grid_sample(ink, grid, align_corners=False)


def main() -> None:
    """Trains, writes both files and logs how many held-out digits are read right."""
    parser = argparse.ArgumentParser(description="Train the classifier of the digits gate.")
    parser.add_argument("--work", type=Path, default=Path("build/digits"), help="folder for the downloaded digits")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    training, test = fetch_digits(arguments.work)
    classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LEARNING_RATE)
    batches_per_epoch = len(training.labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=EPOCHS * batches_per_epoch
    )
    for _ in range(EPOCHS):
        shuffled = torch.randperm(len(training.labels))[: batches_per_epoch * BATCH]
        for chosen in shuffled.view(batches_per_epoch, BATCH):
            logits = classifier(jitter(to_ink(training.images[chosen])))
            loss = functional.cross_entropy(logits, training.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.eval()
    images, labels = test.images[:HELD_OUT_COUNT].contiguous(), test.labels[:HELD_OUT_COUNT]
    save_file(classifier.state_dict(), WEIGHTS)
    save_file({"images": images, "labels": labels.to(torch.uint8)}, HELD_OUT)
    right = int((read_digits(classifier, to_ink(images)) == labels).sum())
    LOG.info("%d of %d held-out digits read right", right, HELD_OUT_COUNT)


if __name__ == "__main__":
    main()
