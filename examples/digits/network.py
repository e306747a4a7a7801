"""The demo's network and its data: scikit-learn's handwritten digits, 1797 grey images of 8x8 pixels in 10 classes.

The images are upscaled to 32x32, so that the network can have the usual layers: a strided stem, depthwise convolutions,
residual additions, both kinds of pooling and a classifier, all with batch norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

CLASSES = 10
IMAGE_SHAPE = (1, 32, 32)
TEST_IMAGES = 500
WEIGHTS = Path(__file__).with_name("digits.pt")

_SPLIT_SEED = 0
_BRIGHTEST = 16.0  # scikit-learn's digits count the set pixels of a 4x4 block: 0..16


class Residual(nn.Module):
    """Inverted bottleneck: expand 1x1, depthwise 3x3, project 1x1, residual addition. Keeps the shape NCHW."""

    def __init__(self, channels: int, *, expansion: int = 2) -> None:
        super().__init__()
        wide = channels * expansion
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the bottleneck's output to `x` [N, C, H, W]."""
        narrow: Tensor = self.body(x)
        return x + narrow


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """Depthwise 3x3, then 1x1 from `inputs` to `outputs` channels, each with batch norm and ReLU; keeps H and W."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class DigitsNet(nn.Module):
    """Images [N, 1, 32, 32] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )  # [N, 16, 16, 16]
        self.stage1 = nn.Sequential(Residual(16), nn.MaxPool2d(2), separable(16, 32))  # [N, 32, 8, 8]
        self.stage2 = nn.Sequential(Residual(32), nn.AvgPool2d(2), separable(32, 64))  # [N, 64, 4, 4]
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, 10] of `x` [N, 1, 32, 32]."""
        x = self.stage2(self.stage1(self.stem(x)))
        logits: Tensor = self.classifier(self.pool(x).flatten(1))
        return logits


def load_network(path: Path = WEIGHTS) -> DigitsNet:
    """Return the trained network in eval mode."""
    network = DigitsNet()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


@dataclass(frozen=True)
class DigitsSplit:
    """Images [N, 1, 32, 32], float32 in -1..1, with their labels [N], int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits_split() -> DigitsSplit:
    """Return a fixed split into 1297 training and 500 test images, with equal proportions of the classes."""
    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)
    images = F.interpolate(small, size=IMAGE_SHAPE[1:], mode="bilinear", align_corners=False) / (_BRIGHTEST / 2) - 1
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=_SPLIT_SEED)
    targets = torch.from_numpy(labels).long()
    return DigitsSplit(images[train], targets[train], images[test], targets[test])


def calibration_images() -> Tensor:
    """Return 128 training images [128, 1, 32, 32], as data of the command line."""
    return load_digits_split().train_images[:128]


def labelled_images() -> list[tuple[Tensor, int]]:
    """Return the test images [1, 1, 32, 32] with their classes, as data of the command line."""
    split = load_digits_split()
    return list(zip(torch.split(split.test_images, 1), split.test_labels.tolist(), strict=True))
