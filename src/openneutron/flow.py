"""The short way: the six steps of the documented flow in two calls."""

from __future__ import annotations

import difflib
import functools
import inspect
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
from openneutron.core.files import write_file
from openneutron.errors import CalibrationError, InputError, ModelError, OptionError
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
)
from openneutron.model.state import reset, samples_of
from openneutron.partition import quantized_io
from openneutron.partition.placing import Placed, Placement
from openneutron.quantizer import NeutronQuantizer
from openneutron.recovery.layerwise import Samples
from openneutron.recovery.recipes import BEST, Recipe, quantize_by_recipe, recipe_of
from openneutron.recovery.search import SearchSpace, Trial, check_seconds, try_recipes
from openneutron.runtime.program import INPUT_NAMES, HostProgram
from openneutron.targets import NeutronTargetSpec
from openneutron.vendor.device import compile_program, kernel_selection_path
from openneutron.vendor.profiling import Kernel
from openneutron.vendor.sdk import converter_for

if TYPE_CHECKING:
    from openneutron.report.estimate import Estimate

__all__ = ["NeutronProgram", "QuantizedModel", "lower", "quantize"]


@dataclass(frozen=True)
class QuantizedModel:
    """A converted model: `module` is what `convert_pt2e` returned, a regular PyTorch model."""

    module: GraphModule
    example_inputs: tuple[Any, ...]
    """The positional arguments that it was exported with."""
    target: str
    reference: GraphModule | None = field(default=None, repr=False)
    """The float graph that was annotated: what `module` computes but for its rounding, by the same names of nodes."""
    recipe: Recipe | None = None
    """What `recover` did; as `recover`, it does the same again."""
    trials: tuple[Trial, ...] = field(default=(), repr=False)
    """With `recover="best"`, the recipes that were tried, in order."""
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The keyword arguments that it was exported with."""
    parameters: frozenset[str] = field(default=frozenset(), repr=False)
    """Digests of the float model's parameters, with which `analyze` recognizes that model."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the converted module; numpy arrays are taken as tensors. State is kept until the next call."""
        return self.module(*tree_map(to_tensors, inputs), **tree_map(to_tensors, named))

    def __str__(self) -> str:
        from openneutron.report.summary import summary_of_model

        return summary_of_model(self)

    @property
    def examples(self) -> Examples:
        """The arguments that it was exported with."""
        return Examples(self.example_inputs, self.example_kwargs)

    def reset(self) -> None:
        """Restore the state that the module had when the model was exported."""
        reset(self.module)


@dataclass(frozen=True)
class NeutronProgram:
    """A lowered program."""

    buffer: bytes = field(repr=False)
    """The bytes of the `.pte`: for the device where `is_device`, else portable."""
    placement: tuple[Placement, ...]
    """One row per operator of the quantized graph: where it runs, and why."""
    target: str = "imxrt700"
    """The target that it was lowered for."""
    device_source: bytes | None = field(default=None, repr=False)
    """The portable `.pte` that a device program was made of, which the host runs; None for a portable program."""
    kernel_selection: str | None = field(default=None, repr=False)
    """The C source that `dump_kernel_selection_code` asked for."""
    kernels: tuple[tuple[Kernel, ...], ...] = ()
    """With `use_profiling`, for each delegate of a device program the NPU's kernels in the order in which its profile
    has them; their `nodes` are those of `placement`, which has the source lines."""
    leaves: tuple[Leaf, ...] | None = field(default=None, repr=False)
    """The path of each input in the arguments of `forward`; None if it is not known."""

    @property
    def is_device(self) -> bool:
        """Whether `buffer` holds microcode, which only the board runs."""
        return self.device_source is not None

    @property
    def portable(self) -> bytes:
        """The bytes of the portable `.pte`, which the host runs."""
        return self.buffer if self.device_source is None else self.device_source

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Shape and dtype of each input as the `.pte` has them, and the qparams of those that `int8_io` made int8.

        A `TensorInfo` for a tensor, a `ConstantInfo` for a number, a truth value, a text or None.
        """
        return self._loaded.inputs

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The same of each output."""
        return self._loaded.outputs

    def __str__(self) -> str:
        from openneutron.report.summary import summary_of_program

        return summary_of_program(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the `.pte`: beside, then renamed. Raises `OutputError` where that cannot be done.

        With `kernel_selection`, that goes beside it: "model_kernel_selection.c" for "model.pte".
        """
        write_file(path, self.buffer)
        if self.kernel_selection is not None:
            write_file(kernel_selection_path(Path(path)), self.kernel_selection.encode())

    def run(self, *inputs: Any, **named: Any) -> Any:
        """Run the program on this machine, its portable form: as `HostProgram.run`.

        It is loaded once, and keeps its state from one call to the next. Any thread may call this; calls wait for each
        other.
        """
        return self._loaded.run(*inputs, **named)

    def reset(self) -> None:
        """Restore the initial state of the program. Does nothing to a program without state."""
        self._loaded.reset()

    @functools.cached_property
    def _loaded(self) -> HostProgram:
        return HostProgram(self.portable, leaves=self.leaves)

    def __getstate__(self) -> dict[str, Any]:
        """Without the loaded program, which is of this process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def estimate(self, target: str | NeutronTargetSpec | None = None) -> Estimate:
        """What the NPU's part will need: bytes of scratch and weights, cycles, by layer and in all; whether it fits.

        An estimate, never a measurement; made without the vendor's SDK. `target` is the program's own unless given.
        Raises `TargetError`.
        """
        from openneutron.report.inspect import inspect_bytes

        return inspect_bytes(self.portable, "the program", target or self.target).estimate


def quantize(
    model: Any,
    example_inputs: Any,
    calibration: Data,
    target: str | NeutronTargetSpec = "imxrt700",
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
    """Export, prepare, calibrate and convert `model`.

    `model` is a module in eval mode; an exported program, its module or its file (.pt2), a traced or scripted module
    and a function are taken, too (`exporting.as_module`). `example_inputs` are what it is called with, of the shapes
    that the program will take: a tensor, a tuple of forward's arguments, or a mapping from their names; arguments are
    float32 tensors or numpy arrays, numbers, text and None, also in tuples, dicts and dataclasses. What is no tensor
    becomes a constant of the program. `calibration` yields inputs as the model takes them: tensors, tuples, or mappings
    by the names of forward's arguments; a data set, a DataLoader, a tensor of samples, or a folder of images or .npy
    files are taken, too. `transform` makes an input of each item. Images are only scaled to 0..1 without it: **a model
    that wants them normalized needs a `transform` that does so.**

    `recover` gets back accuracy that int8 lost: "auto" equalizes channels, rounds weights anew and corrects biases,
    "fast" does so by fewer of the inputs, None does not (see `openneutron.recovery`; docs/accuracy.md). It uses the
    calibration inputs again; of fewer than 32, it does not believe which channels are never awake or never clipped.
    "best" tries several recipes with four fifths of the inputs and takes the one whose outputs are nearest to float on
    the rest; it begins none that would not be over in `recovery_seconds`. A `Recipe`, as the result has one, is
    followed.

    `jobs` processes share the calibration, with the same result on processors of one kind. `batch_size` samples run at
    once, where the model allows it; it is chosen unless given. `stop_when_converged` ends calibration once ranges no
    longer move; the log says after how many samples. `progress` shows a bar; None does in a terminal.
    `quantizer_options` go to `NeutronQuantizer`.

    Raises `ModelError` for a model in train mode, with dynamic shapes, not in float32, or of a form that is not taken,
    `InputError` for example inputs that the model does not take, `CalibrationError` for calibration that never ran, or
    on inputs of another shape or dtype, or on values that are not finite, `OptionError` for options that it cannot
    follow.
    """
    running = CalibrationOptions(batch_size, jobs, stop_when_converged, progress)
    options = _QuantizeOptions(recover, recovery_seconds, strict, transform, running, quantizer_options)
    return _quantized(model, example_inputs, calibration, options, options.quantizer_for(target))


@dataclass(frozen=True)
class _QuantizeOptions:
    """The options of `quantize`. Raises `OptionError` for those that it cannot follow."""

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
        """Whether the user gave an observer, which decides on ranges."""
        return self.quantizer.get("observer") is not None

    def quantizer_for(self, target: str | NeutronTargetSpec) -> NeutronQuantizer:
        """The quantizer. Raises `TargetError` and `OptionError`."""
        return NeutronQuantizer(target, **self.quantizer)


def _quantized(
    model: Any, example_inputs: Any, calibration: Data, options: _QuantizeOptions, quantizer: NeutronQuantizer
) -> QuantizedModel:
    module = as_module(_float(model))
    check_eval(module, "quantize")
    if example_inputs is None and isinstance(model, torch.export.ExportedProgram) and model.example_inputs:
        examples = Examples(*model.example_inputs)
    else:
        examples = examples_of(example_inputs, module)
    with typed_errors("Preparing the model for quantization"):
        graph = export(module, examples, strict=options.strict).module()
        # Recovery equalizes channels by the ranges that calibration finds.
        exported = quantizer.prepare_graph(graph, equalizes=quantizer.equalize and options.recover is None)
    with typed_errors("Reading the calibration data", CalibrationError):
        given = calibration_inputs(calibration, forms_of(exported), transform=options.transform)
    samples = samples_of(exported, given)
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
    """The recipe that the options ask for, or the best one that was found, and what was tried to find it."""
    if options.recover == BEST:
        space = SearchSpace(equalizes=quantizer.equalize, ranges=not options.observes)
        return try_recipes(exported, quantizer, samples, options.running, space=space, seconds=options.recovery_seconds)
    recipe = recipe_of(options.recover, observes=options.observes)
    if recipe is not None:
        recipe = replace(recipe, equalizes=recipe.equalizes and quantizer.equalize)
    return recipe, []


def _float(model: Any) -> Any:
    """`model`; raises `ModelError` for one that is quantized or prepared already."""
    graph = model.graph_module if isinstance(model, torch.export.ExportedProgram) else model
    if isinstance(model, QuantizedModel) or is_quantized(graph):
        raise ModelError("This model is quantized already. Call lower() next, or give the float model.")
    if isinstance(model, (NeutronProgram, HostProgram)):
        raise ModelError("This is a lowered program. Give the float model that it was made of.")
    if is_prepared(model):
        raise ModelError(
            "This model was prepared by prepare_pt2e. Calibrate it, call convert_pt2e, then lower(); or give the float "
            "model to quantize()."
        )
    return model


def lower(
    quantized: QuantizedModel | GraphModule | torch.export.ExportedProgram | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    target: str | NeutronTargetSpec | None = None,
    int8_io: bool = False,
    **compile_options: Any,
) -> NeutronProgram:
    """Lower a quantized model to a `.pte`.

    `quantized` comes from `quantize`, or from `convert_pt2e`, then with `example_inputs` as `quantize` takes them; what
    torch.export made of a converted module brings its own. `target` is that of the quantized model unless given. With
    `int8_io` the program takes and returns int8, where its inputs and outputs are quantized (a `FloatIOWarning` lists
    those that are not). `compile_options` are those of `generate_neutron_compile_spec`; `payload` ("auto", "portable"
    or "device") among them says whether the vendor's converter makes a device program of it. Raises `OptionError`,
    `TargetError`, `InputError`, `ModelError` for a model that is not quantized, and `ConverterError` where the
    converter is not there or fails. A `CpuWarning` says where nothing of the program runs on the NPU.
    """
    from openneutron.partition.partitioner import CpuWarning, cpu_message
    from openneutron.partition.placing import place

    module, kept, own_target = _converted(quantized)
    if example_inputs is None and kept is None:
        raise InputError("lower() needs example_inputs with a converted module: they fix the program's shapes.")
    examples = kept if example_inputs is None and kept is not None else examples_of(example_inputs, module)
    _check_options("lower", compile_options, ["int8_io", *(field.name for field in fields(CompileOptions))])
    if not isinstance(int8_io, bool):
        raise OptionError(f"int8_io takes True or False, not {int8_io!r}.")
    blocked = list_of_names(compile_options.pop("operators_not_to_delegate", None))
    options = CompileOptions(NeutronTargetSpec(target or own_target).name, blocked, **compile_options)
    exported = export(module, examples)
    leaves = leaves_of(exported.module())
    with typed_errors("Lowering the model"):
        methods: dict[str, Any] = quantized_io.int8_io(exported) if int8_io else {}
        placed = place(exported, replace(options, payload="portable"))
        rows = placed.rows
        if not all(leaf.is_tensor and len(leaf.path) == 1 for leaf in leaves) or examples.kwargs:
            methods[INPUT_NAMES] = text_of_leaves(leaves)
        portable = _portable_program(placed, methods or None)
    if not any(row.where == "npu" for row in rows):
        warnings.warn(cpu_message(rows), CpuWarning, stacklevel=2)
    converter = converter_for(options.payload, options.neutron_converter_flavor)
    if converter is None or not any(row.where == "npu" for row in rows):
        return NeutronProgram(portable, rows, options.target, leaves=leaves)
    folder = None if options.intermediates_dir is None else Path(options.intermediates_dir)
    compiled = compile_program(portable, converter, intermediates_dir=folder)
    kernels = tuple(payload.kernels for payload in compiled.payloads)
    return NeutronProgram(compiled.program, rows, options.target, portable, compiled.kernel_selection, kernels, leaves)


def _converted(quantized: Any) -> tuple[GraphModule, Examples | None, str]:
    """The converted module in the argument of `lower`, its example inputs and its target, each if it has them."""
    from openneutron.partition.conversions import check_quantize_is_an_operator

    if isinstance(quantized, QuantizedModel):
        return quantized.module, quantized.examples, quantized.target
    if isinstance(quantized, (NeutronProgram, HostProgram)):
        raise ModelError("This program is lowered already. Save it, or run it.")
    if is_prepared(quantized):
        raise ModelError("This model was prepared by prepare_pt2e and not converted. Call convert_pt2e first.")
    kept = None
    if isinstance(quantized, (str, os.PathLike)):
        quantized = loaded_program(quantized)
    if isinstance(quantized, torch.export.ExportedProgram):
        kept = None if quantized.example_inputs is None else Examples(*quantized.example_inputs)
        quantized = quantized.module()
    if isinstance(quantized, GraphModule):
        check_quantize_is_an_operator(quantized.graph)
    if not is_quantized(quantized):
        raise ModelError(
            f"lower() takes what quantize() or convert_pt2e returned; this {type(quantized).__name__} has nothing "
            "quantized in it. Call quantize() first; where that was done, its UnquantizedWarning has the reasons."
        )
    return quantized, kept, "imxrt700"


def _portable_program(placed: Placed, constant_methods: dict[str, Any] | None) -> bytes:
    """The portable `.pte`: the documented call, on the program in which the partitions are compiled already."""
    from executorch.exir import to_edge_transform_and_lower

    from openneutron.partition.partitioner import NeutronPartitioner, check_cpu_operators, compile_placed

    with warnings.catch_warnings():
        partitioner = [NeutronPartitioner(placed.graphs.options.to_specs())]
        check_cpu_operators(placed)
        program = compile_placed(placed)
        edge = to_edge_transform_and_lower(program, partitioner=partitioner, constant_methods=constant_methods)
        warnings.filterwarnings("ignore", "Mutation on a buffer in the model")  # the partitioner keeps initial values
        return bytes(edge.to_executorch().buffer)


def _check_options(function: str, options: Iterable[str], known: Iterable[str]) -> None:
    names = sorted({*known, "target"})
    for option in options:
        if option not in names:
            near = difflib.get_close_matches(option.lower(), names, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise OptionError(f"{function}() has no option '{option}'.{hint} Options: {', '.join(names)}.")
