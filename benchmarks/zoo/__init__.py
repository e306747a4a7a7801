"""Networks with random weights, for tests of placement and int8 accuracy.

Each network has a small input for continuous integration and its usual input. Networks of torchvision use its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.models import DSCNN
from torch import Tensor, nn

from .audio import TCN, GRUKeywords
from .classifiers import ConvNeXtV2, EfficientNetLite0, LRNNet, MLPMixer, MobileNetV1
from .dense import ESPCN, ConvAutoencoder, UNet, Yolo
from .detectors import YoloV5, YoloV8
from .linear_attention import EfficientViT
from .temporal import TemporalShiftNet
from .text import Bert
from .torchvision_models import MissingTorchvisionError, torchvision_models
from .trainable_init import Shape, initialize_trainable, smooth
from .volumes import ResNet18OfVolumes

__all__ = ["ZOO", "Member", "MissingTorchvisionError", "smooth"]


def _outputs(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


@dataclass(frozen=True)
class Member:
    """A network. `make` builds it for an input shape: `small` for continuous integration, or `full`.

    `parts` splits the outputs into parts, each of which needs an SQNR of `least_sqnr` decibels to the float network.
    `on_cpu` has the operators, in the edge dialect, that are expected on the CPU. `least_variation` is the smallest
    allowed standard deviation of a part over inputs, relative to the part's RMS. It is small for parts to which
    constant positions are added.
    """

    name: str
    make: Callable[[Shape], nn.Module]
    small: Shape
    full: Shape
    parts: Callable[[Any], list[Tensor]] = _outputs
    least_sqnr: float = 20.0
    on_cpu: frozenset[str] = frozenset()
    least_variation: float = 0.1

    def build(self, shape: Shape) -> nn.Module:
        """Return the network in eval mode, with the same random weights each time.

        Raises `MissingTorchvisionError` if the network needs torchvision and it is not installed.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return initialize_trainable(self.make(shape), shape)


def _theirs(name: str, **options: Any) -> Callable[[Shape], nn.Module]:
    def make(_: Shape) -> nn.Module:
        model: nn.Module = getattr(torchvision_models(), name)(weights=None, **options)
        return model

    return make


class _Segmentation(nn.Module):
    """Returns the tensor in the dictionary that torchvision's segmentation network returns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision_models().segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)

    def forward(self, x: Tensor) -> Tensor:
        mask: Tensor = self.net(x)["out"]
        return mask


class _Detector(nn.Module):
    """Trunk and heads of a detector, without the selection of boxes, which depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        made = torchvision_models().detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
        self.backbone, self.head = made.backbone, made.head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.head(list(self.backbone(x).values()))
        return found["bbox_regression"], found["cls_logits"]


def _vision_transformer(shape: Shape) -> nn.Module:
    model: Any = torchvision_models().VisionTransformer(
        image_size=shape[-1], patch_size=16, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=100
    )
    nn.init.normal_(
        model.class_token
    )  # zeros would be lost to rounding, because patches are larger, and a layer norm follows
    return model  # type: ignore[no-any-return]


def _convnext(_: Shape) -> nn.Module:
    """The trunk of ConvNeXt-tiny up to its second stage, with one block per stage."""
    convnext = torchvision_models().convnext
    stages = [convnext.CNBlockConfig(96, 192, 1), convnext.CNBlockConfig(192, None, 1)]
    model: nn.Module = convnext.ConvNeXt(stages, stochastic_depth_prob=0.0, layer_scale=0.5, num_classes=100)
    return model


def _detectors(name: str, kind: type[YoloV5 | YoloV8], dim: int, joining: set[str]) -> Iterator[Member]:
    """A detector with boxes and scores as two outputs, and one that concatenates them along `dim`, on the CPU."""

    def parts(found: Tensor) -> list[Tensor]:
        return list(torch.split(found, [4, found.shape[dim] - 4], dim))

    shapes = _SMALL, _image(320)
    limits: dict[str, Any] = {"least_sqnr": 30.0, "least_variation": 0.02}
    limits["on_cpu"] = frozenset(joining)
    yield Member(name, lambda shape: kind(shape[-1], apart=True), *shapes, **limits)
    yield Member(f"{name}_joined", lambda shape: kind(shape[-1]), *shapes, parts, **limits)


def _image(size: int) -> Shape:
    return (1, 3, size, size)


_SMALL, _FULL = _image(64), _image(224)

# The operators that compute BERT's attention mask from its input.
_MASK_OPERATORS = frozenset(
    {
        "aten.gt.Scalar", "aten.mul.Tensor", "aten.sub.Tensor", "aten.rsub.Scalar", "aten.view_copy.default",
        "aten.select_copy.int", "aten.slice_copy.Tensor", "dim_order_ops._to_dim_order_copy.default",
    }
)  # fmt: skip

ZOO: dict[str, Member] = {
    member.name: member
    for member in (
        Member("temporal_shift", lambda _: TemporalShiftNet(), (4, 3, 32, 32), (8, 3, 112, 112)),
        Member("mobilenet_v1", lambda _: MobileNetV1(), _SMALL, _FULL),
        Member("mobilenet_v2", _theirs("mobilenet_v2"), _SMALL, _FULL),
        Member("mobilenet_v3_small", _theirs("mobilenet_v3_small"), _SMALL, _FULL),
        Member("mobilenet_v3_large", _theirs("mobilenet_v3_large"), _SMALL, _FULL),
        Member("efficientnet_lite0", lambda _: EfficientNetLite0(), _SMALL, _FULL),
        Member("efficientnet_b0", _theirs("efficientnet_b0"), _SMALL, _FULL),
        Member("shufflenet_v2", _theirs("shufflenet_v2_x1_0"), _SMALL, _FULL),
        Member("squeezenet", _theirs("squeezenet1_1"), _SMALL, _FULL),
        Member("mnasnet", _theirs("mnasnet1_0"), _SMALL, _FULL),
        Member("resnet18", _theirs("resnet18"), _SMALL, _FULL),
        Member("resnet50", _theirs("resnet50"), _SMALL, _FULL),
        Member("regnet", _theirs("regnet_y_400mf"), _SMALL, _FULL),
        Member("densenet121", _theirs("densenet121"), _SMALL, _FULL),
        Member("googlenet", _theirs("googlenet", aux_logits=False, init_weights=False), _SMALL, _FULL),
        Member("unet", lambda _: UNet(), _SMALL, _image(256)),
        Member("deeplab_v3", lambda _: _Segmentation(), _SMALL, _FULL),
        Member("ssdlite", lambda _: _Detector(), _image(160), _image(320), on_cpu=frozenset({"aten.cat.default"})),
        Member("yolo", lambda _: Yolo(), _SMALL, _image(320)),
        *_detectors("yolo_v5", YoloV5, -1, {"aten.cat.default", "aten.view_copy.default"}),
        *_detectors("yolo_v8", YoloV8, 1, {"aten.cat.default"}),
        Member("ds_cnn", lambda _: DSCNN(), (1, 1, 49, 10), (1, 1, 49, 10)),
        Member("tcn", lambda _: TCN(), (1, 40, 100), (1, 40, 100)),
        Member("gru", lambda _: GRUKeywords(), (1, 40, 20), (1, 40, 98)),
        Member("bert", lambda _: Bert(), (1, 33, 48), (1, 33, 128), on_cpu=_MASK_OPERATORS),
        Member("convnext_blocks", _convnext, _SMALL, _FULL),
        Member("convnext_v2", lambda _: ConvNeXtV2(), _SMALL, _FULL),
        Member("efficientvit", lambda _: EfficientViT(), _image(128), _FULL),
        Member("lrn_net", lambda _: LRNNet(), _SMALL, _FULL),
        Member("resnet18_of_volumes", lambda _: ResNet18OfVolumes(), (1, 3, 2, 32, 32), (1, 3, 4, 112, 112)),
        Member("vision_transformer", _vision_transformer, _SMALL, _FULL),
        Member("mlp_mixer", lambda shape: MLPMixer(shape[-1]), _SMALL, _image(128)),
        Member("autoencoder", lambda _: ConvAutoencoder(), _SMALL, _image(128)),
        Member("espcn", lambda _: ESPCN(), (1, 1, 32, 32), (1, 1, 120, 160)),
    )
}
