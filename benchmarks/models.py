"""The networks of `benchmarks.networks`. Parameters have the names of the weight files.

TensorFlow pads a stride of 2 only at the bottom and right, so such layers have a separate padding layer before them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DSCNN", "Autoencoder", "MobileNetV1", "MobileNetV2", "ResNet8", "ResNet20", "WakeWord"]

# ---------------------------------------------------------------------------------------------------------- MobileNetV2


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; adds the input if the shape is equal.

    Has torchvision's parameter names.
    """

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


# ---------------------------------------------------------------------------------------------------------------- CIFAR


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
        """Return `x` for stride 1, else x[:, :, ::2, ::2] with half of the new channels, all zero, on each side."""
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


# ------------------------------------------------------------------------------------------------ MLPerf Tiny: keywords


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


# ------------------------------------------------------------------------------------- MLPerf Tiny: streaming wake word


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
    """Log-mel spectra [N, 40 bands, 30 frames] to logits [N, 3]; the four kernels reduce the 30 frames to one."""

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


# ------------------------------------------------------------------------------------ MLPerf Tiny: image classification


def _conv3x3_same(inputs: int, outputs: int, stride: int, groups: int = 1) -> list[nn.Module]:
    """Return a 3x3 convolution for even sizes, padded as TensorFlow does."""
    if stride == 1:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)]
    return [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(inputs, outputs, 3, stride, groups=groups)]


class ResNet8Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, with a 1x1 convolution if the stride is 2; batch norm is folded."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_conv3x3_same(inputs, outputs, stride))
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


# --------------------------------------------------------------------------------------- MLPerf Tiny: visual wake words


class MobileNetV1(nn.Module):
    """Width 0.25: images [N, 3, 96, 96] of 0..1 to the probabilities [N, 2] of no person and person; BN is folded."""

    # outputs and stride of each depthwise-separable pair
    PAIRS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *((128, 1),) * 5, (256, 2), (256, 1))

    def __init__(self) -> None:
        super().__init__()
        channels = 8
        layers = [*_conv3x3_same(3, channels, stride=2), nn.ReLU()]
        for outputs, stride in self.PAIRS:
            layers += [*_conv3x3_same(channels, channels, stride, groups=channels), nn.ReLU()]
            layers += [nn.Conv2d(channels, outputs, 1), nn.ReLU()]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.pool = nn.AvgPool2d(3)
        self.fc = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x))
        return self.fc(x.flatten(1)).softmax(1)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------- MLPerf Tiny: anomaly detection


class Autoencoder(nn.Sequential):
    """Log-mel features [N, 640] to the same, through a bottleneck of 8; batch norm is folded."""

    WIDTHS = (640, 128, 128, 128, 128, 8, 128, 128, 128, 128, 640)

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(self.WIDTHS):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])
