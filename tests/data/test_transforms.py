"""Transforms by name."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openneutron.data import Waveform, transform_of
from openneutron.data.transforms import fitted
from openneutron.errors import InputError, OptionError


def test_functions_and_classes_of_files(tmp_path: Path) -> None:
    file = tmp_path / "own_transform.py"
    file.write_text(
        "def double(x):\n    return 2 * x\n"
        "class Triple:\n    def __call__(self, x):\n        return 3 * x\n"
        "number = 3\n"
    )
    assert transform_of(f"{file}:double")(4) == 8
    assert transform_of(f"{file}:Triple")(4) == 12
    with pytest.raises(OptionError, match=r"is a int, not a function of an image"):
        transform_of(f"{file}:number")
    with pytest.raises(OptionError, match="Did you mean 'double'"):
        transform_of(f"{file}:doubble")
    with pytest.raises(InputError, match=r"The transform is in '.*none\.py', which does not exist"):
        transform_of(str(tmp_path / "none.py:f"))
    for text in ("double", "", "tv:", "photos/"):
        with pytest.raises(
            OptionError, match=r"must have the form 'torchvision:NAME', 'timm:NAME', 'file\.py:function'"
        ):
            transform_of(text)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_packages_that_are_missing_or_broken(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"one of {package}, which is not installed: pip install {package}"):
        transform_of(f"{package}:mobilenet_v2")
    monkeypatch.delitem(sys.modules, package)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / package).mkdir()
    init = tmp_path / package / "__init__.py"
    init.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(InputError, match=r"importing it failed: RuntimeError: operator .* pip install -U"):
        transform_of(f"{package}:mobilenet_v2")
    init.write_text("import no_such_dependency")
    with pytest.raises(InputError, match=r"is installed, but it needs no_such_dependency: pip install no_such_dep"):
        transform_of(f"{package}:mobilenet_v2")


def test_transforms_of_torchvision() -> None:
    pytest.importorskip("torchvision_cpu_shim")
    pytest.importorskip("torchvision.models")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    for name in ("mobilenet_v2", "MobileNet_V2_Weights.IMAGENET1K_V2"):
        assert transform_of(f"torchvision:{name}")(image).shape == (3, 224, 224)
    for name in ("mobilenetv2", "MobileNet_V2_Weights.IMAGENET"):
        with pytest.raises(OptionError, match=rf"torchvision has no weights '{name}'"):
            transform_of(f"torchvision:{name}")


def test_transforms_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A double with the three functions of timm 1.0 that are called."""
    timm, data, models = (types.ModuleType(name) for name in ("timm", "timm.data", "timm.models"))
    config = types.SimpleNamespace(to_dict=lambda: {"mean": (0.5,) * 3})
    double: Any = timm
    double.models, double.data, double.list_models = models, data, lambda **_: ["mobilenetv4_conv_small"]
    options: Any = data
    options.resolve_data_config = lambda _, pretrained_cfg: dict(pretrained_cfg)
    options.create_transform = lambda mean, is_training: (mean, is_training)
    known: Any = models
    known.get_pretrained_cfg = lambda name: config if name == "mobilenetv4_conv_small" else None
    for module in (timm, data, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    made: Any = transform_of("timm:mobilenetv4_conv_small")
    assert made == ((0.5,) * 3, False)
    with pytest.raises(
        OptionError, match=r"timm has no pretrained weights 'mobilenetv4'\. Did you mean 'mobilenetv4_conv_s"
    ):
        transform_of("timm:mobilenetv4")


def test_the_transform_of_an_input() -> None:
    pixels = np.full((4, 4, 3), 51, np.uint8)
    image, wave = Image.fromarray(pixels), Waveform(torch.ones(1, 8), 16000)
    default = fitted(None, (1, 3, 4, 4))
    assert torch.allclose(default(image), torch.full((3, 4, 4), 0.2))
    assert torch.equal(default(pixels), default(image))
    assert fitted(None, (1, 10))(wave).tolist() == [1] * 8 + [0] * 2
    assert fitted(None, (1, 3, 4, 4), is_float=False)(pixels) is pixels
    floats = np.zeros((3, 4, 4), np.float32)
    for other in (floats, {"a": pixels}, 3, (pixels, 3)):
        assert default(other) is other
    for value in (image, wave):
        with pytest.raises(InputError, match="model takes several, or its size is not known"):
            fitted(None, None)(value)
    assert fitted(len, (1, 3, 4, 4)) is len
