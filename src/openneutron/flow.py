"""The short flow: `quantize` and `lower` call the six steps of the documented flow."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import io
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from openneutron.calibration import CalibrationOptions
from openneutron.compile_spec import CompileOptions, list_of_names
from openneutron.core.boundary import typed_errors
from openneutron.core.files import output_path, write_file, write_files
from openneutron.core.progress import phase_bar
from openneutron.errors import CalibrationError, InputError, ModelError, OptionError
from openneutron.formats.method_memory import MethodMemory, memory_of
from openneutron.model.arguments import Leaf, text_of_leaves
from openneutron.model.data import Data, calibration_inputs, forms_of
from openneutron.model.examples import Examples, examples_of, leaves_of, to_tensors
from openneutron.model.exporting import (
    as_module,
    check_eval,
    digests,
    export,
    is_prepared,
    is_quantized,
    loaded_program,
    saved_program,
    target_of_file,
)
from openneutron.model.lifting import lifted_program
from openneutron.model.state import reset, samples_of
from openneutron.partition import quantized_io
from openneutron.partition.placing import Placed, Placement
from openneutron.quantizer import NeutronQuantizer
from openneutron.recovery.large_cell_states import modules_with_large_cell_states
from openneutron.recovery.layerwise import Samples
from openneutron.recovery.recipes import BEST, Recipe, quantize_by_recipe, recipe_of
from openneutron.recovery.search import SearchSpace, Trial, check_seconds, try_recipes
from openneutron.runtime.memory import measure
from openneutron.runtime.native import is_installed
from openneutron.runtime.program import INPUT_NAMES, HostProgram
from openneutron.targets import NeutronTargetSpec, Target
from openneutron.training.trainable import TrainableModel
from openneutron.vendor.device import compile_program, etrecord_path, kernel_selection_path
from openneutron.vendor.profiling import Kernel
from openneutron.vendor.sdk import converter_for

if TYPE_CHECKING:
    from rich.table import Table

    from openneutron.accuracy.result import Analysis
    from openneutron.firmware import Package
    from openneutron.report.estimate import Estimate

__all__ = ["NeutronProgram", "QuantizedModel", "lower", "quantize"]

LOWERING_SHARES = (2, 2, 2, 4)
"""The shares of the phases of `lower` in its time: export, placement, compilation, ExecuTorch's lowering."""
PREPARING_SHARES = (1, 1)
"""The shares of export and of the passes before annotation in the time before calibration."""


@dataclass(frozen=True)
class QuantizedModel:
    """A converted model. `quantize` returns it, and `lower` takes it."""

    module: GraphModule
    """The result of `convert_pt2e`, a regular PyTorch model."""
    example_inputs: tuple[Any, ...]
    """The positional arguments that the model was exported with."""
    target: str
    """The name of the chip that the model was quantized for."""
    reference: GraphModule | None = field(default=None, repr=False)
    """The float graph that was annotated. It computes the values of `module` without rounding, under the same names."""
    recipe: Recipe | None = None
    """The recipe that was followed. `quantize(..., recover=recipe)` follows it again."""
    trials: tuple[Trial, ...] = field(default=(), repr=False)
    """With `recover="best"`, the recipes that were tried, in order."""
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The keyword arguments that the model was exported with."""
    parameters: frozenset[str] = field(default=frozenset(), repr=False)
    """Digests of the float model's parameters. `analyze` compares them with those of the model that it gets."""
    board: NeutronTargetSpec | None = field(default=None, repr=False)
    """The board, if `quantize` was given one. `lower` gives it to the program. `save` stores the name of a
    board that OpenNeutron has a file of, but not a board file."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Runs the converted module on tensors or numpy arrays. Returns tensors. State is kept between calls."""
        return self.module(*tree_map(to_tensors, inputs), **tree_map(to_tensors, named))

    def __str__(self) -> str:
        from openneutron.report.summary import summary_of_model

        return summary_of_model(self)

    def _repr_html_(self) -> str:
        from openneutron.report.tables import model_table

        return model_table(self).as_html()

    def __rich__(self) -> Table:
        from openneutron.report.tables import model_table

        return model_table(self).as_rich()

    @property
    def examples(self) -> Examples:
        """The positional and keyword arguments that the model was exported with."""
        return Examples(self.example_inputs, self.example_kwargs)

    def reset(self) -> None:
        """Restores the state that the module had when the model was exported."""
        reset(self.module)

    def as_file(self, source_root: str | os.PathLike[str] | None = None) -> bytes:
        """Returns the content of the file that `save` writes."""
        target = self.target if self.board is None else self.board.known_name
        return saved_program(export(self.module, self.examples), target, source_root)

    def save(self, path: str | os.PathLike[str], *, source_root: str | os.PathLike[str] | None = None) -> None:
        """Exports the converted module and writes it to `path`, a file of torch.export (.pt2) that `lower` takes.

        The file holds the name of the chip, or of a board that OpenNeutron has a file of. It does not hold a board
        file: give that to `lower` again. Nor does it hold the float model, which `analyze` needs again.
        The user's source lines in it are relative to `source_root`, by default the current folder.
        Raises `OutputError` if the file cannot be written, and `OptionError` for another suffix than .pt2.
        """
        if output_path(path).suffix != ".pt2":
            raise OptionError(f"A quantized model is saved as .pt2, but the path is '{os.fspath(path)}'.")
        write_file(path, self.as_file(source_root))


@dataclass(frozen=True)
class NeutronProgram:
    """A lowered program: a `.pte` and its placement. `lower` returns it."""

    buffer: bytes = field(repr=False)
    """The bytes of the `.pte`: a device program if `is_device`, else a portable program."""
    placement: tuple[Placement, ...]
    """One row per operator of the quantized graph, with its processor and the reason."""
    target: str = "imxrt700"
    """The name of the chip that the program was lowered for."""
    device_source: bytes | None = field(default=None, repr=False)
    """The portable `.pte` from which a device program was compiled. The host runs it. None for a portable program."""
    kernel_selection: str | None = field(default=None, repr=False)
    """The C source that `dump_kernel_selection_code` requests; None without that option."""
    kernels: tuple[tuple[Kernel, ...], ...] = ()
    """With `use_profiling`, the NPU's kernels of each delegate of a device program, in the order of its profile.

    The `nodes` of a kernel are nodes of `placement`, which has the source lines.
    """
    leaves: tuple[Leaf, ...] | None = field(default=None, repr=False)
    """The path of each input of the `.pte` in the arguments of `forward`; None if unknown."""
    origins: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    """For each delegate, the node of `placement` that each operator of its TFLite model came from, in their order.

    An operator at an end of the delegate, such as a transpose, may have another name.
    """
    board: NeutronTargetSpec | None = field(default=None, repr=False)
    """The board, for estimates; None if only a chip was named. The bytes of the program do not depend on it."""
    etrecord: bytes | None = field(default=None, repr=False)
    """With `use_profiling`, ExecuTorch's ETRecord of the program, for its Inspector; else None."""

    @property
    def is_device(self) -> bool:
        """Whether `buffer` contains microcode, which only the board runs."""
        return self.device_source is not None

    @property
    def portable(self) -> bytes:
        """The bytes of the portable `.pte`. The host runs it."""
        return self.buffer if self.device_source is None else self.device_source

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The shape and dtype of each input of the `.pte`, and the qparams of inputs that `int8_io` changed to int8.

        An entry is a `TensorInfo` for a tensor, and a `ConstantInfo` for a number, a bool, a string or None.
        """
        return self._loaded.inputs

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The shape and dtype of each output of the `.pte`, in the form of `inputs`."""
        return self._loaded.outputs

    @functools.cached_property
    def memory(self) -> MethodMemory:
        """The memory of `forward` on the board and on this machine (see `MethodMemory`).

        Sizes on the board are those of `buffer`. The portable program is loaded and run once on this machine, to count;
        without the native module, this is left out.
        """
        return memory_of(self.buffer, measured=measure(self.portable) if is_installed() else None)

    def __str__(self) -> str:
        from openneutron.report.summary import summary_of_program

        return summary_of_program(self)

    def _repr_html_(self) -> str:
        from openneutron.report.tables import program_table

        return program_table(self).as_html()

    def __rich__(self) -> Table:
        from openneutron.report.tables import program_table

        return program_table(self).as_rich()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `buffer` to `path`, in a temporary file that is then renamed. Raises `OutputError` if that fails.

        `kernel_selection` and `etrecord`, if any, are written to the same folder: "model_kernel_selection.c" and
        "model_etrecord.bin" for "model.pte".
        """
        write_files(self.files(output_path(path)))

    def files(self, path: Path) -> dict[Path, bytes]:
        """Returns the files that `save` writes, with their contents."""
        files = {path: self.buffer}
        if self.etrecord is not None:
            files[etrecord_path(path)] = self.etrecord
        if self.kernel_selection is not None:
            files[kernel_selection_path(path)] = self.kernel_selection.encode()
        return files

    def run(self, *inputs: Any, **named: Any) -> Any:
        """Runs the portable program on this machine, like `HostProgram.run`.

        Takes tensors or numpy arrays of the shapes and dtypes of `inputs`, as the arguments of `forward`. Returns one
        tensor for a program with one output, else a tuple. The program is loaded once and keeps its state between
        calls. Calls from several threads run one after the other. Raises `InputError` for inputs that the program does
        not take, `HostError` if the run fails, and `NativeModuleError` if the native module is not installed.
        """
        return self._loaded.run(*inputs, **named)

    def reset(self) -> None:
        """Restores the initial state of the program. Does nothing for a program without state."""
        self._loaded.reset()

    def package(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str = "model",
        samples: Iterable[Any] | None = None,
        vectors: int | str | os.PathLike[str] = 3,
        tolerance: float = 1.0,
        section: str | None = None,
        array: str = "auto",
    ) -> Package:
        """Writes a new folder with the program, the files that its firmware needs, and a test for this machine.

            program.package("firmware")        # then: cmake -B build && cmake --build build && ctest --test-dir build

        The folder holds the program as an array, sizes of memory, functions for inputs and outputs, the list of CPU
        kernels, test vectors, a main function, and a README.md with the steps for a board.

        - `name`: the prefix of files, macros and functions, an identifier of C.
        - `samples`: the inputs of the test vectors, in the forms that `run` takes; floats are quantized where the
          program takes int8. None stands for random ones.
        - `vectors`: the number of random test vectors, or a .npz file with the inputs and outputs of vectors.
        - `tolerance`: the largest difference of an output that passes on the board, in LSBs.
        - `section`: the section of the linker script for the array of the program.
        - `array`: "c", "incbin" (assembler source that includes the file), or "auto", which is "incbin" for large ones.

        Raises `OptionError` for wrong options, `OutputError` for a folder that is not empty or cannot be written, and
        `InputError` for samples that do not fit. After an error, no files are left.
        """
        from openneutron.firmware import package

        return package(
            self.buffer,
            folder,
            name=name,
            samples=samples,
            vectors=vectors,
            tolerance=tolerance,
            section=section,
            array=array,
            portable=self.device_source,
            leaves=self.leaves,
            kernel_selection=self.kernel_selection,
            etrecord=self.etrecord,
        )

    def to_model_explorer(
        self,
        folder: str | os.PathLike[str],
        quantized: QuantizedModel | None = None,
        analysis: Analysis | None = None,
        name: str = "model",
    ) -> tuple[Path, ...]:
        """Writes files for Google's Model Explorer to `folder`, and returns their paths.

        graphs.json has a graph for each delegate and, with `quantized`, the ATen graph by modules. Further files hold
        node data: estimated cycles, bytes of weights, the processor of each operator, and, with `analysis`, the SQNR of
        each layer. Open them with `model-explorer FOLDER/graphs.json --node_data_paths=FOLDER/cycles.json`. `name` is
        the name of the model there.

        Raises `OutputError` if a file cannot be written, and `InputError` for a program without a delegate.
        """
        from openneutron.page import summarize
        from openneutron.page.model_explorer import write_model_explorer

        summary = summarize(name, self, quantized=quantized, analysis=analysis)
        module = None if quantized is None else quantized.reference or quantized.module
        return write_model_explorer(self.portable, summary, folder, module)

    @functools.cached_property
    def _loaded(self) -> HostProgram:
        return HostProgram(self.portable, leaves=self.leaves)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the fields for pickling. The loaded program is left out, because it belongs to this process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def estimate(self, target: Target | None = None) -> Estimate:
        """Estimates the cycles of the NPU and the bytes of scratch memory and weights, by layer and in total.

        The estimate tells whether the program fits into the memory of `target`, a chip, a board or a board file, by
        default the program's own. It needs no vendor SDK, and it is not a measurement. Raises `TargetError` for an
        unknown target.
        """
        from openneutron.report.inspect import inspect_bytes

        return inspect_bytes(self.portable, "the program", target or self.board or self.target).estimate


def quantize(
    model: Any,
    example_inputs: Any,
    calibration: Data,
    target: Target = "imxrt700",
    *,
    recover: str | Recipe | None = "auto",
    recovery_seconds: float = 1800,
    strict: bool = False,
    transform: Callable[[Any], Any] | None = None,
    batch_size: int | None = None,
    jobs: int = 1,
    stop_when_converged: bool = False,
    progress: bool | None = None,
    **quantizer_options: Any,
) -> QuantizedModel:
    """Exports, prepares, calibrates and converts `model`. Returns the quantized model.

        quantized = quantize(model.eval(), (torch.randn(1, 3, 224, 224),), calibration=images, transform=normalize)

    - `model`: a module in eval mode. An exported program, its module or its file (.pt2), a traced or scripted module,
      and a function are accepted, too.
    - `example_inputs`: the arguments of `forward`, with the shapes that the program will have: one tensor, a tuple of
      arguments, or a mapping from their names. An argument is a float32 tensor or numpy array, a number, a string or
      None, or a tuple, dict or dataclass of these. An argument that is not a tensor becomes a constant of the program.
    - `calibration`: an iterable of inputs, each a tensor, a tuple, or a mapping from the names of `forward`'s
      arguments. A data set, a DataLoader, a tensor of samples, `Samples` of `openneutron.data`, and a folder, a file or
      the name of a function ("file.py:function") that it reads are accepted, too (docs/data.md).
    - `target`: the name of a chip ("imxrt700") or of a board ("mimxrt700_evk"), or a board file ("board.toml"). The
      model is quantized for the chip; estimates use the board.
    - `recover`: the methods that recover accuracy after quantization (see `openneutron.recovery` and docs/accuracy.md).
      "auto" equalizes channels, rounds weights by GPTQ and corrects biases. "fast" does the same with fewer inputs.
      "best" tries several recipes with four fifths of the inputs, and selects the one whose outputs on the rest are
      nearest to float. A `Recipe`, such as that of an earlier result, is followed. None disables recovery. Recovery
      runs over the calibration inputs again. With fewer than 32 inputs, it ignores statistics of inactive and of
      unclipped channels.
    - `recovery_seconds`: the time limit of "best", in seconds. No recipe is started that would exceed it.
    - `strict`: the option of `torch.export.export`.
    - `transform`: a function that makes an input from each item of `calibration`. Without it, images are scaled to
      0..1 and nothing else: **a model that needs normalized images needs a `transform` that normalizes them.**
    - `batch_size`: the number of samples that run at once, if the model supports batches. None selects it.
    - `jobs`: the number of calibration processes. The result is the same for any number on processors of one kind.
    - `stop_when_converged`: whether calibration ends when ranges no longer change. The log gives the number of samples.
    - `progress`: whether to show a progress bar. None shows it in a terminal.
    - `quantizer_options`: options of `NeutronQuantizer`. `wide="auto"` selects the LSTMs whose cell states exceed the
      range of one int8 tensor on the calibration inputs.

    Raises `ModelError` for a model that is in train mode, has dynamic shapes, is not float32, or has an unsupported
    form; `InputError` for example inputs that the model does not take; `CalibrationError` if there are no calibration
    inputs, or inputs with another shape or dtype or with values that are not finite; `TargetError` for an unknown
    target; `OptionError` for invalid options.
    """
    running = CalibrationOptions(batch_size, jobs, stop_when_converged, progress)
    options = _QuantizeOptions(recover, recovery_seconds, strict, transform, running, quantizer_options)
    spec = NeutronTargetSpec(target)
    quantized = _quantized(model, example_inputs, calibration, options, options.quantizer_for(spec))
    return quantized if spec.board is None else replace(quantized, board=spec)


@dataclass(frozen=True)
class _QuantizeOptions:
    """The options of `quantize`. Raises `OptionError` for invalid ones."""

    recover: str | Recipe | None
    recovery_seconds: float
    strict: bool
    transform: Callable[[Any], Any] | None
    running: CalibrationOptions
    quantizer: Mapping[str, Any]
    """The options of `NeutronQuantizer`."""

    def __post_init__(self) -> None:
        recipe_of(self.recover, observes=self.observes)
        check_seconds(self.recovery_seconds)
        own = ("recover", "recovery_seconds", "transform", *(field.name for field in fields(CalibrationOptions)))
        _check_options("quantize", self.quantizer, [*inspect.signature(NeutronQuantizer).parameters, *own])
        if self.quantizer.get("is_qat"):
            raise OptionError("quantize() does not train. Give NeutronQuantizer(is_qat=True) to prepare_qat_pt2e.")

    @property
    def observes(self) -> bool:
        """Whether the user gave an observer, which then determines the ranges."""
        return self.quantizer.get("observer") is not None

    @property
    def selects_wide_states(self) -> bool:
        """Whether calibration inputs select the LSTMs with wide cell states."""
        return bool(self.quantizer.get("wide") == "auto")

    def quantizer_for(self, target: Target) -> NeutronQuantizer:
        """Returns the quantizer for `target`. Raises `TargetError` and `OptionError`.

        With `selects_wide_states`, it has no wide cell states yet.
        """
        return NeutronQuantizer(target, **{**self.quantizer, **({"wide": None} if self.selects_wide_states else {})})


def _quantized(
    model: Any, example_inputs: Any, calibration: Data, options: _QuantizeOptions, quantizer: NeutronQuantizer
) -> QuantizedModel:
    module = as_module(_float(model))
    check_eval(module, "quantize")
    if example_inputs is None and isinstance(model, torch.export.ExportedProgram) and model.example_inputs:
        examples = Examples(*model.example_inputs)
    else:
        examples = examples_of(example_inputs, module)
    with phase_bar("Preparing", PREPARING_SHARES) as end_phase, typed_errors("Preparing the model for quantization"):
        graph = export(module, examples, strict=options.strict).module()
        end_phase()
        # Recovery equalizes channels by the ranges that calibration finds.
        equalizes = quantizer.equalize and options.recover is None
        unprepared = copy.deepcopy(graph) if options.selects_wide_states else None
        exported = quantizer.prepare_graph(graph, equalizes=equalizes)
    with typed_errors("Reading the calibration data", CalibrationError):
        given = calibration_inputs(calibration, forms_of(exported), transform=options.transform)
    samples = samples_of(exported, given)
    if unprepared is not None and (names := modules_with_large_cell_states(exported, samples)):
        with typed_errors("Preparing the model for quantization"):
            quantizer = quantizer.replace(wide=names)
            exported = quantizer.prepare_graph(unprepared, equalizes=equalizes)
    recipe, trials = _recipe(options, quantizer, exported, samples)
    with typed_errors("Quantizing the model"):
        converted, reference = quantize_by_recipe(recipe, exported, quantizer, samples, options.running)
    return QuantizedModel(
        module=converted,
        example_inputs=examples.args,
        target=quantizer.target.name,
        reference=reference,
        recipe=recipe,
        trials=tuple(trials),
        example_kwargs=examples.kwargs,
        parameters=digests(module.parameters()),
    )


def _recipe(
    options: _QuantizeOptions, quantizer: NeutronQuantizer, exported: GraphModule, samples: Samples
) -> tuple[Recipe | None, list[Trial]]:
    """Returns the recipe of the options; with "best", the best recipe and all trials of the search."""
    if options.recover == BEST:
        space = SearchSpace(equalizes=quantizer.equalize, ranges=not options.observes)
        return try_recipes(exported, quantizer, samples, options.running, space=space, seconds=options.recovery_seconds)
    recipe = recipe_of(options.recover, observes=options.observes)
    if recipe is not None:
        recipe = replace(recipe, equalizes=recipe.equalizes and quantizer.equalize)
    return recipe, []


def _float(model: Any) -> Any:
    """Returns `model`. Raises `ModelError` if it is quantized, prepared or lowered already."""
    graph = model.graph_module if isinstance(model, torch.export.ExportedProgram) else model
    if isinstance(model, QuantizedModel) or is_quantized(graph):
        raise ModelError("This model is quantized already. Call lower() next, or give the float model.")
    if isinstance(model, TrainableModel):
        raise ModelError("This module is prepared for training, and quantized already. Call finish_training() next.")
    if isinstance(model, (NeutronProgram, HostProgram)):
        raise ModelError("This is a lowered program. Give the float model from which it was lowered.")
    if is_prepared(model):
        raise ModelError(
            "This model was prepared by prepare_pt2e. Calibrate it, then call convert_pt2e and lower(), or give the "
            "float model to quantize()."
        )
    return model


def lower(
    quantized: QuantizedModel | GraphModule | torch.export.ExportedProgram | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    target: Target | None = None,
    int8_io: bool = False,
    **compile_options: Any,
) -> NeutronProgram:
    """Lowers a quantized model to a `.pte`. Returns the program.

        program = lower(quantized, target="imxrt700")
        program.save("model.pte")

    - `quantized`: the result of `quantize` or of `convert_pt2e`, the file that `QuantizedModel.save` wrote, or a
      converted module after `torch.export.export`, as an exported program or its file (.pt2).
    - `example_inputs`: the inputs for export, in the forms that `quantize` accepts. Required for a result of
      `convert_pt2e`; the other forms contain their own.
    - `target`: the name of a chip or of a board, or a board file. By default, the target that the model was quantized
      for, if `quantized` is a result of `quantize` or its file (which does not hold a board file), else "imxrt700".
      The bytes of the program depend on the chip only.
    - `int8_io`: whether the program takes and returns int8. Inputs and outputs that are not quantized remain float32;
      a `FloatIOWarning` lists them.
    - `compile_options`: options of `generate_neutron_compile_spec`. `payload` ("auto", "portable" or "device") selects
      whether the vendor's converter compiles the program for the device.

    Raises `ModelError` for a model that is not quantized or cannot be lowered; `InputError` for missing or wrong
    example inputs; `TargetError` for an unknown target; `OptionError` for invalid options; `ConverterError` if the
    vendor's converter is missing or fails. Warns with a `CpuWarning` if no operator runs on the NPU.
    """
    from openneutron.partition.partitioner import CpuWarning, cpu_message, origins_of
    from openneutron.partition.placing import place

    module, kept, own_target = _converted(quantized)
    if example_inputs is None and kept is None:
        raise InputError(
            "lower() needs example_inputs for a converted module: they determine the shapes of the program."
        )
    examples = kept if example_inputs is None and kept is not None else examples_of(example_inputs, module)
    _check_options("lower", compile_options, ["int8_io", *(field.name for field in fields(CompileOptions))])
    if not isinstance(int8_io, bool):
        raise OptionError(f"int8_io takes True or False, not {int8_io!r}.")
    blocked = list_of_names(compile_options.pop("operators_not_to_delegate", None))
    spec = NeutronTargetSpec(target or own_target)
    board = spec if spec.board else None
    options = CompileOptions(spec.name, blocked, **compile_options)
    with phase_bar("Lowering", LOWERING_SHARES) as end_phase, typed_errors("Lowering the model"):
        lifted = lifted_program(module, examples)
        exported = lifted or export(module, examples)
        leaves = leaves_of(module if lifted else exported.module())
        end_phase()
        methods: dict[str, Any] = quantized_io.int8_io(exported) if int8_io else {}
        placed = place(exported, replace(options, payload="portable"))
        end_phase()
        rows = placed.rows
        if not all(leaf.is_tensor and len(leaf.path) == 1 for leaf in leaves) or examples.kwargs:
            methods[INPUT_NAMES] = text_of_leaves(leaves)
        portable, etrecord = _portable_program(placed, methods or None, end_phase)
        origins = origins_of(placed)
    if not any(row.where == "npu" for row in rows):
        warnings.warn(cpu_message(rows), CpuWarning, stacklevel=2)
    converter = converter_for(options.payload, options.neutron_converter_flavor)
    if converter is None or not any(row.where == "npu" for row in rows):
        return NeutronProgram(
            portable, rows, options.target, leaves=leaves, origins=origins, board=board, etrecord=etrecord
        )
    folder = None if options.intermediates_dir is None else Path(options.intermediates_dir)
    compiled = compile_program(portable, converter, intermediates_dir=folder)
    kernels = tuple(payload.kernels for payload in compiled.payloads)
    return NeutronProgram(
        compiled.program,
        rows,
        options.target,
        portable,
        compiled.kernel_selection,
        kernels,
        leaves,
        origins,
        board=board,
        etrecord=etrecord,
    )


def _converted(quantized: Any) -> tuple[GraphModule, Examples | None, Target]:
    """Returns the converted module in an argument of `lower`, its example inputs if it has any, and its target."""
    from openneutron.partition.conversions import check_quantize_is_an_operator

    if isinstance(quantized, QuantizedModel):
        return quantized.module, quantized.examples, quantized.board or quantized.target
    if isinstance(quantized, (NeutronProgram, HostProgram)):
        raise ModelError("This program is lowered already. Save it or run it.")
    if isinstance(quantized, TrainableModel):
        raise ModelError("This module is prepared for training. Call lower() with the result of finish_training().")
    if is_prepared(quantized):
        raise ModelError("This model was prepared by prepare_pt2e and not converted. Call convert_pt2e first.")
    kept, target = None, "imxrt700"
    if isinstance(quantized, (str, os.PathLike)):
        target = target_of_file(quantized) or target
        quantized = loaded_program(quantized)
    if isinstance(quantized, torch.export.ExportedProgram):
        kept = None if quantized.example_inputs is None else Examples(*quantized.example_inputs)
        quantized = quantized.module()
    if isinstance(quantized, GraphModule):
        check_quantize_is_an_operator(quantized.graph)
    if not is_quantized(quantized):
        raise ModelError(
            f"lower() needs a result of quantize() or convert_pt2e, but this {type(quantized).__name__} has no "
            "quantized operators. Call quantize() first. If it was called, its UnquantizedWarning gives the reasons."
        )
    return quantized, kept, target


def _portable_program(
    placed: Placed, constant_methods: dict[str, Any] | None, end_phase: Callable[[], None]
) -> tuple[bytes, bytes | None]:
    """Compiles the partitions, then calls `to_edge_transform_and_lower`. Calls `end_phase` after each of the two.

    Returns the bytes of the portable `.pte` and, with `use_profiling`, of its ETRecord.
    """
    from executorch.exir import to_edge_transform_and_lower

    from openneutron.partition.partitioner import NeutronPartitioner, check_cpu_operators, compile_placed

    with warnings.catch_warnings():
        partitioner = [NeutronPartitioner(placed.graphs.options.to_specs())]
        check_cpu_operators(placed)
        program = compile_placed(placed)
        end_phase()
        records = placed.graphs.options.use_profiling
        edge = to_edge_transform_and_lower(
            program, partitioner=partitioner, constant_methods=constant_methods, generate_etrecord=records
        )
        warnings.filterwarnings("ignore", "Mutation on a buffer in the model")  # the partitioner keeps initial values
        lowered = edge.to_executorch()
        return bytes(lowered.buffer), _etrecord_of(lowered) if records else None


def _etrecord_of(lowered: Any) -> bytes:
    record = io.BytesIO()
    lowered.get_etrecord().save(record)
    return record.getvalue()


def _check_options(function: str, options: Iterable[str], known: Iterable[str]) -> None:
    names = sorted({*known, "target"})
    for option in options:
        if option not in names:
            near = difflib.get_close_matches(option.lower(), names, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise OptionError(f"{function}() has no option '{option}'.{hint} Options: {', '.join(names)}.")
