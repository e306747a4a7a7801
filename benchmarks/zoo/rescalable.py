"""Small classifiers of 16x16 grey images that list the channels that can be scaled without changing the function.

The blocks are those of MobileNetV3, EfficientNet-lite and squeeze-excite ResNets. A channel's factor passes through a
relu, an addition (if both sides have it), a mean and a product with a gate. It does not pass through a relu6 or a
hardswish.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ["Channels", "Classifier", "efficientnet_lite", "mobilenet_v3", "se_resnet"]

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Channels:
    """Channels that share factors: the layers that compute them (weight rows) and those that read them (columns)."""

    writers: tuple[Layer, ...]
    reads: tuple[Layer, ...]

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiply the rows of weights by `factors` [channels], and divide the columns by them."""
        for layer in self.writers:
            layer.weight.mul_(_along(factors, layer.weight, 0))
            if layer.bias is not None:
                layer.bias.mul_(factors)
        for layer in self.reads:
            depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
            layer.weight.div_(_along(factors, layer.weight, 0 if depthwise else 1))


def _along(factors: Tensor, weight: Tensor, dim: int) -> Tensor:
    return factors.reshape([-1 if axis == dim else 1 for axis in range(weight.dim())])


class Conv(nn.Module):
    """Convolution, batch norm and activation. `fold` folds the batch norm into the convolution."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        activation: type[nn.Module] = nn.Identity,
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.norm(self.conv(x)))
        return y

    @property
    def is_homogeneous(self) -> bool:
        """Whether the activation is positively homogeneous: f(c x) = c f(x) for c > 0."""
        return isinstance(self.activation, (nn.Identity, nn.ReLU))

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the batch norm of a trained network into the convolution."""
        norm = self.norm
        if not isinstance(norm, nn.BatchNorm2d):
            return
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.conv.weight, self.conv.bias = fuse_conv_bn_weights(
            self.conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        self.norm = nn.Identity()


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a gate that is computed from the means of all channels."""

    def __init__(self, channels: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, max(channels // 4, 4), 1)
        self.relu = nn.ReLU()
        self.excite = nn.Conv2d(max(channels // 4, 4), channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        gates: Tensor = self.gate(self.excite(self.relu(self.squeeze(self.pool(x)))))
        return x * gates

    def inner(self) -> Channels:
        """The channels between its two layers."""
        return Channels((self.squeeze,), (self.excite,))


class InvertedResidual(nn.Module):
    """Expand, depthwise, optional squeeze-excite with hardsigmoid, project; adds the input if the shape is equal."""

    def __init__(
        self, inputs: int, outputs: int, activation: type[nn.Module], *, stride: int = 1, excites: bool = False
    ) -> None:
        super().__init__()
        wide = inputs * 3
        self.widen = Conv(inputs, wide, 1, activation)
        self.depthwise = Conv(wide, wide, 3, activation, stride=stride, groups=wide)
        self.excite = SqueezeExcite(wide, nn.Hardsigmoid) if excites else None
        self.narrow = Conv(wide, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.widen(x))
        if self.excite is not None:
            y = self.excite(y)
        y = self.narrow(y)
        result: Tensor = x + y if self.adds else y
        return result

    @property
    def first(self) -> tuple[Layer, ...]:
        """The layers that read the block's input."""
        return (self.widen.conv,)

    @property
    def last(self) -> Layer:
        """The layer that computes the block's output, or the value that is added to its input."""
        return self.narrow.conv

    def inner(self) -> Iterator[Channels]:
        """The channels inside that may be scaled."""
        if self.widen.is_homogeneous:
            yield Channels((self.widen.conv,), (self.depthwise.conv,))
        if self.depthwise.is_homogeneous:
            squeezes = () if self.excite is None else (self.excite.squeeze,)
            yield Channels((self.depthwise.conv,), (self.narrow.conv, *squeezes))
        if self.excite is not None:
            yield self.excite.inner()


class ExcitedResidual(nn.Module):
    """Two 3x3 convolutions and squeeze-excite with sigmoid, added to the input, then relu."""

    adds = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = Conv(channels, channels, 3, nn.ReLU)
        self.two = Conv(channels, channels, 3)
        self.excite = SqueezeExcite(channels, nn.Sigmoid)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(x + self.excite(self.two(self.one(x))))
        return y

    @property
    def first(self) -> tuple[Layer, ...]:
        """The layers that read the block's input."""
        return (self.one.conv,)

    @property
    def last(self) -> Layer:
        """The layer that computes the value that is added to the block's input."""
        return self.two.conv

    def inner(self) -> Iterator[Channels]:
        """The channels inside that may be scaled."""
        yield Channels((self.one.conv,), (self.two.conv,))
        yield self.excite.inner()

    @property
    def other_readers(self) -> tuple[Layer, ...]:
        """The layers that read the output of `last` before the addition."""
        return (self.excite.squeeze,)


class Classifier(nn.Module):
    """Images [N, 1, 16, 16] to logits [N, 10]: convolutions and blocks, their mean over the image, one linear."""

    def __init__(self, parts: list[Conv | InvertedResidual | ExcitedResidual], channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*parts)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.flatten(self.pool(self.features(x)), 1))
        return logits

    def fold(self) -> None:
        """Fold every batch norm into its convolution."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.fold()

    def scalable(self) -> Iterator[Channels]:
        """All channels that may be scaled. The channels of one chain of residual additions share factors."""
        writers: list[Layer] = []  # of the current chain of additions
        reads: list[Layer] = []
        passes = True
        for part in self.features:
            first: tuple[Layer, ...]
            other_readers: tuple[Layer, ...]
            if isinstance(part, Conv):
                first, other_readers, adds = (part.conv,), (), False
            else:
                assert isinstance(part, (InvertedResidual, ExcitedResidual))
                yield from part.inner()
                other_readers = part.other_readers if isinstance(part, ExcitedResidual) else ()
                first, adds = part.first, part.adds
            reads += first
            if not adds:
                if passes and writers:
                    yield Channels(tuple(writers), tuple(reads))
                writers, reads = [], []
                passes = part.is_homogeneous if isinstance(part, Conv) else True
            writers.append(part.conv if isinstance(part, Conv) else part.last)
            reads += other_readers
        if passes:
            yield Channels(tuple(writers), (*reads, self.head))


def mobilenet_v3() -> Classifier:
    """Blocks of MobileNetV3: with relu, then with hardswish, some with squeeze-excite, and a wide last convolution."""
    blocks = [
        InvertedResidual(16, 16, nn.ReLU, excites=True),
        InvertedResidual(16, 24, nn.ReLU, stride=2),
        InvertedResidual(24, 24, nn.ReLU, excites=True),
        InvertedResidual(24, 24, nn.Hardswish, excites=True),
        InvertedResidual(24, 32, nn.Hardswish, stride=2, excites=True),
        InvertedResidual(32, 32, nn.Hardswish, excites=True),
        InvertedResidual(32, 32, nn.Hardswish),
    ]
    return Classifier([Conv(1, 16, 3, nn.Hardswish), *blocks, Conv(32, 64, 1, nn.Hardswish)], 64)


def efficientnet_lite() -> Classifier:
    """Blocks of EfficientNet-lite: inverted residuals with relu6. Only the channels between blocks may be scaled."""
    blocks = [
        InvertedResidual(16, 16, nn.ReLU6),
        InvertedResidual(16, 24, nn.ReLU6, stride=2),
        InvertedResidual(24, 24, nn.ReLU6),
        InvertedResidual(24, 24, nn.ReLU6),
        InvertedResidual(24, 32, nn.ReLU6, stride=2),
        InvertedResidual(32, 32, nn.ReLU6),
        InvertedResidual(32, 32, nn.ReLU6),
    ]
    return Classifier([Conv(1, 16, 3, nn.ReLU6), *blocks, Conv(32, 64, 1, nn.ReLU6)], 64)


def se_resnet() -> Classifier:
    """Blocks of a squeeze-excite ResNet, with relu only, so that every channel may be scaled."""
    parts: list[Conv | InvertedResidual | ExcitedResidual] = [Conv(1, 16, 3, nn.ReLU)]
    for inputs, outputs in ((16, 16), (16, 24), (24, 32)):
        if inputs != outputs:
            parts.append(Conv(inputs, outputs, 3, nn.ReLU, stride=2))
        parts += [ExcitedResidual(outputs), ExcitedResidual(outputs)]
    return Classifier(parts, 32)
