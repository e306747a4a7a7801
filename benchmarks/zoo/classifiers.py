"""Image classifiers that torchvision lacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ConvNeXtV2", "EfficientNetLite0", "LRNNet", "MLPMixer", "MobileNetV1"]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class _Classifier(nn.Module):
    """Feature layers, the mean over the image, and a linear."""

    def __init__(self, features: list[nn.Module], channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.flatten(self.pool(self.features(x)), 1))
        return logits


class MobileNetV1(_Classifier):
    """MobileNetV1 of width 1: a sequence of depthwise-separable convolutions."""

    # outputs and stride of each pair
    PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

    def __init__(self, classes: int = 1000) -> None:
        channels = 32
        features = [*_conv(3, channels, 3, 2), nn.ReLU()]
        for outputs, stride in self.PAIRS:
            features += [*_conv(channels, channels, 3, stride, groups=channels), nn.ReLU()]
            features += [*_conv(channels, outputs, 1), nn.ReLU()]
            channels = outputs
        super().__init__(features, channels, classes)


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        widen = [*_conv(inputs, wide, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*_conv(wide, wide, kernel, stride, groups=wide), nn.ReLU6()]
        self.layers = nn.Sequential(*widen, *depthwise, *_conv(wide, outputs, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.adds else y


class EfficientNetLite0(_Classifier):
    """EfficientNet-B0 without squeeze-and-excite, with ReLU6 instead of SiLU and a stem and head of fixed width."""

    # expansion, channels, blocks, stride of the first, kernel
    STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
              (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))  # fmt: skip

    def __init__(self, classes: int = 1000) -> None:
        channels = 32
        features = [*_conv(3, channels, 3, 2), nn.ReLU6()]
        for expansion, outputs, blocks, stride, kernel in self.STAGES:
            for block in range(blocks):
                first = stride if block == 0 else 1
                features.append(_InvertedResidual(channels, outputs, kernel, first, expansion))
                channels = outputs
        super().__init__([*features, *_conv(channels, 1280, 1), nn.ReLU6()], 1280, classes)


class _MixerBlock(nn.Module):
    """An MLP over the patches of each channel, and an MLP over the channels of each patch."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.patches = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.channels = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = x + self.channels(self.norm2(x))
        return mixed


class MLPMixer(nn.Module):
    """An MLP-Mixer with patches of 8x8, 96 channels and four blocks."""

    def __init__(self, size: int, classes: int = 100, channels: int = 96, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, channels, 8, 8)
        self.blocks = nn.Sequential(*(_MixerBlock((size // 8) ** 2, channels) for _ in range(blocks)))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


class _ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of an image [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _GlobalResponseNorm(nn.Module):
    """Scales each channel of [N, H, W, C] by its norm over height and width, relative to the mean norm of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(0.5 * torch.randn(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        response: Tensor = length / (length.mean(-1, keepdim=True) + 1e-6)
        return self.gamma * (x * response) + self.beta + x


class _ConvNeXtV2Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, 1e-6)
        self.widen, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.response = _GlobalResponseNorm(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(self.response(nn.functional.gelu(self.widen(y))))
        changed: Tensor = x + y.permute(0, 3, 1, 2)
        return changed


class ConvNeXtV2(_Classifier):
    """The widths of ConvNeXt V2 atto, with half of its blocks."""

    STAGES = ((40, 1), (80, 1), (160, 3), (320, 1))

    def __init__(self, classes: int = 100) -> None:
        features: list[nn.Module] = []
        channels = 3
        for outputs, blocks in self.STAGES:
            if channels == 3:
                features += [nn.Conv2d(channels, outputs, 4, 4), _ChannelNorm(outputs, 1e-6)]
            else:
                features += [_ChannelNorm(channels, 1e-6), nn.Conv2d(channels, outputs, 2, 2)]
            features += [_ConvNeXtV2Block(outputs) for _ in range(blocks)]
            channels = outputs
        super().__init__(features, channels, classes)


class _Inception(nn.Module):
    """Four branches, each with a quarter of the output channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        quarter = outputs // 4
        self.branches = nn.ModuleList(
            nn.Sequential(*parts, nn.ReLU())
            for parts in (
                [nn.Conv2d(inputs, quarter, 1)],
                [nn.Conv2d(inputs, quarter, 1), nn.ReLU(), nn.Conv2d(quarter, quarter, 3, padding=1)],
                [nn.Conv2d(inputs, quarter // 2, 1), nn.ReLU(), nn.Conv2d(quarter // 2, quarter, 5, padding=2)],
                [nn.MaxPool2d(3, 1, 1), nn.Conv2d(inputs, quarter, 1)],
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class LRNNet(_Classifier):
    """The stem of the first GoogLeNet, with its local response norms, and two of its blocks."""

    def __init__(self, classes: int = 100) -> None:
        features = [
            *(nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(5)),
            *(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 192, 3, padding=1), nn.ReLU()),
            *(nn.LocalResponseNorm(5, alpha=0.1, k=2.0), nn.MaxPool2d(3, 2, 1)),
            *(_Inception(192, 256), _Inception(256, 320)),
        ]
        super().__init__(features, 320, classes)
