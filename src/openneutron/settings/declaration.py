"""Declares every setting of a build once. The command line, `openneutron.toml` and the documents read this table."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from openneutron.core.files import exists, is_folder, similar_path
from openneutron.core.messages import did_you_mean
from openneutron.core.objects import check_object, is_reference
from openneutron.core.options import MOST_JOBS
from openneutron.errors import InputError, OptionError
from openneutron.settings.model_texts import LIBRARIES
from openneutron.settings.values import checked_value
from openneutron.targets import is_board_file

__all__ = [
    "ARRAY_FORMS", "RANDOM", "RECOVER", "SECTIONS", "BuildSettings", "DataSettings", "Field", "LowerSettings",
    "ModelSettings", "PackageSettings", "QuantizeSettings", "Settings", "fields_of", "names",
]  # fmt: skip

RECOVER = ("auto", "fast", "best", "none")
GRANULARITIES = ("per_tensor", "per_channel")
_NAMES_IN_LIBRARIES = tuple(f"{library}:" for library in LIBRARIES)
PAYLOADS = ("auto", "portable", "device")
RANDOM = "random"
"""The setting `calibrate` of a build that only estimates memory and time."""
ARRAY_FORMS = ("auto", "c", "incbin")


def setting(
    help: str,
    default: Any = None,
    *,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    path: str | None = None,
    words: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """Declares a setting. `least` and `most` are the limits of a number, both included.

    `path` is "file" for a file that must exist, "folder" for a folder that must exist and is written, "object" for a
    path that must exist, file.py:name or a name in a package, "name" for an object without the path, "target" for a
    target, which may be the path of a board file, and None if the setting is none of these. `words` are values that are
    not paths; a word that ends with a colon stands for all values that begin with it.
    """
    metadata = {
        "help": help, "choices": choices, "metavar": metavar, "path": path, "words": words,
        "least": least, "most": most,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelSettings:
    """The model and the shapes of its inputs."""

    model: str | None = setting(
        "The model: file.py:name or package.module:name of a class, function or module; a .pt2 of torch.export; a "
        "TorchScript file; timm:name; torchvision:name.",
        metavar="MODEL",
        path="object",
        words=_NAMES_IN_LIBRARIES,
    )
    args: str | None = setting(
        'Arguments of the class or function, such as "width=16, classes=10". The values are Python literals.',
        metavar="ARGS",
    )
    weights: str | None = setting(
        "A state dict or a checkpoint (.pt, .pth, .ckpt, .bin, .safetensors). For timm and torchvision: 'none' keeps "
        "random weights; otherwise the package's pretrained weights are loaded.",
        metavar="FILE",
        path="file",
        words=("none",),
    )
    input: tuple[str, ...] = setting(
        "The shape of an input, such as 1,3,32,32. A dtype may precede it (int64:1,128), and a name may precede "
        "both (mask=bool:1,128). Repeat the option for each input.",
        (),
        metavar="SHAPE",
    )
    channels_last: bool = setting("The program takes inputs in channels-last memory format.", False)
    unsafe: bool = setting("Unpickle files of weights that contain more than tensors. They can run any code.", False)


@dataclass(frozen=True)
class DataSettings:
    """The data for calibration and evaluation, and their transform."""

    calibrate: str | None = setting(
        "Inputs for calibration: a folder of images, .npy, .npz or WAV files; one such file or a CSV; file.py:function "
        "that yields inputs. With 'random', build estimates memory and time without data; the accuracy is not valid.",
        metavar="DATA",
        path="object",
        words=(RANDOM,),
    )
    calibration_samples: int = setting(
        "The largest number of calibration inputs, spread evenly over the data.", 128, least=1
    )
    evaluate: str | None = setting(
        "Labelled data: a folder with a folder for each class; a CSV of path and label; file.py:function that yields "
        "pairs of inputs and label.",
        metavar="DATA",
        path="object",
    )
    evaluation_samples: int | None = setting(
        "The largest number of labelled samples. All, if it is not given.", least=1
    )
    labels: str | None = setting(
        "A text file with the name of one class on each line, in the order of the model's outputs.",
        metavar="FILE",
        path="file",
    )
    metric: str = setting(
        "top1, top5, or file.py:function of outputs and label.",
        "top1",
        metavar="METRIC",
        path="name",
        words=("top1", "top5"),
    )
    transform: str | None = setting(
        "file.py:function of one sample; timm:name or torchvision:name for the transform of these weights. It replaces "
        "resize, crop, scale, mean, std and channels.",
        metavar="TRANSFORM",
        path="name",
        words=_NAMES_IN_LIBRARIES,
    )
    resize: tuple[float, ...] = setting(
        "Resize images: one number for the shorter side, or height,width. By default, the size of the model's input.",
        (),
        metavar="SIZE",
    )
    crop: tuple[float, ...] = setting("Crop images at the centre: one number, or height,width.", (), metavar="SIZE")
    scale: float | None = setting("Multiply pixels from 0 to 255 by this number. By default, 1/255.")
    mean: tuple[float, ...] = setting("Subtract this mean of each channel after the scaling.", (), metavar="MEAN,...")
    std: tuple[float, ...] = setting(
        "Divide by this standard deviation of each channel after the mean.", (), metavar="STD,..."
    )
    channels: str | None = setting(
        "The order of the channels of images. By default, rgb, or grey for an input of one channel. The command line "
        "also takes --rgb and --bgr.",
        choices=("rgb", "bgr", "grey"),
    )


@dataclass(frozen=True)
class QuantizeSettings:
    """The options of `quantize`, under their own names, and short forms of two of them."""

    recover: str = setting(
        "How accuracy is recovered after quantization: fast uses few calibration inputs; auto uses all of them, and "
        "trains recurrent networks; best tries several recipes within the recovery seconds; none recovers nothing.",
        "auto",
        choices=RECOVER,
    )
    recovery_seconds: float = setting("The time limit of the recovery best, in seconds.", 1800.0, least=0)
    per_channel: bool = setting("Use one scale for each output channel of weights (SDK 25.09 and later).", False)
    keep_float: tuple[str, ...] = setting(
        "Leave a module in float. The name of a module; * matches any text. Repeatable.", (), metavar="MODULE"
    )
    layers: tuple[str, ...] = setting(
        "The granularity of one layer: MODULE=float, MODULE=per_channel or MODULE=per_tensor. Repeatable.",
        (),
        metavar="MODULE=HOW",
    )
    weight_granularity: str = setting("The granularity of all weights.", "per_tensor", choices=GRANULARITIES)
    weight_bits: int = setting("The number of bits of weights, 2 to 8.", 8, least=2, most=8)
    equalize: bool = setting("Equalize the ranges of the channels of neighbouring layers.", True)
    correct_bias: bool = setting("Correct biases by the means of activations.", True)
    wide: tuple[str, ...] = setting(
        "Hold a value in two int8 tensors: the name of an LSTM or of an input, or auto. Repeatable.", (), metavar="NAME"
    )
    strict: bool = setting("Export the model with strict=True, an option of torch.export.export.", False)
    batch_size: int | None = setting("The number of samples that calibration runs at once.", least=1)
    jobs: int = setting("The number of processes for calibration and evaluation.", 1, least=1, most=MOST_JOBS)
    stop_when_converged: bool = setting("End calibration when ranges no longer change.", False)


@dataclass(frozen=True)
class LowerSettings:
    """The options of `lower`, under their own names."""

    int8_io: bool = setting("The program takes and returns int8.", False)
    neutron_converter_flavor: str | None = setting(
        "The release of NXP's converter, such as SDK_25_06. --flavor is the same.", metavar="FLAVOR"
    )
    payload: str = setting(
        "What the delegates contain: portable is TFLite, which a host runs; device is microcode, which the board runs; "
        "auto is device if NXP's converter is installed, else portable.",
        "auto",
        choices=PAYLOADS,
    )
    operators_not_to_delegate: tuple[str, ...] = setting(
        "Keep an operator on the CPU: its name, such as aten::silu. Repeatable.", (), metavar="OPERATOR"
    )
    extra_flags: str | None = setting(
        "Fields of the compilationOpts of NXP's converter, as name=value.", metavar="FLAGS"
    )
    intermediates_dir: str | None = setting(
        "An existing folder, to which the TFLite model of each partition and the dumps of passes are written.",
        metavar="FOLDER",
        path="folder",
    )
    use_neutron_for_format_conversion: bool = setting("The NPU converts between NCHW and NHWC.", True)
    fetch_constants_to_sram: bool = setting("Weights stay in flash and are fetched to SRAM layer by layer.", False)
    dump_kernel_selection_code: bool = setting(
        "Write the C file that selects the NPU kernels of a device program.", False
    )
    use_profiling: bool = setting(
        "The program measures the time of its kernels on the board; see `openneutron profile`.", False
    )


@dataclass(frozen=True)
class BuildSettings:
    """The target, and what a build writes besides the program."""

    target: str = setting(
        "The target: a chip or a board of `openneutron targets`, or a board file (.toml).",
        "imxrt700",
        metavar="TARGET",
        path="target",
    )
    analyze: bool = setting("Find the layers that lose accuracy, for the report.", True)
    try_changes: bool = setting(
        "If the program does not fit on the board, measure changes that may make it fit, smaller images included.", True
    )
    date: str | None = setting(
        "The date that the report shows. By default, the current date. A build writes it to openneutron.toml, so that "
        "a second build gives the same bytes.",
        metavar="YYYY-MM-DD",
    )


@dataclass(frozen=True)
class PackageSettings:
    """The options of `package`, under their own names."""

    name: str = setting("The prefix of files, macros and functions, an identifier of C.", "model", metavar="NAME")
    section: str | None = setting("The section of the linker script for the program, such as .flash_model.")
    array: str = setting("The form of the program's array; auto is incbin for large ones.", "auto", choices=ARRAY_FORMS)
    tolerance: float = setting("The difference of outputs that the test on the board allows, in LSBs.", 1.0, least=0)


Section = ModelSettings | DataSettings | QuantizeSettings | LowerSettings | BuildSettings | PackageSettings
SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "quantize": QuantizeSettings,
    "lower": LowerSettings,
    "build": BuildSettings,
    "package": PackageSettings,
}
"""The tables of `openneutron.toml`, by name."""


@dataclass(frozen=True)
class Field:
    """One setting, as the command line and the documents see it."""

    section: str
    name: str
    kind: str
    """A key of `KINDS`."""
    default: Any
    help: str
    choices: tuple[str, ...]
    metavar: str | None
    path: str | None
    words: tuple[str, ...]
    least: float | None
    most: float | None

    def path_in(self, value: Any) -> str | None:
        """Returns the path in a value of this setting; None if it names a package or a word, or is not a path.

        "net.py:Net" and "photos/" contain paths. "package.module:name", "timm:name" and "none" do not.
        """
        if self.path is None or not isinstance(value, str) or self.is_word(value):
            return None
        if self.path == "target":
            return value if is_board_file(value) else None
        if self.path not in ("file", "folder") and is_reference(value):
            return value.rpartition(":")[0] if is_file_reference(value) else None
        return value

    def not_a_word(self, path: str) -> str:
        """Returns a path in a form that is not one of `words`: "./random" for a folder with the name "random"."""
        return f"./{path}" if self.is_word(path) else path

    def is_word(self, value: str) -> bool:
        """Whether a value is one of `words`."""
        return value in self.words or value.startswith(tuple(word for word in self.words if word.endswith(":")))


def fields_of(section: str) -> tuple[Field, ...]:
    """Returns the settings of a section, in the order of their declaration."""
    return tuple(
        Field(section, one.name, str(one.type).removesuffix(" | None"), one.default, **one.metadata)
        for one in dataclasses.fields(SECTIONS[section])
    )


def names() -> Iterator[str]:
    """Returns the names of all settings. No two sections have a setting of the same name."""
    for section in SECTIONS:
        yield from (one.name for one in fields_of(section))


@dataclass(frozen=True)
class Settings:
    """All settings of a build. Raises `OptionError` for values that are not allowed."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    lower: LowerSettings = LowerSettings()
    build: BuildSettings = BuildSettings()
    package: PackageSettings = PackageSettings()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Returns the settings with these values, by name, and defaults for all others.

        A value None means that it is not given. Raises `OptionError` for an unknown name and for a wrong value.
        """
        known = {one.name: one for section in SECTIONS for one in fields_of(section)}
        parts: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for name, value in values.items():
            if name not in known:
                raise OptionError(f"There is no setting '{name}'.{did_you_mean(name, known)}")
            if value is not None:
                parts[known[name].section][name] = _checked(known[name], value)
        return cls(**{section: SECTIONS[section](**given) for section, given in parts.items()})  # type: ignore[arg-type]

    def given(self) -> dict[str, dict[str, Any]]:
        """Returns the values that differ from the defaults, by section and name."""
        return {
            section: {
                one.name: value
                for one in fields_of(section)
                if (value := getattr(getattr(self, section), one.name)) != one.default
            }
            for section in SECTIONS
        }

    def paths(self) -> Iterator[str]:
        """Returns the paths that the settings name and that are read. The folder of `intermediates_dir` is written."""
        for section in SECTIONS:
            for one in fields_of(section):
                path = one.path_in(getattr(getattr(self, section), one.name))
                if path is not None and one.path != "folder":
                    yield path

    def check_paths(self, names: Container[str] | None = None) -> None:
        """Raises `InputError` for a path that does not exist. With `names`, only these settings are checked."""
        for section in SECTIONS:
            for one in fields_of(section):
                value = getattr(getattr(self, section), one.name)
                if one.path is not None and value is not None and (names is None or one.name in names):
                    _check_path(one, value)


def _checked(declared: Field, value: Any) -> Any:
    found = checked_value(declared.name, declared.kind, value)
    if declared.choices and found not in declared.choices:
        raise OptionError(
            f"'{declared.name}' is one of {', '.join(declared.choices)}, not {found!r}."
            f"{did_you_mean(found, declared.choices)}"
        )
    _check_limits(declared, found)
    return found


def _check_limits(declared: Field, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    least, most = declared.least, declared.most
    if least is not None and most is not None and not least <= value <= most:
        raise OptionError(f"'{declared.name}' is a number from {least:g} to {most:g}, not {value!r}.")
    if least is not None and value < least:
        raise OptionError(f"'{declared.name}' is a number of {least:g} or more, not {value!r}.")
    if most is not None and value > most:
        raise OptionError(f"'{declared.name}' is a number of {most:g} or less, not {value!r}.")


def is_file_reference(value: str) -> bool:
    """Whether a text has the form file.py:name."""
    return is_reference(value) and value.rpartition(":")[0].endswith(".py")


def _check_path(declared: Field, value: str) -> None:
    if declared.is_word(value):
        return
    if declared.path == "target" and declared.path_in(value) is None:
        return
    if declared.path in ("object", "name") and is_reference(value):
        if is_file_reference(value):
            check_object(value, f"The setting '{declared.name}'")
        return
    if declared.path == "name":
        words = [f"{word}name" if word.endswith(":") else word for word in declared.words]
        raise OptionError(
            f"'{declared.name}' is {', '.join(words)} or file.py:function, not {value!r}.{did_you_mean(value, words)}"
        )
    if not exists(value):
        raise InputError(f"{declared.name}: '{value}' does not exist.{similar_path(value)}")
    if declared.path == "file" and is_folder(value):
        raise InputError(f"{declared.name}: '{value}' is a folder. Give a file.")
    if declared.path == "folder" and not is_folder(value):
        raise InputError(f"{declared.name}: '{value}' is not a folder. Give a folder that exists.")
