"""Checks settings without importing torch, so that a wrong one is reported at once."""

from __future__ import annotations

from collections.abc import Callable, Container
from datetime import date
from typing import TYPE_CHECKING, Any

from openneutron.compile_spec import CompileOptions, converter_fields
from openneutron.core.messages import did_you_mean
from openneutron.errors import OptionError
from openneutron.settings.declaration import RANDOM, Settings
from openneutron.settings.input_shapes import parse_input
from openneutron.settings.model_texts import arguments_in, check_model
from openneutron.settings.package_names import check_name, check_section
from openneutron.targets import NeutronTargetSpec

if TYPE_CHECKING:
    from openneutron.data import ImageTransform

__all__ = ["check_settings", "image_transform", "layers_of", "required_message"]

_REQUIRED: dict[str, tuple[str, Callable[[Settings], Any]]] = {
    "model": ("Give a model: MODEL, such as net.py:Net", lambda given: given.model.model),
    "calibrate": ("Give data for calibration: --calibrate DATA", lambda given: given.data.calibrate),
    "evaluate": ("Give labelled data: --evaluate DATA", lambda given: given.data.evaluate),
}

_HOW = ("float", "per_channel", "per_tensor")
"""How a module in the setting `layers` is quantized."""


def check_settings(
    settings: Settings, *required: str, uses: Container[str] | None = None, allows_random: bool = False
) -> None:
    """Checks all settings that can be checked without loading the model or the data.

    `required` are the names of settings that must be given: "model", "calibrate", "evaluate". `uses` are the names of
    settings whose paths must exist; None stands for all. `allows_random` says whether required calibration data may be
    random.

    Raises `OptionError` for a setting that is missing or wrong, `TargetError` for an unknown target or a wrong board
    file, and `InputError` for a missing file and for a folder without data.
    """
    for name in required:
        if _REQUIRED[name][1](settings) is None:
            raise OptionError(required_message(name))
    if "calibrate" in required and settings.data.calibrate == RANDOM:
        _check_random(settings, allows_random=allows_random)
    NeutronTargetSpec(settings.build.target)
    CompileOptions(
        operators_not_to_delegate=settings.lower.operators_not_to_delegate,
        neutron_converter_flavor=settings.lower.neutron_converter_flavor,
    )
    converter_fields(settings.lower.extra_flags)
    settings.check_paths(uses)
    for name, data in (("calibrate", settings.data.calibrate), ("evaluate", settings.data.evaluate)):
        if data is not None and data != RANDOM and (uses is None or name in uses):
            from openneutron.data import check_data  # verbs without data start faster

            check_data(data)
    image_transform(settings)
    layers_of(settings)
    _check_date(settings.build.date)
    check_name(settings.package.name)
    check_section(settings.package.section)
    if settings.model.model is not None and (uses is None or "model" in uses):
        check_model(settings.model.model)
    arguments_in(settings.model.args or "")
    for text in settings.model.input:
        parse_input(text)


def _check_random(settings: Settings, *, allows_random: bool) -> None:
    if not allows_random:
        raise OptionError("'calibrate' is 'random' only for `openneutron build`. Give data: --calibrate DATA.")
    if settings.data.evaluate is not None:
        raise OptionError(
            "The accuracy after a calibration with random inputs is not valid. Give data for calibration, or leave out "
            "--evaluate."
        )


def _check_date(text: str | None) -> None:
    if text is None:
        return
    try:
        date.fromisoformat(text)
    except ValueError as error:
        raise OptionError(f"'date' has the form YYYY-MM-DD, not {text!r}.") from error


def required_message(name: str) -> str:
    """Returns the message about a required setting that is not given."""
    return f"{_REQUIRED[name][0]}, or set '{name}' in openneutron.toml."


def image_transform(settings: Settings) -> ImageTransform | None:
    """Returns the transform that the options of images describe; None without such options.

    Raises `OptionError` for wrong options, and for options beside a `transform`, which replaces them.
    """
    given = settings.data
    options: dict[str, Any] = {
        "mean": given.mean or None, "std": given.std or None, "scale": given.scale, "resize": _size(given.resize),
        "crop": _size(given.crop), "channels": given.channels,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    if given.transform is not None and options:
        raise OptionError(f"'transform' replaces the options of images. Leave out {', '.join(options)}.")
    if not options:
        return None
    from openneutron.data import ImageTransform  # verbs without data start faster

    return ImageTransform(**options)


def _size(numbers: tuple[float, ...]) -> int | tuple[int, ...] | None:
    if any(number != int(number) for number in numbers):
        raise OptionError(f"A size has whole numbers of pixels, not {', '.join(f'{number:g}' for number in numbers)}.")
    whole = tuple(map(int, numbers))
    return None if not whole else whole[0] if len(whole) == 1 else whole


def layers_of(settings: Settings) -> dict[str, str] | None:
    """Returns the option `layers` of `quantize`. Raises `OptionError` for a wrong entry of the setting `layers`."""
    given = settings.quantize
    return {**dict.fromkeys(given.keep_float, "float"), **dict(map(_layer, given.layers))} or None


def _layer(entry: str) -> tuple[str, str]:
    name, equals, how = entry.rpartition("=")
    if not equals or not name or how not in _HOW:
        raise OptionError(
            f"'layers' takes {', '.join(f'MODULE={one}' for one in _HOW)}, not {entry!r}."
            f"{did_you_mean(how, _HOW) if equals else ''}"
        )
    return name, how
