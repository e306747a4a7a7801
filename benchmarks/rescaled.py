"""Trained networks with rescaled channels, which per-tensor int8 cannot represent: `python -m benchmarks.rescaled`.

Each network is trained on scikit-learn's digits on first use, in less than a minute on one core. Then each scalable
channel is multiplied by a random factor between 1e-3 and 1e3, and the weights that read it are divided by the factor.
The float logits change only by rounding, which `build` checks on all test images. With one scale per tensor, most
channels have no code except zero. A quantizer that equalizes the channels loses no accuracy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from examples.digits.network import DigitsSplit, load_digits_split
from examples.digits.train import accuracy, jitter
from torch import Tensor

from .networks import Network, Sample
from .zoo.rescalable import Classifier, efficientnet_lite, mobilenet_v3, se_resnet

__all__ = ["RESCALED", "Rescaled", "digits", "rescaled", "trained"]

EPOCHS = 20
BATCH = 64
PEAK_LEARNING_RATE = 1e-2
TRAINING_SEED, RESCALING_SEED = 0, 1
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-3, 1e3
# Largest change of a logit, relative to the largest logit. float32 rounds to 6e-8, and rounding errors accumulate.
TOLERANCE = 1e-4
CALIBRATION_IMAGES = 200


@cache
def digits() -> DigitsSplit:
    """The split of the digits demo, its images halved to [N, 1, 16, 16]."""
    split = load_digits_split()
    small = F.avg_pool2d(split.train_images, 2), F.avg_pool2d(split.test_images, 2)
    return DigitsSplit(small[0], split.train_labels, small[1], split.test_labels)


def trained(make: Callable[[], Classifier], epochs: int = EPOCHS) -> Classifier:
    """Train on the training split, fold the batch norms, and return the network in eval mode."""
    split = digits()
    with torch.random.fork_rng():
        torch.manual_seed(TRAINING_SEED)
        network = make().train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=1e-2)
        steps = epochs * math.ceil(len(split.train_images) / BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps)
        for _ in range(epochs):
            for batch in torch.split(torch.randperm(len(split.train_images)), BATCH):
                logits = network(jitter(split.train_images[batch]))
                loss = F.cross_entropy(logits, split.train_labels[batch], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    network.eval().fold()
    return network.eval()  # `fold` added modules in training mode


def rescaled(network: Classifier, seed: int = RESCALING_SEED) -> Classifier:
    """Return a copy with random factors (log-uniform) in all its scalable channels."""
    generator = torch.Generator().manual_seed(seed)
    result = copy.deepcopy(network)
    low, high = math.log(SMALLEST_FACTOR), math.log(LARGEST_FACTOR)
    for channels in result.scalable():
        width = len(channels.writers[0].weight)
        channels.scale((torch.rand(width, generator=generator) * (high - low) + low).exp())
    return result


@torch.no_grad()
def largest_difference(one: Classifier, other: Classifier, images: Tensor) -> float:
    """Return the largest difference of logits, relative to the largest logit."""
    expected = one(images)
    return float((other(images) - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class Rescaled:
    """A network to train and to rescale."""

    name: str
    make: Callable[[], Classifier]

    def build(self, epochs: int = EPOCHS) -> Classifier:
        """Train and rescale the network, and check that the logits are unchanged."""
        network = trained(self.make, epochs)
        result = rescaled(network)
        difference = largest_difference(network, result, digits().test_images)
        assert difference <= TOLERANCE, f"{self.name}: rescaling changed the float logits by {difference:.1e}"
        return result

    def network(self, epochs: int = EPOCHS) -> Network:
        """Return the network and the digits as a `Network`, whose samples are the training and then the test images."""
        split = digits()
        train, test = len(split.train_images), len(split.test_images)
        build = cache(self.build)
        samples = range(CALIBRATION_IMAGES), range(train, train + test)
        return Network(self.name, lambda: copy.deepcopy(build(epochs)), _sample, *samples)


def _sample(index: int) -> Sample:
    split = digits()
    if index < len(split.train_images):
        return (split.train_images[index][None],), int(split.train_labels[index])
    index -= len(split.train_images)
    return (split.test_images[index][None],), int(split.test_labels[index])


RESCALED: dict[str, Rescaled] = {
    network.name: network
    for network in (
        Rescaled("mobilenet_v3_rescaled", mobilenet_v3),
        Rescaled("efficientnet_lite_rescaled", efficientnet_lite),
        Rescaled("se_resnet_rescaled", se_resnet),
    )
}


def main() -> None:
    """Print the float accuracy of each network, and the change of its logits by the rescaling."""
    import time

    split = digits()
    for member in RESCALED.values():
        start = time.perf_counter()
        network = trained(member.make)
        seconds = time.perf_counter() - start
        other = rescaled(network)
        print(
            f"{member.name}: trained in {seconds:.0f} s, test images right: "
            f"{100 * accuracy(network, split.test_images, split.test_labels):.2f} %, rescaled "
            f"{100 * accuracy(other, split.test_images, split.test_labels):.2f} %, logits differ by "
            f"{largest_difference(network, other, split.test_images):.1e} at most; "
            f"{sum(map(len, (channels.writers[0].weight for channels in other.scalable())))} channels rescaled"
        )


if __name__ == "__main__":
    main()
