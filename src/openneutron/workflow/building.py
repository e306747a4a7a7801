"""Builds a program from a float model: quantizes, lowers, measures accuracy, and writes a report."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from openneutron.accuracy.analyze import Analysis, analyze
from openneutron.accuracy.evaluate import check_classes, evaluate_side_by_side
from openneutron.accuracy.labelled import LabelledData
from openneutron.accuracy.validate import validate
from openneutron.compile_spec import CompileOptions, converter_fields, list_of_names
from openneutron.core.files import created_folder, write_files
from openneutron.core.messages import did_you_mean
from openneutron.core.progress import counting_bar, phase_bar
from openneutron.documented_flow import NeutronQuantizer
from openneutron.errors import OptionError
from openneutron.flow import lower, quantize, quantize_for_lowering
from openneutron.model.data import Data
from openneutron.neutron_program import NeutronProgram
from openneutron.page import Summary, page_of, summarize
from openneutron.page.html import check_page_packages
from openneutron.partition.blocked_names import check_forms
from openneutron.quantized_model import QuantizedModel
from openneutron.results.side_by_side import SideBySide
from openneutron.results.validation import Validation
from openneutron.runtime.native import is_installed
from openneutron.settings.build_files import PAGE, PROGRAM, QUANTIZED, SUMMARY
from openneutron.targets import Target
from openneutron.vendor.sdk import choose_converter
from openneutron.workflow.trying import try_changes

__all__ = [
    "Build",
    "Step",
    "build",
    "build_folder",
    "no_step",
    "write_build",
]

WRITING_SHARES = (10, 8, 1)
"""The shares of the time for the file of the quantized model, for the page, and for the disk."""
SAMPLES = 16
"""The largest number of calibration inputs for the validation and the analysis."""

Step = Callable[[str], AbstractContextManager[None]]
"""Called with the title of a step. The step runs within the context manager that it returns."""


@dataclass(frozen=True)
class Build:
    """The results of a build."""

    quantized: QuantizedModel
    program: NeutronProgram
    summary: Summary
    """The content of `summary.json` and of the report."""
    accuracy: SideBySide | None = None
    """The results on the labelled samples; None without them."""
    validation: Validation | None = None
    """The differences of the program from the float model and the converted module; None without the native module."""
    analysis: Analysis | None = None
    """The layers that lose accuracy; None with `analyze=False`."""
    folder: Path | None = None
    """The folder that the files were written to; None without `output`."""


def build(
    model: Any,
    example_inputs: Any,
    calibration: Data,
    output: str | os.PathLike[str] | None = None,
    *,
    target: Target = "imxrt700",
    evaluation: LabelledData | None = None,
    metric: Any = "top1",
    transform: Callable[[Any], Any] | None = None,
    analyze: bool = True,
    try_changes: bool = True,
    name: str | None = None,
    date: str | None = None,
    settings: Mapping[str, Any] | None = None,
    source_root: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    progress: bool | None = None,
    step: Step | None = None,
    **options: Any,
) -> Build:
    """Quantizes and lowers a model, measures its accuracy, and writes the program and a report.

        build(model.eval(), (torch.randn(1, 3, 32, 32),), images, "out", evaluation=labelled, target="imxrt700")

    - `model`, `example_inputs`, `calibration`, `transform`, `jobs`, `progress`: as for `quantize`.
    - `output`: a folder for model.pte, quantized.pt2, report.html and summary.json. It is created if it does not
      exist. None writes no files.
    - `evaluation`: labelled data in the forms that `evaluate` takes. Without them, the report has no accuracy, but the
      SQNR of the outputs.
    - `metric`: "top1", "top5", or a function of outputs and label that returns a number.
    - `analyze`: whether to find the layers that lose accuracy.
    - `try_changes`: whether to try changes if the program does not fit on the target's board. The model is lowered
      again, once for each change of options or of the layout of inputs, and quantized and lowered again for images with
      3/4 and half of their sides. The report lists the memory that each changed program needs. The accuracy of smaller
      images is not measured.
    - `name`, `date`: the name of the model and the date, for the report.
    - `settings`: options of the build, for the report.
    - `source_root`: the folder to which the source lines in the report are relative, by default the current one.
    - `step`: called with the title of each step, to show progress.
    - `options`: options of `quantize` and of `lower`, by their names.

    A program runs on this machine only with the native module. Without it, the accuracy is that of the float model and
    the converted module, and there is no validation.

    Raises the errors of `quantize`, `lower`, `evaluate` and `analyze`, `OptionError` for an unknown option and for a
    missing package of the report, and `OutputError` if the files cannot be written.
    """
    run = step or no_step
    with ExitStack() as stack:
        folder = None if output is None else stack.enter_context(build_folder(output))
        if isinstance(calibration, Iterator):  # validation and analysis read the inputs again
            calibration = list(calibration)
        quantize_options, lower_options = _split(options)
        not_delegated = list_of_names(lower_options.get("operators_not_to_delegate"))
        check_forms(not_delegated)
        converter_fields(lower_options.get("extra_flags"))
        if lower_options.get("payload") == "device":  # a missing converter is reported before the quantization
            choose_converter(lower_options.get("neutron_converter_flavor"))
        if evaluation is not None:
            check_classes(model, example_inputs, evaluation, metric)
        with run("quantize"):
            quantized = quantize_for_lowering(
                not_delegated,
                model,
                example_inputs,
                calibration,
                target,
                transform=transform,
                jobs=jobs,
                progress=progress,
                **quantize_options,
            )
        with run("lower"):
            program = lower(quantized, target=target, **lower_options)
        measure = _Measurements(calibration, evaluation, metric, transform, jobs, progress, run)
        accuracy = measure.accuracy(model, quantized, program)
        validation = measure.validation(quantized, program)
        analysis = measure.analysis(quantized) if analyze else None
        on_board = None
        board = None if program.board is None else program.board.board
        if try_changes and board is not None and board.regions:
            with run("try changes"):
                on_board = _try_changes(
                    program, quantized, model=model, example_inputs=example_inputs, **quantize_options
                )
        with run("report"):
            summary = summarize(
                name or type(model).__name__,
                program,
                quantized=quantized,
                analysis=analysis,
                accuracy=accuracy or (),
                validation=validation or (),
                options=settings or options,
                date=date,
                source_root=source_root,
                on_board=on_board,
            )
        built = Build(quantized, program, summary, accuracy, validation, analysis)
        if folder is None:
            return built
        with run("write"):
            return write_build(built, folder, source_root=source_root)


@dataclass(frozen=True)
class _Measurements:
    """Measures a quantized model and its program on the data of a build."""

    calibration: Data
    evaluation: LabelledData | None
    metric: Any
    transform: Callable[[Any], Any] | None
    jobs: int
    progress: bool | None
    step: Step

    def accuracy(self, model: Any, quantized: QuantizedModel, program: NeutronProgram) -> SideBySide | None:
        """Returns the results on the labelled samples. Returns None without them."""
        if self.evaluation is None:
            return None
        runs = {"float": model, "int8": quantized, **({".pte": program} if is_installed() else {})}
        with self.step("evaluate"), counting_bar("evaluate", self.progress) as done:
            return evaluate_side_by_side(
                runs, self.evaluation, self.metric, self.jobs, transform=self.transform, progress=done
            )

    def validation(self, quantized: QuantizedModel, program: NeutronProgram) -> Validation | None:
        """Returns the differences of the program from its references. Returns None without the native module."""
        if not is_installed():
            return None
        with self.step("validate"):
            return validate(
                program, None, self.calibration, quantized=quantized, samples=SAMPLES, transform=self.transform
            )

    def analysis(self, quantized: QuantizedModel) -> Analysis:
        """Returns the accuracy of each layer."""
        with self.step("analyze"), counting_bar("analyze", self.progress) as done:
            return analyze(None, quantized, self.calibration, transform=self.transform, samples=SAMPLES, progress=done)


_try_changes = try_changes


def no_step(_: str) -> AbstractContextManager[None]:
    """Shows nothing of a step."""
    return nullcontext()


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of `quantize` and those of `lower`."""
    quantize_options = {*inspect.signature(quantize).parameters, *inspect.signature(NeutronQuantizer).parameters}
    quantize_options -= {"model", "example_inputs", "calibration", "quantizer_options", "target", "neutron_target_spec"}
    lower_options = {"int8_io", *(field.name for field in fields(CompileOptions))} - {"target"}
    for name in options:
        if name not in quantize_options | lower_options:
            own = set(inspect.signature(build).parameters) - {"options"}
            raise OptionError(
                f"build() has no option '{name}'.{did_you_mean(name, quantize_options | lower_options | own)}"
            )
    return (
        {name: value for name, value in options.items() if name in quantize_options},
        {name: value for name, value in options.items() if name in lower_options},
    )


@contextmanager
def build_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Creates the folder of a build, and checks the packages of the report, before the first step.

    If the build fails or is interrupted, removes the folder if it was created here and is empty. Raises `OutputError`
    and `OptionError`.
    """
    check_page_packages()
    with created_folder(output) as folder:
        yield folder


def write_build(
    built: Build,
    folder: Path,
    others: Mapping[str, bytes] | None = None,
    *,
    source_root: str | os.PathLike[str] | None = None,
) -> Build:
    """Writes the files of a build, and `others` by their names, to `folder`. Returns the build with the folder.

    No file is replaced before all contents are made and written to temporary files. Raises `OutputError` if a file
    cannot be written.
    """
    with phase_bar("Writing", WRITING_SHARES) as end_phase:
        quantized = built.quantized.as_file(source_root)
        end_phase()
        page = page_of(built.summary).encode()
        end_phase()
        write_files(
            {
                **built.program.files(folder / PROGRAM),
                folder / QUANTIZED: quantized,
                folder / SUMMARY: built.summary.as_json().encode(),
                folder / PAGE: page,
                **{folder / name: content for name, content in (others or {}).items()},
            }
        )
    return replace(built, folder=folder)
