"""Builds from settings: loads the model and the data that they name."""

from __future__ import annotations

import inspect
import logging
import os
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from openneutron.accuracy.analyze import Analysis, analyze
from openneutron.accuracy.board_outputs import DEFAULT_LSB, BoardValidation, Normalization, validate_board
from openneutron.accuracy.board_package import read_package
from openneutron.accuracy.evaluate import evaluate_side_by_side
from openneutron.accuracy.validate import validate
from openneutron.core.messages import listed
from openneutron.core.objects import is_reference
from openneutron.core.progress import counting_bar
from openneutron.data import Samples, read_data
from openneutron.documented_flow import NeutronQuantizer
from openneutron.errors import OptionError
from openneutron.flow import lower, quantize
from openneutron.model.exporting import loaded_program
from openneutron.model.loading import load_model
from openneutron.model.shapes import example_inputs_of
from openneutron.neutron_program import NeutronProgram
from openneutron.quantized_model import QuantizedModel
from openneutron.results.side_by_side import SideBySide
from openneutron.results.validation import Validation
from openneutron.runtime import load
from openneutron.settings import SECTIONS, Field, Settings, fields_of, settings_text
from openneutron.settings.checks import check_settings, image_transform, layers_of, required_message
from openneutron.settings.declaration import RANDOM
from openneutron.settings.package_files import is_package
from openneutron.settings.toml import FILE_NAME, read_settings
from openneutron.workflow.building import Build, Step, build, build_folder, no_step, write_build
from openneutron.workflow.data_settings import transform_from
from openneutron.workflow.folders import BuildFolder

__all__ = [
    "analyze_from_settings", "build_from_settings", "calibration_of", "evaluate_from_settings",
    "evaluation_of", "example_inputs_from", "float_model_of",
    "lower_from_settings", "lower_options", "model_from", "quantize_from_settings", "quantize_options",
    "source_root", "validate_board_from_settings", "validate_from_settings",
]  # fmt: skip

_LOGGER = logging.getLogger(__name__)
RANDOM_INPUTS = 8
"""The number of inputs of a calibration with random inputs."""
MOST_CLASSES = 20
"""The largest number of classes that a line of the log names."""
DATE_VARIABLE = "SOURCE_DATE_EPOCH"
"""The environment variable that reproducible builds use for the date, in seconds since 1970."""


def model_from(settings: Settings) -> nn.Module | ExportedProgram:
    """Loads the model. Raises the errors of `load_model`."""
    given = settings.model
    if given.model is None:
        raise OptionError(required_message("model"))
    model = load_model(given.model, args=given.args, weights=given.weights, unsafe=given.unsafe)
    if _LOGGER.isEnabledFor(logging.INFO):
        count = sum(one.numel() for one in model.parameters() if not is_lazy(one))  # a lazy one has no shape yet
        source = "weights that the model brings" if given.weights is None else f"weights of {given.weights}"
        _LOGGER.info("Model %s: %s parameters, %s.", given.model, f"{count:,}", source)
    return model


def example_inputs_from(settings: Settings) -> Any:
    """Returns the example inputs; None if the settings give no shapes."""
    if not settings.model.input:
        return None
    return example_inputs_of(settings.model.input, channels_last=settings.model.channels_last)


def _examples(settings: Settings, model: nn.Module | ExportedProgram) -> Any:
    """Returns the example inputs of the settings, else one image of the size that a model of timm states."""
    examples = example_inputs_from(settings)
    if examples is not None or isinstance(model, ExportedProgram):
        return examples
    size = getattr(model, "default_cfg", {}).get("input_size")  # timm
    if size is None:
        raise OptionError("Give the shape of each input: --input 1,3,224,224.")
    shape = ",".join(map(str, (1, *size)))
    return example_inputs_of([shape], channels_last=settings.model.channels_last)


def float_model_of(folder: BuildFolder) -> dict[str, Any]:
    """Returns the float model of a build, its example inputs and the options of `quantize`, for `try_changes`.

    Raises `OptionError` for a bare program, and the errors of `read_settings` and `load_model`.
    """
    if folder.settings is None:
        raise OptionError(
            f"Sizes of images are tried with the float model, which {FILE_NAME} in the folder of a build names. Give "
            "the folder of a build."
        )
    settings = read_settings(folder.settings)
    model = model_from(settings)
    return {"model": model, "example_inputs": _examples(settings, model), **quantize_options(settings)}


def calibration_of(settings: Settings) -> Samples:
    """Returns the calibration data, without the transform. Raises the errors of `read_data`."""
    data = read_data(settings.data.calibrate, limit=settings.data.calibration_samples)
    _log_data("Calibration", data, settings)
    return data


def _log_data(what: str, data: Samples, settings: Settings) -> None:
    """Logs the number of samples, the first and the last file, the classes and the transform."""
    count = "a generator of samples" if data.is_given else f"{len(data):,} samples"
    files = "" if not data.paths else f", from {data.paths[0]} to {data.paths[-1]}"
    classes = "" if data.classes is None else f", {len(data.classes)} classes: {listed(data.classes, MOST_CLASSES)}"
    given = settings.data.transform or image_transform(settings)
    transform = given or "none but that of images and recordings to the model's input"
    _LOGGER.info("%s: %s of %s%s%s. Transform: %s.", what, count, data.name, files, classes, transform)


def _random_calibration(model: nn.Module | ExportedProgram, examples: Any) -> list[Any]:
    """Returns inputs like the examples: normal random numbers for floats, and the examples' values for other tensors.

    Raises `OptionError` for an exported program without example inputs, if no shapes are given either.
    """
    if examples is None and isinstance(model, ExportedProgram) and model.example_inputs is not None:
        args, kwargs = model.example_inputs
        examples = dict(kwargs) if kwargs and not args else args
    if examples is None:
        raise OptionError("Give the shape of each input: --input 1,3,224,224.")
    generator = torch.Generator().manual_seed(0)

    def like(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return torch.randn(value.shape, generator=generator).to(value) if is_float else value

    return [tree_map(like, examples) for _ in range(RANDOM_INPUTS)]


def evaluation_of(settings: Settings) -> Samples | None:
    """Returns the labelled data, without the transform; None if the settings give none."""
    given = settings.data
    if given.evaluate is None:
        return None
    data = read_data(given.evaluate, labelled=True, labels=given.labels, limit=given.evaluation_samples)
    _log_data("Evaluation", data, settings)
    return data


def quantize_options(settings: Settings) -> dict[str, Any]:
    """Returns the options of `quantize`, by name. Raises `OptionError` for a wrong entry of `layers`."""
    given = settings.quantize
    return {
        "recover": None if given.recover == "none" else given.recover,
        "recovery_seconds": given.recovery_seconds,
        "weight_granularity": "per_channel" if given.per_channel else given.weight_granularity,
        "layers": layers_of(settings),
        "weight_bits": given.weight_bits,
        "equalize": given.equalize,
        "correct_bias": given.correct_bias,
        "wide": "auto" if given.wide == ("auto",) else given.wide or None,
        "strict": given.strict,
        "batch_size": given.batch_size,
        "stop_when_converged": given.stop_when_converged,
    }


def lower_options(settings: Settings) -> dict[str, Any]:
    """Returns the options of `lower`, by name."""
    given = settings.lower
    return {
        "int8_io": given.int8_io,
        "neutron_converter_flavor": given.neutron_converter_flavor,
        "payload": given.payload,
        "operators_not_to_delegate": given.operators_not_to_delegate or None,
        "extra_flags": given.extra_flags,
        "intermediates_dir": given.intermediates_dir,
        "use_neutron_for_format_conversion": given.use_neutron_for_format_conversion,
        "fetch_constants_to_sram": given.fetch_constants_to_sram,
        "dump_kernel_selection_code": given.dump_kernel_selection_code,
        "use_profiling": given.use_profiling,
    }


def quantize_from_settings(settings: Settings, *, progress: bool | None = None) -> QuantizedModel:
    """Quantizes the model that the settings name. Raises the errors of `check_settings` and `quantize`."""
    check_settings(settings, "model", "calibrate")
    model = model_from(settings)
    return quantize(
        model,
        _examples(settings, model),
        calibration_of(settings),
        settings.build.target,
        transform=transform_from(settings),
        jobs=settings.quantize.jobs,
        progress=progress,
        **quantize_options(settings),
    )


def analyze_from_settings(
    settings: Settings, quantized: str | os.PathLike[str] | None = None, *, samples: int, progress: bool | None = None
) -> Analysis:
    """Analyzes the model that the settings name on its calibration data.

    `quantized` is a file of `QuantizedModel.save`. Without it, the model is quantized first. Raises the errors of
    `check`, `quantize` and `analyze`.
    """
    data, transform = calibration_of(settings), transform_from(settings)
    if quantized is None:
        found = quantize_from_settings(settings, progress=progress)
        with counting_bar("analyze", progress) as done:
            return analyze(None, found, data, transform=transform, samples=samples, progress=done)
    options = quantize_options(settings)
    selected = {name: options[name] for name in inspect.signature(NeutronQuantizer).parameters if name in options}
    loaded = loaded_program(quantized)
    if selected["wide"] == "auto":  # the file has the wide states already
        selected["wide"] = None
    elif selected["wide"]:  # and the wide inputs
        inputs = loaded.graph_signature.user_inputs
        selected["wide"] = [key for key in selected["wide"] if key not in inputs]
    quantizer = NeutronQuantizer(settings.build.target, **selected)
    model = model_from(settings)
    with counting_bar("analyze", progress) as done:
        return analyze(model, loaded, data, transform=transform, samples=samples, quantizer=quantizer, progress=done)


def evaluate_from_settings(
    settings: Settings,
    program: Path,
    quantized: Path | None = None,
    *,
    jobs: int = 1,
    progress: bool | None = None,
    isolated: bool = True,
) -> SideBySide:
    """Evaluates a program beside the float model and the quantized model, as far as they are given.

    See `load` for `isolated`.

    Raises the errors of `evaluate`.
    """
    data = evaluation_of(settings)
    if data is None:
        raise OptionError(required_message("evaluate"))
    runs: dict[str, Any] = {}
    if settings.model.model is not None:
        runs["float"] = model_from(settings)
    if quantized is not None:
        runs["int8"] = loaded_program(quantized)
    runs[".pte"] = load(program, isolated=isolated)
    metric, transform = settings.data.metric, transform_from(settings)
    with counting_bar("evaluate", progress) as done:
        return evaluate_side_by_side(runs, data, metric, jobs, transform=transform, progress=done)


def validate_from_settings(
    settings: Settings, program: Path, quantized: Path | None = None, *, isolated: bool = True, **options: Any
) -> Validation:
    """Validates a program against the float model and the quantized model, as far as they are given.

    The inputs are the calibration data of the settings, or random. `options` are the options of `validate`. See `load`
    for `isolated`.
    """
    model = None if settings.model.model is None else model_from(settings)
    data = None if settings.data.calibrate in (None, RANDOM) else calibration_of(settings)
    converted = None if quantized is None else loaded_program(quantized)
    transform = None if data is None else transform_from(settings)
    host = load(program, isolated=isolated)
    return validate(host, model, data, quantized=converted, transform=transform, **options)


def validate_board_from_settings(
    settings: Settings,
    program: Path,
    dump: Path,
    *,
    samples: int,
    max_lsb: float | None = None,
    isolated: bool = True,
) -> BoardValidation:
    """Compares the outputs of a board with those of a program, or of the folder of a package or of a build.

    The inputs are the test vectors of a package, else the calibration data of the settings, else random. `max_lsb` None
    stands for the tolerance of a package, else for 1. See `load` for `isolated`.

    Raises the errors of `load`, `read_package` and `validate_board`.
    """
    limit = DEFAULT_LSB if max_lsb is None else max_lsb
    normalization = _normalization(settings)
    if is_package(program):
        package = read_package(program, isolated=isolated)
        limit = package.tolerance if max_lsb is None else max_lsb
        return validate_board(package.program, dump, package.vectors, max_lsb=limit, normalization=normalization)
    host = load(BuildFolder.of(program).program, isolated=isolated)
    if settings.data.calibrate in (None, RANDOM):
        return validate_board(host, dump, samples=samples, max_lsb=limit, normalization=normalization)
    data, transform = calibration_of(settings), transform_from(settings)
    return validate_board(
        host, dump, data, samples=samples, transform=transform, max_lsb=limit, normalization=normalization
    )


def _normalization(settings: Settings) -> Normalization | None:
    """Returns the normalization of images; None if the settings give none."""
    given = settings.data
    if not (given.mean or given.std):
        return None
    scale = 1 / 255 if given.scale is None else given.scale
    return Normalization(given.mean or (0.0,), given.std or (1.0,), scale)


def lower_from_settings(file: str | os.PathLike[str], settings: Settings, *, target: str | None) -> NeutronProgram:
    """Lowers a file of `QuantizedModel.save`. `target` None takes the target in the file."""
    return lower(os.fspath(file), target=target, **lower_options(settings))


def build_from_settings(
    settings: Settings,
    output: str | os.PathLike[str],
    *,
    progress: bool | None = None,
    step: Step | None = None,
) -> Build:
    """Builds what the settings name, and writes the files of `build` and `openneutron.toml` to the folder `output`.

    A build with the written `openneutron.toml` gives the same bytes again, because the file also holds the date of the
    report. Raises the errors of `check_settings` and `build`.
    """
    check_settings(settings, "model", "calibrate", allows_random=True)
    is_random = settings.data.calibrate == RANDOM
    with build_folder(output) as folder:
        settings = replace(settings, build=replace(settings.build, date=settings.build.date or _today()))
        others = {FILE_NAME: settings_text(settings, folder).encode()}
        model = model_from(settings)
        examples = _examples(settings, model)
        root = source_root(settings)
        options = {**quantize_options(settings), **({"recover": None} if is_random else {})}
        built = build(
            model,
            examples,
            _random_calibration(model, examples) if is_random else calibration_of(settings),
            target=settings.build.target,
            evaluation=evaluation_of(settings),
            metric=settings.data.metric,
            transform=None if is_random else transform_from(settings),
            analyze=settings.build.analyze and not is_random,
            try_changes=settings.build.try_changes,
            name=_name(settings),
            date=settings.build.date,
            settings=_shown(settings),
            source_root=root,
            jobs=settings.quantize.jobs,
            progress=progress,
            step=step,
            **options,
            **lower_options(settings),
        )
        with (step or no_step)("write"):
            return write_build(built, folder, others, source_root=root)


def _name(settings: Settings) -> str:
    """Returns the name of the model for the report: its class, its name in its package, or its file."""
    model = str(settings.model.model)
    is_name = is_reference(model) or _field("model").is_word(model)
    return re.split("[:/]", model)[-1] if is_name else Path(model).stem


def source_root(settings: Settings) -> Path | None:
    """Returns the folder of the model's file, so that source lines do not depend on the current folder."""
    path = _field("model").path_in(settings.model.model)
    return None if path is None else Path(path).parent


def _field(name: str) -> Field:
    return next(one for section in SECTIONS for one in fields_of(section) if one.name == name)


def _shown(settings: Settings) -> dict[str, Any]:
    """Returns the settings for the report. A path is shown by its name, which is the same in every folder."""
    given = {name: value for values in settings.given().values() for name, value in values.items() if name != "date"}
    return {name: _without_folder(_field(name), value) for name, value in given.items()}


def _without_folder(declared: Field, value: Any) -> Any:
    path = declared.path_in(value)
    return value if path is None else declared.not_a_word((Path(path).name or path) + value[len(path) :])


def _today() -> str:
    """Returns the date of SOURCE_DATE_EPOCH if that is set, else the current date."""
    seconds = os.environ.get(DATE_VARIABLE)
    if not seconds:
        return datetime.now().astimezone().date().isoformat()
    wrong = f"{DATE_VARIABLE} must be a number of seconds since 1970, up to the year 9999, not {seconds[:40]!r}."
    if not seconds.isdecimal():
        raise OptionError(wrong)
    try:
        return datetime.fromtimestamp(int(seconds), UTC).date().isoformat()
    except (ValueError, OverflowError, OSError) as error:
        raise OptionError(wrong) from error
