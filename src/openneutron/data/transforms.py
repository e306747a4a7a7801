"""Transforms by name, and the transform of a model's input."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openneutron.core.messages import did_you_mean, first_line
from openneutron.core.objects import is_reference, load_object
from openneutron.data.audio import AudioTransform, Waveform
from openneutron.data.images import IMAGE_RANK, ImageTransform, is_picture, is_pixels
from openneutron.errors import InputError, OpenNeutronError, OptionError

__all__ = ["DefaultTransform", "Transform", "fitted", "transform_of"]

Transform = Callable[[Any], Any]
"""A function of one item of the data that returns the inputs of a model."""

HUBS = ("hf-hub:", "hf_hub:")
"""The beginnings of names of models on a server, in timm."""
NO_SIZE = (
    "A file of this type holds one input, but this model takes several, or its size is not known. Give a transform "
    "that returns the model's inputs, or data with a value for each input."
)


@dataclass(frozen=True)
class DefaultTransform:
    """Converts images and recordings to an input of `sizes`; returns other values unchanged.

    An array of uint8 is an image if the model takes images. `sizes` is None if the model takes several inputs or is not
    exported; then an image or a recording raises `InputError`.
    """

    sizes: tuple[int | None, ...] | None
    is_float: bool = True

    def __call__(self, value: Any) -> Any:
        """Returns `value` as an input."""
        is_wave = isinstance(value, Waveform)
        if not is_wave and not is_picture(value) and not self._is_image_array(value):
            return value
        if self.sizes is None:
            raise InputError(NO_SIZE)
        transform: Transform = AudioTransform() if is_wave else ImageTransform()
        return fitted(transform, self.sizes)(value)

    def _is_image_array(self, value: Any) -> bool:
        return self.is_float and self.sizes is not None and len(self.sizes) == IMAGE_RANK and is_pixels(value)


def fitted(transform: Transform | None, sizes: Sequence[int | None] | None, *, is_float: bool = True) -> Transform:
    """Returns `transform` for an input of `sizes`, or without one the transform of images and recordings to it.

    An `ImageTransform` or `AudioTransform` takes size and channels from `sizes`, unless these are None; other functions
    stay as they are. Raises the errors of their `fitted`.
    """
    if transform is None:
        return DefaultTransform(None if sizes is None else tuple(sizes), is_float)
    if isinstance(transform, (ImageTransform, AudioTransform)) and sizes is not None:
        return transform.fitted(sizes)
    return transform


def transform_of(text: str) -> Transform:
    """Returns the transform that a text names.

    - `torchvision:NAME`: of the default weights of a model ("mobilenet_v2"), or of weights
      ("MobileNet_V2_Weights.IMAGENET1K_V1").
    - `timm:NAME`: of the pretrained weights of a model ("mobilenetv4_conv_small.e2400_r224_in1k").
    - `file.py:function` and `package.module:function`.

    Raises `OptionError` for another text, an unknown name, or an object that cannot be called, `InputError` for a
    package that is not installed or does not work, and the errors of `load_object`.
    """
    where, colon, name = text.partition(":")
    if colon and where == "torchvision":
        return _of_torchvision(name)
    if colon and where == "timm":
        return _of_timm(name)
    if not is_reference(text):
        raise OptionError(
            f"The transform '{text}' must have the form 'torchvision:NAME', 'timm:NAME', 'file.py:function' or "
            "'package.module:function'."
        )
    found: Transform = load_object(text, "The transform")
    if not callable(found):
        raise OptionError(f"The transform '{text}' is a {type(found).__name__}, not a function of an image.")
    return found() if isinstance(found, type) else found


def _of_torchvision(name: str) -> Transform:
    models = _package("torchvision.models")
    try:
        if "." in name:
            return models.get_weight(name).transforms()  # type: ignore[no-any-return]
        weights = models.get_model_weights(name)
    except (ValueError, KeyError, AttributeError) as error:
        known = [*models.list_models()]
        raise OptionError(
            f"torchvision has no weights '{name}': {first_line(error)}.{did_you_mean(name.lower(), known)}"
        ) from error
    default = getattr(weights, "DEFAULT", None)
    if default is None:
        raise OptionError(f"torchvision's model '{name}' has no weights, so it has no transform.")
    return default.transforms()  # type: ignore[no-any-return]


def _of_timm(name: str) -> Transform:
    timm = _package("timm")
    data = _package("timm.data")
    config = _config_of_hub(timm, name) if name.startswith(HUBS) else timm.models.get_pretrained_cfg(name)
    if config is None:
        known = timm.list_models(pretrained=True)
        raise OptionError(f"timm has no pretrained weights '{name}'.{did_you_mean(name, known)}")
    options = data.resolve_data_config({}, pretrained_cfg=config if isinstance(config, dict) else config.to_dict())
    return data.create_transform(**options, is_training=False)  # type: ignore[no-any-return]


def _config_of_hub(timm: Any, name: str) -> Any:
    try:
        return timm.models.load_model_config_from_hf(name.partition(":")[2])[0]
    except Exception as error:  # downloads raise errors of many types
        raise InputError(
            f"timm cannot download the transform of '{name}': {type(error).__name__}: {first_line(error)}. Check the "
            "name and the connection, or give the transform as --mean, --std, --resize and --crop."
        ) from error


def _package(name: str) -> Any:
    package = name.split(".", maxsplit=1)[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise InputError(f"{package} is installed, but it needs {error.name}: pip install {error.name}.") from error
        raise InputError(
            f"This transform is one of {package}, which is not installed: pip install {package}."
        ) from error
    except OpenNeutronError:
        raise
    except Exception as error:  # torchvision raises RuntimeError if it was built for another version of torch
        raise InputError(
            f"{package} is installed, but importing it failed: {type(error).__name__}: {first_line(error)}. Install "
            f"the version that belongs to the installed torch: pip install -U {package}."
        ) from error
