"""A small classifier of handwritten digits: the judge of the digits that the ``digits`` pipeline draws."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "classifier.safetensors"
HELD_OUT = FOLDER / "held_out.safetensors"


class DigitClassifier(nn.Module):
    """Three convolutions and a linear layer: ink float32 [batch, 1, 32, 32] in 0..1 to logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(64 * 4 * 4, 10)

    def forward(self, ink: Tensor) -> Tensor:
        """Returns the logits of the ten digits."""
        logits: Tensor = self.head(self.features(ink).flatten(1))
        return logits


def to_ink(digits: Tensor) -> Tensor:
    """Turns uint8 digits [count, 28, 28] into ink float32 [count, 1, 32, 32] in 0..1."""
    return functional.pad(digits, (2, 2, 2, 2)).unsqueeze(1).float() / 255.0


def load_classifier() -> DigitClassifier:
    """Returns the trained classifier, ready to read."""
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(WEIGHTS))
    return classifier.eval()


def load_held_out() -> tuple[Tensor, Tensor]:
    """Returns the 1,000 real digits no training has seen: ink [1000, 1, 32, 32] in 0..1 and labels [1000]."""
    stored = load_file(HELD_OUT)
    return to_ink(stored["images"]), stored["labels"].long()


@torch.no_grad()
def read_digits(classifier: DigitClassifier, ink: Tensor) -> Tensor:
    """Reads ink [count, 1, 32, 32] and returns the digits int64 [count]."""
    digits: Tensor = classifier(ink).argmax(dim=1)
    return digits
