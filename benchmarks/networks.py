"""Networks with real weights and data. `python -m benchmarks.networks` checks them against their sources.

OPENNEUTRON_DATA names the folder of weights and images; its README.md gives their sources. Every network takes and
returns float32 with batch 1. Calibration uses no labels.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .models import DSCNN, Autoencoder, MobileNetV1, MobileNetV2, ResNet8, ResNet20, WakeWord
from .vww_labels import CLASSES_WITH_PEOPLE

__all__ = ["NETWORKS", "Inputs", "Network", "Sample", "Samples", "data_folder"]

Inputs = tuple[Tensor, ...]
Sample = tuple[Inputs, int | None]
T = TypeVar("T")

PHOTOS_TO_EVALUATE_ON = 800
LITERT_SAMPLES = 10  # to compare with LiteRT


@dataclass(frozen=True)
class Samples(Generic[T]):
    """A re-iterable of known length: `make(i)` for each i of `indices`. Items are made on access and not stored."""

    indices: Sequence[int]
    make: Callable[[int], T]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[T]:
        return map(self.make, self.indices)

    def spread(self, limit: int) -> Samples[T]:
        """Return at most `limit` of the samples, evenly spaced, because stored data are often sorted by class."""
        limit = min(limit, len(self))
        return replace(self, indices=[self.indices[i * len(self) // limit] for i in range(limit)])


@dataclass(frozen=True)
class Network:
    """A network with its data: `sample(i)` for each i of `calibrates` and `evaluates`.

    `metric` is "top-1", or "sqnr" (SQNR to the float output) for a network without classes. `float_accuracy` is the
    top-1 percentage that the data's README states for the float network; None if it states none. `float_tflite` is the
    float TFLite file of the same network, NHWC; None if there is none.
    """

    name: str
    build: Callable[[], nn.Module]
    sample: Callable[[int], Sample]
    calibrates: Sequence[int]
    evaluates: Sequence[int]
    metric: Literal["top-1", "sqnr"] = "top-1"
    float_accuracy: float | None = None
    float_tflite: str | None = None

    def example_inputs(self) -> Inputs:
        """Return inputs of the shapes that the network takes."""
        return self.sample(self.calibrates[0])[0]

    def calibration(self) -> Samples[Inputs]:
        """Return the calibration inputs."""
        return Samples(self.calibrates, lambda index: self.sample(index)[0])

    def with_calibration_of(self, limit: int) -> Network:
        """Return the same network with at most `limit` calibration inputs, evenly spaced."""
        return replace(self, calibrates=self.calibration().spread(limit).indices)

    def with_drawn_calibration(self, seed: int) -> Network:
        """Return the same network with four fifths of its calibration inputs, drawn at random."""
        drawn = random.Random(seed).sample(list(self.calibrates), len(self.calibrates) * 4 // 5)
        return replace(self, calibrates=drawn)

    def evaluation(self) -> Samples[Sample]:
        """Return the evaluation inputs, each with its class; None for an unknown class."""
        return Samples(self.evaluates, self.sample)


# ----------------------------------------------------------------------------------------------------------------- data


def data_folder() -> Path:
    """Return the folder of weights and images. Exits with a message if OPENNEUTRON_DATA is not set."""
    folder = os.environ.get("OPENNEUTRON_DATA")
    if not folder:
        raise FileNotFoundError("set OPENNEUTRON_DATA to the folder of weights and images")
    return Path(folder)


@cache
def _arrays(file: str) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(data_folder() / file) as archive:
        return dict(archive)


@cache
def _photos() -> list[tuple[Path, int]]:
    """Return (file, class) of 1000 ImageNet photos: 800 for evaluation, followed by 200 for calibration."""
    folder = data_folder()
    listings = ("imagenet_sample_eval.txt", "imagenet_sample_calib.txt")
    lines = [line for listing in listings for line in (folder / listing).read_text().splitlines()]
    return [(folder / path, int(label)) for path, label in (line.rsplit(maxsplit=1) for line in lines)]


def _photo(index: int, size: int) -> tuple[Tensor, int]:
    """Return a photo as [1, 3, size, size] of 0..255, and its class."""
    file, label = _photos()[index]
    with Image.open(file) as image:
        rgb = image.convert("RGB")
        pixels = np.array(rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), label


def _cifar(index: int) -> tuple[Tensor, int]:
    """Return CIFAR-10 test image `index` as [1, 3, 32, 32] of 0..255, and its class."""
    stored = _arrays("cifar10_test_jpeg_2000.npz")
    return torch.from_numpy(stored["x"][index]).permute(2, 0, 1)[None].float(), int(stored["y"][index])


def _mobilenet_v2_sample(index: int) -> Sample:
    pixels, label = _photo(index, 224)
    # the weights' kernels are rotated by 180 degrees, so that padding=1 pads as TensorFlow does
    return ((pixels / 127.5 - 1).flip(2, 3),), label


def _resnet20_sample(index: int) -> Sample:
    pixels, label = _cifar(index)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return ((pixels / 255 - mean) / deviation,), label


def _ds_cnn_sample(index: int) -> Sample:
    stored = _arrays("mlperf_tiny/kws01.npz")
    mfcc = (torch.from_numpy(stored["x"][index]).float() - 83) * 0.5847029089927673
    return (mfcc[None, None],), int(stored["y"][index])


def _wake_word_sample(index: int) -> Sample:
    stored = _arrays("mlperf_tiny/sww_calibration_samples.npz")
    frames = torch.from_numpy(stored["specs"][index]).float()[:, 0]  # [30, 40]
    return (frames.t()[None].contiguous(),), int(stored["labels"][index])


def _resnet8_sample(index: int) -> Sample:
    pixels, label = _cifar(index)
    return (pixels,), label


def _visual_wake_words_sample(index: int) -> Sample:
    pixels, label = _photo(index, 96)
    return (pixels / 255,), int(label in CLASSES_WITH_PEOPLE) if index < PHOTOS_TO_EVALUATE_ON else None


def _autoencoder_sample(seed: int) -> Sample:
    """Return normal noise in decibels, clamped to -85..15, the input range of the int8 reference model."""
    noise = torch.randn(1, 640, generator=torch.Generator().manual_seed(seed))
    return ((noise * 16 - 35).clamp(-85, 15),), None


# -------------------------------------------------------------------------------------------------------------- weights


def _trained(model: nn.Module, file: str) -> nn.Module:
    """Return `model` in eval mode with the weights of `file`, whose keys are the names of the parameters."""
    model.load_state_dict(torch.load(data_folder() / file, weights_only=True))
    return model.eval()


def _trained_in_order(model: nn.Module, file: str) -> nn.Module:
    """Return `model` as `_trained` does, from a file that numbers layers with weights: "0.weight", "0.bias", ..."""
    stored = torch.load(data_folder() / file, weights_only=True)
    names = [name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")]
    state = {f"{name}.{kind}": stored[f"{i}.{kind}"] for i, name in enumerate(names) for kind in ("weight", "bias")}
    model.load_state_dict(state)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------- table

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network(
            "mobilenet_v2",
            lambda: _trained(MobileNetV2(), "weights/mobilenet_v2_tf_1.0_224.pt"),
            _mobilenet_v2_sample,
            range(PHOTOS_TO_EVALUATE_ON, 1000),
            range(PHOTOS_TO_EVALUATE_ON),
            float_accuracy=91.0,
        ),
        # Only test data are available for CIFAR and the keywords, so calibration uses every tenth of them.
        Network(
            "resnet20",
            lambda: _trained(ResNet20(), "weights/cifar10_resnet20.pt"),
            _resnet20_sample,
            range(0, 2000, 10),
            range(2000),
            float_accuracy=81.35,
        ),
        Network(
            "ds_cnn",
            lambda: _trained(DSCNN(), "mlperf_tiny/kws_dscnn.pt"),
            _ds_cnn_sample,
            range(0, 1000, 10),
            range(1000),
            float_accuracy=91.3,
        ),
        Network(
            "wake_word",
            lambda: _trained(WakeWord(), "mlperf_tiny/sww_dsconv1d.pt"),
            _wake_word_sample,
            range(45),
            range(45),
            float_accuracy=91.1,
        ),
        Network(
            "resnet8",
            lambda: _trained_in_order(ResNet8(), "mlperf_tiny/ic_resnet8.pt"),
            _resnet8_sample,
            range(0, 2000, 10),
            range(2000),
            float_tflite="mlperf_tiny/pretrainedResnet.tflite",
        ),
        Network(
            "mobilenet_v1_025",
            lambda: _trained_in_order(MobileNetV1(), "mlperf_tiny/vww_mobilenetv1_025_96.pt"),
            _visual_wake_words_sample,
            range(PHOTOS_TO_EVALUATE_ON, 1000),
            range(PHOTOS_TO_EVALUATE_ON),
            float_tflite="mlperf_tiny/vww_96_float.tflite",
        ),
        Network(
            "autoencoder",
            lambda: _trained_in_order(Autoencoder(), "mlperf_tiny/ad_autoencoder.pt"),
            _autoencoder_sample,
            range(200, 300),
            range(200),
            metric="sqnr",
            float_tflite="mlperf_tiny/ad01_fp32.tflite",
        ),
    )
}


# ---------------------------------------------------------------------------------------------------------------- check


@torch.no_grad()
def top1(run: Callable[..., Tensor], samples: Iterable[Sample]) -> float | None:
    """Return the percentage of the labelled `samples` whose top-1 class is the label; None without labels."""
    hits = [int(run(*inputs).argmax()) == label for inputs, label in samples if label is not None]
    return 100 * sum(hits) / len(hits) if hits else None


@torch.no_grad()
def difference_to_litert(model: nn.Module, float_tflite: str, samples: Samples[Sample]) -> float:
    """Return the largest absolute difference between `model`'s outputs and those of its TFLite file in LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(data_folder() / float_tflite))
    interpreter.allocate_tensors()
    source, sink = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    largest = 0.0
    for (x,), _ in samples:
        interpreter.set_tensor(source, (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).contiguous().numpy())
        interpreter.invoke()
        theirs = torch.from_numpy(interpreter.get_tensor(sink))
        largest = max(largest, (model(x) - theirs).abs().max().item())
    return largest


def main() -> None:
    """Print the measured and the stated float accuracy of each network, and its difference to LiteRT."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)} (default: all)")
    parser.add_argument(
        "--limit", type=int, default=sys.maxsize, metavar="N", help="largest number of samples per network"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(NETWORKS):
        parser.error(f"no such network: {', '.join(sorted(unknown))}")

    table = Table("network", "samples", "float top-1 %", "stated %", "largest difference to LiteRT")
    console = Console()
    with Progress(console=console) as progress:
        for name in options.names or NETWORKS:
            network = NETWORKS[name]
            model = network.build()
            samples = network.evaluation().spread(options.limit)
            accuracy = top1(model, progress.track(samples, total=len(samples), description=name))
            difference = network.float_tflite and difference_to_litert(
                model, network.float_tflite, samples.spread(LITERT_SAMPLES)
            )
            table.add_row(
                name,
                str(len(samples)),
                "-" if accuracy is None else f"{accuracy:.2f}",
                "-" if network.float_accuracy is None else f"{network.float_accuracy:.2f}",
                "-" if difference is None else f"{difference:.1e}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
