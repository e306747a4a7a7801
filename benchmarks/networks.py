"""The real networks that OpenNeutron is measured on: `python -m benchmarks.networks` checks them against their sources.

Weights and images are in the folder that OPENNEUTRON_DATA names; its README.md tells where they are from. Every network
takes and returns float32 with batch 1. TensorFlow pads a stride of 2 on the bottom and right only: such layers have a
padding layer of their own in front. No calibration ever sees a label.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

__all__ = ["NETWORKS", "Inputs", "Network", "Sample", "Samples", "Twin", "data_folder"]

Inputs = tuple[Tensor, ...]
Sample = tuple[Inputs, int | None]
T = TypeVar("T")

LITERT_SAMPLES = 10  # to compare with LiteRT


@dataclass(frozen=True)
class Samples(Generic[T]):
    """Sized and re-iterable: `make(i)` for each i of `indices`, made when it is asked for and not kept."""

    indices: Sequence[int]
    make: Callable[[int], T]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[T]:
        return map(self.make, self.indices)

    def spread(self, limit: int) -> Samples[T]:
        """Return at most `limit` of the samples, evenly spaced: stored data are often sorted by class."""
        limit = min(limit, len(self))
        return replace(self, indices=[self.indices[i * len(self) // limit] for i in range(limit)])


@dataclass(frozen=True)
class Twin:
    """The float TFLite file of the same network, NHWC; `output` takes our output to what the file returns."""

    file: str
    output: Callable[[Tensor], Tensor] = lambda output: output


@dataclass(frozen=True)
class Network:
    """A network with its data: `sample(i)` for each i of `calibrates` and `evaluates`.

    `metric` is "top-1", or "sqnr" where there are no classes: then only the distance to the float output counts.
    `float_accuracy` is the top-1 percentage that the data's README states for the float network, None where none is.
    """

    name: str
    build: Callable[[], nn.Module]
    sample: Callable[[int], Sample]
    calibrates: Sequence[int]
    evaluates: Sequence[int]
    metric: Literal["top-1", "sqnr"] = "top-1"
    float_accuracy: float | None = None
    twin: Twin | None = None

    def example_inputs(self) -> Inputs:
        """Return inputs of the shapes that the network takes."""
        return self.sample(self.calibrates[0])[0]

    def calibration(self) -> Samples[Inputs]:
        """Return the inputs to calibrate with."""
        return Samples(self.calibrates, lambda index: self.sample(index)[0])

    def evaluation(self) -> Samples[Sample]:
        """Return the inputs to evaluate on, each with its class, or None where that is unknown."""
        return Samples(self.evaluates, self.sample)


# ------------------------------------------------------------------------------------------------------------- the data


def data_folder() -> Path:
    """Return the folder of weights and images, or say how to name it."""
    folder = os.environ.get("OPENNEUTRON_DATA")
    if not folder:
        raise FileNotFoundError("set OPENNEUTRON_DATA to the folder of weights and images")
    return Path(folder)


def _weights(file: str) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = torch.load(data_folder() / file, weights_only=True)
    return stored


@cache
def _arrays(file: str) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(data_folder() / file) as archive:
        return dict(archive)


@cache
def _photos() -> list[tuple[Path, int]]:
    """Return (file, class) of 1000 ImageNet photos: 800 to evaluate on, then 200 to calibrate with."""
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


def _load_in_order(model: nn.Module, file: str) -> nn.Module:
    """Fill the layers that have weights, in the order of their definition, from "0.weight", "0.bias", "1.weight" ..."""
    stored = _weights(file)
    names = [name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")]
    state = {f"{name}.{kind}": stored[f"{i}.{kind}"] for i, name in enumerate(names) for kind in ("weight", "bias")}
    model.load_state_dict(state)
    return model.eval()


# ----------------------------------------------------------------------------------------------------- MobileNetV2, 224


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Widen 1x1, depthwise 3x3, narrow 1x1; the input is added where the shape stays. Keys of torchvision's."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        widen = [_conv_bn_relu6(inputs, wide, 1)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *widen,
            _conv_bn_relu6(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        narrow: Tensor = self.conv(x)
        return x + narrow if self.adds else narrow


class MobileNetV2(nn.Module):
    """Images [N, 3, 224, 224] to logits [N, 1000]; parameter names are those of torchvision's mobilenet_v2."""

    # expansion, channels, blocks, stride of the first
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        features: list[nn.Module] = [_conv_bn_relu6(3, channels, 3, 2)]
        for expansion, outputs, blocks, stride in self.STAGES:
            for block in range(blocks):
                features.append(InvertedResidual(channels, outputs, stride if block == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*features, _conv_bn_relu6(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def _mobilenet_v2() -> nn.Module:
    model = MobileNetV2()
    model.load_state_dict(_weights("weights/mobilenet_v2_tf_1.0_224.pt"))
    return model.eval()


def _mobilenet_v2_sample(index: int) -> Sample:
    pixels, label = _photo(index, 224)
    # the weights' kernels are turned by 180 degrees, so that padding=1 pads where TensorFlow does
    return ((pixels / 127.5 - 1).flip(2, 3),), label


# ----------------------------------------------------------------------------------------------------- ResNet-20, CIFAR


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights (option A): every second pixel, zeros for new channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def shortcut(self, x: Tensor) -> Tensor:
        """Return x[:, :, ::2, ::2] with the new channels half before, half after it; as a pool, which the NPU has."""
        if self.stride == 1:
            return x
        half = self.new_channels // 2
        return F.pad(F.max_pool2d(x, 1, self.stride), (0, 0, 0, 0, half, half))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Images [N, 3, 32, 32] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _resnet20() -> nn.Module:
    model = ResNet20()
    # the file has no counters of batches
    model.load_state_dict(model.state_dict() | _weights("weights/cifar10_resnet20.pt"))
    return model.eval()


def _resnet20_sample(index: int) -> Sample:
    pixels, label = _cifar(index)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return ((pixels / 255 - mean) / deviation,), label


# ------------------------------------------------------------------------------------------------ MLPerf Tiny, keywords


class SeparableBlock(nn.Module):
    """Depthwise 3x3, batch norm, ReLU, 1x1, batch norm, ReLU; keeps the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.dw_bn = nn.BatchNorm2d(channels, eps=1e-3)
        self.pw = nn.Conv2d(channels, channels, 1)
        self.pw_bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.dw_bn(self.dw(x)))
        return F.relu(self.pw_bn(self.pw(x)))


class DSCNN(nn.Module):
    """MFCCs [N, 1, 49, 10] to the logits [N, 12] of ten keywords, silence and unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((1, 1, 4, 5))
        self.stem = nn.Conv2d(1, 64, (10, 4), stride=2)
        self.stem_bn = nn.BatchNorm2d(64, eps=1e-3)
        self.blocks = nn.Sequential(*(SeparableBlock(64) for _ in range(4)))
        self.fc = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem_bn(self.stem(self.pad(x)))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _ds_cnn() -> nn.Module:
    model = DSCNN()
    model.load_state_dict(model.state_dict() | _weights("mlperf_tiny/kws_dscnn.pt"))
    return model.eval()


def _ds_cnn_sample(index: int) -> Sample:
    stored = _arrays("mlperf_tiny/kws01.npz")
    mfcc = (torch.from_numpy(stored["x"][index]).float() - 83) * 0.5847029089927673
    return (mfcc[None, None],), int(stored["y"][index])


# ------------------------------------------------------------------------------------- MLPerf Tiny, streaming wake word


class SeparableBlock1d(nn.Module):
    """Depthwise convolution over time without padding, 1x1, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.dw = nn.Conv1d(inputs, inputs, kernel, groups=inputs, bias=False)
        self.pw = nn.Conv1d(inputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm1d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.pw(self.dw(x))))


class WakeWord(nn.Module):
    """Log-mel spectra [N, 40 bands, 30 frames] to logits [N, 3]; the four kernels use up the 30 frames exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            SeparableBlock1d(40, 128, 3),
            SeparableBlock1d(128, 128, 5),
            SeparableBlock1d(128, 128, 10),
            SeparableBlock1d(128, 32, 15),
        )
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.blocks(x).flatten(1))
        return logits


def _wake_word() -> nn.Module:
    model = WakeWord()
    model.load_state_dict(model.state_dict() | _weights("mlperf_tiny/sww_dsconv1d.pt"))
    return model.eval()


def _wake_word_sample(index: int) -> Sample:
    stored = _arrays("mlperf_tiny/sww_calibration_samples.npz")
    frames = torch.from_numpy(stored["specs"][index]).float()[:, 0]  # [30, 40]
    return (frames.t()[None].contiguous(),), int(stored["labels"][index])


# ------------------------------------------------------------------------------------ MLPerf Tiny, image classification


class ResNet8Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which has a 1x1 convolution where the stride is 2; batch norm is folded."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)), nn.Conv2d(inputs, outputs, 3, stride)
        )
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return F.relu(self.shortcut(x) + y)


class ResNet8(nn.Module):
    """Images [N, 3, 32, 32] of 0..255 to probabilities [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(ResNet8Block(16, 16, 1), ResNet8Block(16, 32, 2), ResNet8Block(32, 64, 2))
        self.pool = nn.AvgPool2d(8)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(F.relu(self.stem(x))))
        return self.fc(x.flatten(1)).softmax(1)  # type: ignore[no-any-return]


def _resnet8_sample(index: int) -> Sample:
    pixels, label = _cifar(index)
    return (pixels,), label


# --------------------------------------------------------------------------------------- MLPerf Tiny, visual wake words


class MobileNetV1(nn.Module):
    """Width 0.25: images [N, 3, 96, 96] of 0..1 to the probabilities [N, 2] of no person, person; BN is folded."""

    # outputs and stride of each depthwise-separable pair
    PAIRS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *((128, 1),) * 5, (256, 2), (256, 1))

    def __init__(self) -> None:
        super().__init__()
        channels = 8
        layers = self.conv3x3(3, channels, stride=2)
        for outputs, stride in self.PAIRS:
            layers += self.conv3x3(channels, channels, stride, groups=channels)
            layers += [nn.Conv2d(channels, outputs, 1), nn.ReLU()]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.pool = nn.AvgPool2d(3)
        self.fc = nn.Linear(channels, 2)

    @staticmethod
    def conv3x3(inputs: int, outputs: int, stride: int, groups: int = 1) -> list[nn.Module]:
        """Return the layers of a 3x3 convolution with ReLU, padded as TensorFlow does."""
        if stride == 1:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups), nn.ReLU()]
        return [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(inputs, outputs, 3, stride, groups=groups), nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x))
        return self.fc(x.flatten(1)).softmax(1)  # type: ignore[no-any-return]


def _visual_wake_words_sample(index: int) -> Sample:
    pixels, _ = _photo(index, 96)
    return (pixels / 255,), None  # an ImageNet class does not tell whether a person is in the photo


# --------------------------------------------------------------------------------------- MLPerf Tiny, anomaly detection


def _autoencoder() -> nn.Module:
    """Log-mel features [N, 640] to the same, through a bottleneck of 8; batch norm is folded."""
    widths = (640, 128, 128, 128, 128, 8, 128, 128, 128, 128, 640)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return _load_in_order(nn.Sequential(*layers[:-1]), "mlperf_tiny/ad_autoencoder.pt")


def _autoencoder_sample(seed: int) -> Sample:
    """Return noise in decibels over the range -85..15 that the int8 reference model takes."""
    noise = torch.randn(1, 640, generator=torch.Generator().manual_seed(seed))
    return ((noise * 16 - 35).clamp(-85, 15),), None


# ------------------------------------------------------------------------------------------------------------ the table

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("mobilenet_v2", _mobilenet_v2, _mobilenet_v2_sample, range(800, 1000), range(800), float_accuracy=91.0),
        # CIFAR's test images and the keywords are all there is: calibration takes every tenth of them
        Network("resnet20", _resnet20, _resnet20_sample, range(0, 2000, 10), range(2000), float_accuracy=81.35),
        Network(
            "ds_cnn",
            _ds_cnn,
            _ds_cnn_sample,
            range(0, 1000, 10),
            range(1000),
            float_accuracy=91.3,
            twin=Twin("mlperf_tiny/kws_ref_model_float32.tflite", lambda logits: logits.softmax(1)),
        ),
        Network("wake_word", _wake_word, _wake_word_sample, range(45), range(45), float_accuracy=91.1),
        Network(
            "resnet8",
            lambda: _load_in_order(ResNet8(), "mlperf_tiny/ic_resnet8.pt"),
            _resnet8_sample,
            range(0, 2000, 10),
            range(2000),
            twin=Twin("mlperf_tiny/pretrainedResnet.tflite"),
        ),
        Network(
            "mobilenet_v1_025",
            lambda: _load_in_order(MobileNetV1(), "mlperf_tiny/vww_mobilenetv1_025_96.pt"),
            _visual_wake_words_sample,
            range(800, 1000),
            range(0, 800, 4),
            twin=Twin("mlperf_tiny/vww_96_float.tflite"),
        ),
        Network(
            "autoencoder",
            _autoencoder,
            _autoencoder_sample,
            range(200, 300),
            range(200),
            metric="sqnr",
            twin=Twin("mlperf_tiny/ad01_fp32.tflite"),
        ),
    )
}


# ------------------------------------------------------------------------------------------------------------ the check


@torch.no_grad()
def top1(run: Callable[..., Tensor], samples: Iterable[Sample]) -> float | None:
    """Return the percentage of the labelled `samples` whose top-1 class is the label, None where none has one."""
    hits = [int(run(*inputs).argmax()) == label for inputs, label in samples if label is not None]
    return 100 * sum(hits) / len(hits) if hits else None


@torch.no_grad()
def difference_to_litert(model: nn.Module, twin: Twin, samples: Samples[Sample]) -> float:
    """Return the largest absolute difference between `model`'s outputs and those of its TFLite file in LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(data_folder() / twin.file))
    interpreter.allocate_tensors()
    source, sink = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    largest = 0.0
    for (x,), _ in samples:
        interpreter.set_tensor(source, (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).contiguous().numpy())
        interpreter.invoke()
        theirs = torch.from_numpy(interpreter.get_tensor(sink))
        largest = max(largest, (twin.output(model(x)) - theirs).abs().max().item())
    return largest


def main() -> None:
    """Print the float accuracy of each network beside the stated one, and its distance to LiteRT."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; all if none is named")
    parser.add_argument("--limit", type=int, default=sys.maxsize, metavar="N", help="samples a network at most")
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
            difference = network.twin and difference_to_litert(model, network.twin, samples.spread(LITERT_SAMPLES))
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
