"""Train the demo's network and write its weights: `python -m examples.digits.train`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from .network import WEIGHTS, DigitsNet, load_digits_split

_BATCH = 64
_PEAK_LEARNING_RATE = 1e-2
_LABEL_SMOOTHING = 0.05
_TURN, _ZOOM, _SHIFT = 0.2, 0.1, 0.12  # radians, relative, share of half the image


def jitter(images: Tensor) -> Tensor:
    """Rotate, zoom and shift each of `images` [N, 1, H, W] by small random amounts. Pads with border pixels."""
    count = len(images)
    turn = torch.empty(count).uniform_(-_TURN, _TURN)
    zoom = torch.empty(count).uniform_(1 - _ZOOM, 1 + _ZOOM)
    shift = torch.empty(count, 2, 1).uniform_(-_SHIFT, _SHIFT)
    cosine, sine = zoom * turn.cos(), zoom * turn.sin()
    rotation = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)  # [N, 2, 2]
    grid = F.affine_grid(torch.cat([rotation, shift], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of `images` [N, 1, 32, 32] whose top-1 class equals the label in `labels` [N]."""
    network.eval()
    logits: Tensor = network(images)
    return (logits.argmax(1) == labels).float().mean().item()


def train(epochs: int, seed: int) -> DigitsNet:
    """Train on the training split, and return the network in eval mode. Does not use the test split."""
    torch.manual_seed(seed)
    split = load_digits_split()
    network = DigitsNet()
    steps = -(-len(split.train_images) // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_PEAK_LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, epochs * steps)
    for _ in track(range(epochs), description="training"):
        network.train()
        for batch in torch.split(torch.randperm(len(split.train_images)), _BATCH):
            logits = network(jitter(split.train_images[batch]))
            loss = F.cross_entropy(logits, split.train_labels[batch], label_smoothing=_LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network.eval()


def main() -> None:
    """Train the network, print its accuracy on both splits, and save its weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()

    torch.set_num_threads(1)
    network = train(options.epochs, options.seed)
    split = load_digits_split()
    print(f"train {100 * accuracy(network, split.train_images, split.train_labels):.2f} %")
    print(f"test  {100 * accuracy(network, split.test_images, split.test_labels):.2f} %")
    torch.save(network.state_dict(), options.out)
    print(f"wrote {options.out}, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
