"""The short flow: `quantize` and `lower` call the six steps of the documented flow."""

from __future__ import annotations

import copy
import inspect
import io
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from openneutron.calibration import CalibrationOptions
from openneutron.compile_spec import CompileOptions, converter_fields, list_of_names
from openneutron.core.boundary import typed_errors
from openneutron.core.fx import modules_of, placeholders
from openneutron.core.garbage import rare_full_collections
from openneutron.core.generated_code import code_on_demand
from openneutron.core.locks import traces_alone
from openneutron.core.options import check_option_names
from openneutron.core.progress import phase_bar
from openneutron.documented_flow import NeutronQuantizer
from openneutron.errors import CalibrationError, InputError, ModelError, OptionError
from openneutron.model.arguments import INPUT_NAMES, text_of_leaves
from openneutron.model.data import Data, calibration_inputs, forms_of
from openneutron.model.examples import Examples, examples_of, leaves_of
from openneutron.model.exporting import (
    as_module,
    check_eval,
    check_gradients,
    digests,
    export,
    is_prepared,
    is_quantized,
    loaded_program,
    target_of_file,
)
from openneutron.model.lifting import lifted_program
from openneutron.model.state import samples_of
from openneutron.neutron_program import NeutronProgram
from openneutron.partition import quantized_io
from openneutron.partition.blocked_names import check_names_in_graph
from openneutron.partition.placing import Placed
from openneutron.quantized_model import QuantizedModel
from openneutron.recovery.large_cell_states import modules_with_large_cell_states
from openneutron.recovery.layerwise import Samples
from openneutron.recovery.recipes import BEST, Recipe, quantize_by_recipe, recipe_of
from openneutron.recovery.search import SearchSpace, Trial, check_seconds, try_recipes
from openneutron.recovery.wide_inputs import inputs_to_widen, widen_inputs
from openneutron.runtime.program import HostProgram
from openneutron.targets import NeutronTargetSpec, Target
from openneutron.training.recurrent_layers import train_recurrent_layers
from openneutron.training.trainable import TrainableModel
from openneutron.vendor.device import compile_program
from openneutron.vendor.sdk import Converter, converter_for

__all__ = ["NeutronProgram", "QuantizedModel", "lower", "quantize", "quantize_for_lowering"]

LOWERING_SHARES = (8, 1, 2, 20)
"""Relative durations of the phases of `lower`, for its progress bar: export, placement, compilation, ExecuTorch's
lowering.

These and `PREPARING_SHARES` lie between the processor times measured for ResNet-20 and for MobileNetV2."""
PREPARING_SHARES = (3, 1)
"""Relative durations of export and of the passes before annotation, for the progress bar of `quantize`."""
_POSITIONAL = ("model", "example_inputs", "calibration", "target")
"""The parameters of `quantize` that are not options."""


@traces_alone
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
      "auto" equalizes channels, rounds weights by GPTQ and corrects biases, and then trains recurrent networks
      whose outputs are below 25 dB, which may take minutes. "fast" uses fewer inputs and trains nothing.
      "best" tries several recipes with four fifths of the inputs, and selects the one whose outputs on the rest are
      nearest to float. A `Recipe` sets the methods, such as the recipe of an earlier result. None disables recovery.
      Recovery runs over the calibration inputs again. With fewer than 32 inputs, it does not use statistics of inactive
      channels and of channels that were not clipped.
    - `recovery_seconds`: the time limit of "best", in seconds. No recipe is started that would exceed it, and training
      ends when it is reached.
    - `strict`: the option of `torch.export.export`.
    - `transform`: a function that makes an input from each item of `calibration`. Without it, images are scaled to
      0..1 and nothing else: **a model that needs normalized images needs a `transform` that normalizes them.**
    - `batch_size`: the number of samples that run at once, if the model supports batches. None selects it.
    - `jobs`: the number of calibration processes. The result is the same for any number on processors of one kind.
    - `stop_when_converged`: whether calibration ends when ranges no longer change. The log gives the number of samples.
    - `progress`: whether to show a progress bar. None shows it in a terminal.
    - `quantizer_options`: options of `NeutronQuantizer`. `wide` also takes names of inputs, which are then quantized as
      two int8 tensors. `wide="auto"` selects the LSTMs whose cell states exceed the range of one int8 tensor on the
      calibration inputs, unless a range for each unit is better, and the inputs whose rounding reduces the SQNR of an
      output below 20 dB. Recipes select such inputs if this costs few multiplications, unless `wide` is an empty
      list.

    Raises `ModelError` for a model that is in train mode, has dynamic shapes, is not float32, or has an unsupported
    form, and in `torch.inference_mode()`; `InputError` for example inputs that the model does not take;
    `CalibrationError` if there are no calibration inputs, or inputs with another shape or dtype or with values that are
    not finite; `TargetError` for an unknown target; `OptionError` for invalid options.
    """
    options = _options_of(
        recover=recover,
        recovery_seconds=recovery_seconds,
        strict=strict,
        transform=transform,
        batch_size=batch_size,
        jobs=jobs,
        stop_when_converged=stop_when_converged,
        progress=progress,
        quantizer_options=quantizer_options,
    )
    return _quantized_for(target, model, example_inputs, calibration, options)


@traces_alone
def quantize_for_lowering(
    not_delegated: Sequence[str], model: Any, example_inputs: Any, calibration: Data, target: Target, **options: Any
) -> QuantizedModel:
    """Quantizes a model as `quantize` does, for `lower` with the option `operators_not_to_delegate`.

    Also raises `OptionError` for a name in `not_delegated` that the model does not have, before calibration.
    """
    given = inspect.signature(quantize).bind(model, example_inputs, calibration, target, **options)
    given.apply_defaults()
    named = {name: value for name, value in given.arguments.items() if name not in _POSITIONAL}
    chosen = _options_of(**named, not_delegated=not_delegated)
    return _quantized_for(target, model, example_inputs, calibration, chosen)


def _options_of(
    *,
    recover: str | Recipe | None,
    recovery_seconds: float,
    strict: bool,
    transform: Callable[[Any], Any] | None,
    batch_size: int | None,
    jobs: int,
    stop_when_converged: bool,
    progress: bool | None,
    quantizer_options: Mapping[str, Any],
    not_delegated: Sequence[str] = (),
) -> _QuantizeOptions:
    """Returns the options of `quantize`, of which none has a default here, so that none can be left out."""
    running = CalibrationOptions(batch_size, jobs, stop_when_converged, progress)
    return _QuantizeOptions(recover, recovery_seconds, strict, transform, running, quantizer_options, not_delegated)


def _quantized_for(
    target: Target, model: Any, example_inputs: Any, calibration: Data, options: _QuantizeOptions
) -> QuantizedModel:
    check_gradients("quantize")
    spec = NeutronTargetSpec(target)
    with rare_full_collections():
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
    not_delegated: Sequence[str] = ()
    """The names that `lower` will get as `operators_not_to_delegate`."""

    def __post_init__(self) -> None:
        recipe_of(self.recover, observes=self.observes)
        check_seconds(self.recovery_seconds)
        own = ("recover", "recovery_seconds", "transform", *(field.name for field in fields(CalibrationOptions)))
        known = {*inspect.signature(NeutronQuantizer).parameters, *own, "target"}
        check_option_names("quantize", self.quantizer, known)
        if self.quantizer.get("is_qat"):
            raise OptionError("quantize() does not train. Give NeutronQuantizer(is_qat=True) to prepare_qat_pt2e.")
        wide = self.quantizer.get("wide")
        if isinstance(wide, Iterable) and not isinstance(wide, str):  # read more than once
            object.__setattr__(self, "quantizer", {**self.quantizer, "wide": list(wide)})

    @property
    def observes(self) -> bool:
        """Whether the user gave an observer, which then determines the ranges."""
        return self.quantizer.get("observer") is not None

    @property
    def selects_wide_states(self) -> bool:
        """Whether calibration inputs select the LSTMs with wide cell states."""
        return bool(self.quantizer.get("wide") == "auto")

    def wide_states(self, graph: GraphModule) -> list[Any]:
        """Returns the keys of `wide` that are not names of inputs of `graph`.

        Raises `OptionError` for the name of an input and of a module.
        """
        wide, inputs = self.quantizer.get("wide"), {str(node.target) for node in placeholders(graph.graph)}
        if wide is None or self.selects_wide_states:
            return []
        modules = {name for node in graph.graph.nodes for name, _ in modules_of(node)}
        names = inputs.intersection(key for key in wide if isinstance(key, str))
        if both := sorted(names & modules):
            raise OptionError(
                f"wide has the name '{both[0]}', which an input and a module have. Give the module by its type, or "
                "rename the argument of forward."
            )
        return [key for key in wide if not isinstance(key, str) or key not in names]

    def wide_inputs(self, exported: GraphModule, samples: Samples) -> list[str]:
        """Returns the inputs that consist of two int8 tensors: those that `wide` names, and those that recipes select.

        Recipes select inputs whose additional layers are small, unless `wide` is an empty list. "auto" has no limit.
        """
        wide = self.quantizer.get("wide")
        if self.selects_wide_states:
            return inputs_to_widen(exported, samples, most_price=1.0)
        selected = [] if self.recover is None or wide == [] else inputs_to_widen(exported, samples)
        named = {key for key in wide or () if isinstance(key, str)} | set(selected)
        return [name for node in placeholders(exported.graph) if (name := str(node.target)) in named]

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
    preparing = typed_errors("Preparing the model for quantization")
    with phase_bar("Preparing", PREPARING_SHARES) as end_phase, preparing, code_on_demand():
        graph = export(module, examples, strict=options.strict).module()
        end_phase()
        quantizer = quantizer.replace(wide=options.wide_states(graph))
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
    with typed_errors("Preparing the inputs for quantization"):
        widen_inputs(exported, samples, options.wide_inputs(exported, samples))
    check_names_in_graph(options.not_delegated, exported.graph)
    begun = time.perf_counter()
    recipe, trials = _recipe(options, quantizer, exported, samples)
    with typed_errors("Quantizing the model"):
        converted, reference = quantize_by_recipe(recipe, exported, quantizer, samples, options.running)
    quantized = QuantizedModel(
        module=converted,
        example_inputs=examples.args,
        target=quantizer.target.name,
        reference=reference,
        recipe=recipe,
        trials=tuple(trials),
        example_kwargs=examples.kwargs,
        parameters=digests(module.parameters()),
    )
    if recipe is None or recipe.correction != "weights" or not recipe.trains_recurrent_layers:
        return quantized
    seconds = begun + options.recovery_seconds - time.perf_counter() if options.recover == BEST else math.inf
    with typed_errors("Training the recurrent layers"):
        return train_recurrent_layers(quantized, samples, seconds=seconds, progress=options.running.progress)


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


@traces_alone
@rare_full_collections()
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
    from openneutron.partition.partitioner import CpuWarning, cpu_message

    module, kept, own_target = _converted(quantized)
    if example_inputs is None and kept is None:
        raise InputError(
            "lower() needs example_inputs for a converted module: they determine the shapes of the program."
        )
    examples = kept if example_inputs is None and kept is not None else examples_of(example_inputs, module)
    check_option_names(
        "lower", compile_options, {"int8_io", *(field.name for field in fields(CompileOptions)), "target"}
    )
    if not isinstance(int8_io, bool):
        raise OptionError(f"int8_io takes True or False, not {int8_io!r}.")
    blocked = list_of_names(compile_options.pop("operators_not_to_delegate", None))
    spec = NeutronTargetSpec(target or own_target)
    options = CompileOptions(spec.name, blocked, **compile_options)
    converter_fields(options.extra_flags)
    converter = converter_for(options.payload, options.neutron_converter_flavor)
    program = _portable(module, examples, options, int8_io=int8_io)
    if spec.board:
        program = replace(program, board=spec)
    if not any(row.where == "npu" for row in program.placement):
        warnings.warn(cpu_message(program.placement), CpuWarning, stacklevel=4)
        return program
    return program if converter is None else _device(program, converter, options.intermediates_dir)


def _portable(module: GraphModule, examples: Examples, options: CompileOptions, *, int8_io: bool) -> NeutronProgram:
    """Lowers a converted module to a portable program."""
    from openneutron.partition.partitioner import origins_of
    from openneutron.partition.placing import place

    progress = phase_bar("Lowering", LOWERING_SHARES)
    with progress as end_phase, typed_errors("Lowering the model"), code_on_demand():
        lifted = lifted_program(module, examples)
        exported = lifted or export(module, examples)
        leaves = leaves_of(module if lifted else exported.module())
        end_phase()
        methods: dict[str, Any] = quantized_io.int8_io(exported) if int8_io else {}
        placed = place(exported, replace(options, payload="portable"))
        end_phase()
        rows = placed.rows
        methods[INPUT_NAMES] = text_of_leaves(leaves)
        buffer, etrecord = _portable_program(placed, methods, end_phase)
        origins = origins_of(placed)
    return NeutronProgram(buffer, rows, options.target, leaves=leaves, origins=origins, etrecord=etrecord)


def _device(
    portable: NeutronProgram, converter: Converter, intermediates: str | os.PathLike[str] | None
) -> NeutronProgram:
    """Compiles the delegates of a portable program for the device."""
    folder = None if intermediates is None else Path(intermediates)
    compiled = compile_program(portable.buffer, converter, intermediates_dir=folder)
    return replace(
        portable,
        buffer=compiled.program,
        device_source=portable.buffer,
        kernel_selection=compiled.kernel_selection,
        kernels=tuple(payload.kernels for payload in compiled.payloads),
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
        file = quantized
        quantized = loaded_program(file)
        target = target_of_file(file) or target
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
    placed: Placed, constant_methods: Mapping[str, Any], end_phase: Callable[[], None]
) -> tuple[bytes, bytes | None]:
    """Compiles the partitions, then calls `to_edge_transform_and_lower`. Calls `end_phase` after each of the two.

    Returns the bytes of the portable `.pte` and, with `use_profiling`, of its ETRecord.
    """
    from executorch.exir import to_edge_transform_and_lower

    from openneutron.partition.dependency_caches import forget_lowered_programs, load_composite_operators_once
    from openneutron.partition.partitioner import NeutronPartitioner, check_cpu_operators, compile_placed

    with warnings.catch_warnings():
        partitioner = [NeutronPartitioner(placed.graphs.options.to_specs())]
        check_cpu_operators(placed)
        program = compile_placed(placed)
        end_phase()
        records = placed.graphs.options.use_profiling
        with load_composite_operators_once():
            edge = to_edge_transform_and_lower(
                program, partitioner=partitioner, constant_methods=dict(constant_methods), generate_etrecord=records
            )
        warnings.filterwarnings("ignore", "Mutation on a buffer in the model")  # the partitioner keeps initial values
        lowered = edge.to_executorch()
        forget_lowered_programs()
        return bytes(lowered.buffer), _etrecord_of(lowered) if records else None


def _etrecord_of(lowered: Any) -> bytes:
    record = io.BytesIO()
    lowered.get_etrecord().save(record)
    return record.getvalue()
