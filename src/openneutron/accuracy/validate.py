"""Validates a `.pte` on this machine against the float model and the converted module, output by output."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from openneutron.accuracy.compare import compare_layers
from openneutron.accuracy.lsb_rounding import LARGEST_CODE, rounding_in_lsb
from openneutron.accuracy.statistics import Noise
from openneutron.core.boundary import typed_errors
from openneutron.core.fx import is_dequantize, output_node
from openneutron.core.locks import traces_alone
from openneutron.core.options import check_size_of_random
from openneutron.core.progress import phase_bar
from openneutron.errors import InputError, ModelError, OptionError
from openneutron.model.arguments import Leaf
from openneutron.model.data import Data, InputForm, Inputs, first_steps, forms_of, streams_in
from openneutron.model.examples import Examples, arguments_of, call_with_leaves
from openneutron.model.exporting import as_module, check_eval, export
from openneutron.model.state import Stream, has_state, reset
from openneutron.neutron_program import NeutronProgram
from openneutron.quantized_model import QuantizedModel
from openneutron.results.comparison import Comparison
from openneutron.results.validation import OutputDifference, Validation
from openneutron.runtime.native import native_module
from openneutron.runtime.program import ConstantInfo, HostProgram, TensorInfo, load

__all__ = [
    "OutputDifference", "Validation", "dequantized_outputs", "differences_from", "load_program", "names_of_tensors",
    "program_forms",
    "random_samples", "run_program", "validate",
]  # fmt: skip

FLOAT, CONVERTED = "float", "int8"
SAMPLES_OF_LAYERS = 4
"""The largest number of samples for the comparison of layers, which takes longer than that of outputs."""


@traces_alone
def validate(
    program: NeutronProgram | HostProgram | bytes | str | os.PathLike[str],
    model: Any = None,
    data: Data | None = None,
    *,
    quantized: QuantizedModel | GraphModule | ExportedProgram | None = None,
    samples: int = 16,
    transform: Callable[[Any], Any] | None = None,
    min_sqnr_db: float | None = None,
    max_lsb: float | None = None,
) -> Validation:
    """Runs a portable `.pte` on this machine, and compares its outputs with those of the references.

    - `model`: the float model. None takes the float graph of `quantized`, if that is a result of `quantize`.
    - `data`: inputs, in the forms that `quantize` takes. None makes random inputs. At least one of `model` and
      `quantized` is needed.
    - `quantized`: the converted module, for the comparison with it, layer by layer.
    - `min_sqnr_db`: the smallest SQNR that an output of floats may have against float. Outputs of integers, such as
      indices of classes, have no such limit.
    - `max_lsb`: the largest difference that an output may have from the converted module, in int8 steps. The layers are
      compared with the tolerances of their operators in any case.

    Raises `InputError` for data that do not fit, `ModelError` for a model with other inputs or outputs, `OptionError`
    for wrong limits, and `NativeModuleError` if the native module is not installed.
    """
    native_module()
    _check_options(samples, min_sqnr_db, max_lsb)
    host = load_program(program)
    references, streams = _references(host, model, quantized, data, samples=samples, transform=transform)
    scales = _scales(host, references.get(CONVERTED))
    names = names_of_tensors(host)
    differences = {name: differences_from(name, scales, names) for name in references}
    with phase_bar("Comparing outputs", [1] * sum(map(len, streams))) as end_phase:
        for steps in streams:
            host.reset()
            fresh = {name: _reset_copy(one) if has_state(one) else one for name, one in references.items()}
            for inputs in steps:
                _compare_step(host, fresh, inputs, differences)
                end_phase()
    host.reset()
    rows = tuple(one.row() for found in differences.values() for one in found)
    layers = None
    if quantized is not None:
        given_streams = [Stream(steps) for steps in streams]
        layers = compare_layers(quantized, host, given_streams, samples=min(samples, SAMPLES_OF_LAYERS))
    return Validation(sum(map(len, streams)), rows, layers, tuple(_failures(rows, layers, min_sqnr_db, max_lsb)))


def _compare_step(
    host: HostProgram,
    references: Mapping[str, GraphModule],
    inputs: Inputs,
    differences: Mapping[str, list[DifferenceSum]],
) -> None:
    """Runs program and references on the inputs of one step, and adds their differences to `differences`."""
    outputs = dequantized_outputs(run_program(host, inputs), host)
    for name, module in references.items():
        expected = _expected(module, inputs, host)
        for one, value, wanted in zip(differences[name], outputs, expected, strict=True):
            one.add(value, wanted)


def _reset_copy(module: GraphModule) -> GraphModule:
    """Returns a copy with the initial values of the states, if these are known."""
    found = copy.deepcopy(module)
    reset(found)
    return found


def _check_options(samples: int, min_sqnr_db: float | None, max_lsb: float | None) -> None:
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise OptionError(f"samples must be a positive integer, not {samples!r}.")
    for name, value in (("min_sqnr_db", min_sqnr_db), ("max_lsb", max_lsb)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise OptionError(f"{name} must be a number or None, not {value!r}.")
        if value is not None and math.isnan(value):  # no difference exceeds NaN
            raise OptionError(f"{name} must be a number or None, not NaN.")


def load_program(program: Any) -> HostProgram:
    """Returns a loaded program for a result of `lower`, a loaded program, the bytes of a `.pte`, or its path."""
    if isinstance(program, NeutronProgram):
        return HostProgram(program.portable, leaves=program.leaves)
    return program if isinstance(program, HostProgram) else load(program)


def _references(
    host: HostProgram, model: Any, quantized: Any, data: Data | None, *, samples: int, transform: Any
) -> tuple[dict[str, GraphModule], list[list[Inputs]]]:
    """Returns the exported references by name, and the steps of each stream of inputs."""
    if model is None and quantized is None:
        raise ModelError("validate() needs the float model, or a result of quantize() as `quantized`.")
    converted = quantized.module() if isinstance(quantized, ExportedProgram) else quantized
    converted = converted.module if isinstance(converted, QuantizedModel) else converted
    forms = program_forms(host) if converted is None else forms_of(converted)
    if data is None:
        streams = [random_samples(forms, samples)]
    else:
        with typed_errors("Reading the data", InputError):
            streams = first_steps(streams_in(data, forms, transform=transform), samples)
    if not any(streams):
        raise InputError("The data are empty. Give at least one input, or leave the data out for random inputs.")
    first = next(steps[0] for steps in streams if steps)
    references = {}
    if model is not None:
        examples = Examples(first) if converted is None else arguments_of(converted, first)
        module = as_module(model)
        check_eval(module, "validate")
        references[FLOAT] = export(module, examples).module()
    elif isinstance(quantized, QuantizedModel) and quantized.reference is not None:
        references[FLOAT] = quantized.reference
    if converted is not None:
        references[CONVERTED] = converted
    return references, streams


def program_forms(host: HostProgram) -> tuple[InputForm, ...]:
    """Returns the forms of a program's inputs before quantization. An input of int8 with qparams counts as float32."""
    leaves = host.leaves or [Leaf((name,)) for name in host.input_names()]
    return tuple(map(_form, leaves, host.inputs))


def _form(leaf: Leaf, info: TensorInfo | ConstantInfo) -> InputForm:
    if isinstance(info, ConstantInfo):
        return InputForm(leaf.name, (), None, leaf.path, info.value)
    return InputForm(leaf.name, info.shape, info.dtype if info.scale is None else torch.float32, leaf.path)


def random_samples(forms: Sequence[InputForm], count: int) -> list[Inputs]:
    """Returns random inputs with the seeds 0, 1, ... Raises `OptionError` if they need too much memory."""
    sizes = [form.dtype.itemsize * math.prod(size or 1 for size in form.sizes) for form in forms if form.dtype]
    check_size_of_random(count, max(1, sum(sizes)), "random samples")
    return [random_inputs(forms, seed) for seed in range(count)]


def random_inputs(forms: Sequence[InputForm], seed: int) -> Inputs:
    """Returns random inputs: normal numbers for floats, zeros and ones for bools, zeros for other integers."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(_random(form, generator) for form in forms)


def _random(form: InputForm, generator: torch.Generator) -> Any:
    if form.dtype is None:
        return form.constant
    sizes = [size or 1 for size in form.sizes]
    if form.dtype.is_floating_point:
        return torch.randn(sizes, generator=generator, dtype=form.dtype)
    if form.dtype == torch.bool:
        return torch.rand(sizes, generator=generator) < 0.5
    return torch.zeros(sizes, dtype=form.dtype)


def run_program(host: HostProgram, inputs: Inputs) -> Any:
    """Runs a program on a value for each input. Quantizes floats for the inputs that take int8."""
    values = [
        info.quantize(value) if isinstance(info, TensorInfo) and info.scale is not None else value
        for value, info in zip(inputs, host.inputs, strict=True)
    ]
    return host.run(*values)


def dequantized_outputs(outputs: Any, host: HostProgram) -> list[Tensor]:
    """Returns the outputs that are tensors, dequantized."""
    infos = [info for info in host.outputs if isinstance(info, TensorInfo)]
    found = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [value if info.scale is None else info.dequantize(value) for value, info in zip(found, infos, strict=True)]


@torch.no_grad()
def _expected(module: GraphModule, inputs: Inputs, host: HostProgram) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(call_with_leaves(module, inputs)) if isinstance(leaf, Tensor)]
    shapes = [tuple(value.shape) for value in found]
    if shapes != list(host.output_shapes):
        raise ModelError(
            f"The outputs of the program have the shapes {list(host.output_shapes)}, and those of the model {shapes}. "
            "Give the model that the program was lowered from."
        )
    return found


def names_of_tensors(host: HostProgram) -> list[str]:
    """Returns the names of the outputs that are tensors."""
    named = zip(host.output_names(), host.outputs, strict=True)
    return [name for name, info in named if isinstance(info, TensorInfo)]


def differences_from(reference: str, scales: Sequence[float | None], names: Sequence[str]) -> list[DifferenceSum]:
    """Returns a `DifferenceSum` for each output, from its scale and its name."""
    return [DifferenceSum(reference, i, *one) for i, one in enumerate(zip(scales, names, strict=True))]


def _scales(host: HostProgram, converted: GraphModule | None) -> list[float | None]:
    """Returns the scale of each output that is a tensor; None for an output that is not quantized, or unknown."""
    infos = [info for info in host.outputs if isinstance(info, TensorInfo)]
    scales = [info.scale for info in infos]
    if converted is None:
        return scales
    returned = [node for node in tree_leaves(output_node(converted.graph).args[0]) if isinstance(node, Node)]
    if len(returned) != len(scales):
        return scales
    return [scale or _scale_of(node) for scale, node in zip(scales, returned, strict=True)]


def _scale_of(node: Node) -> float | None:
    if not is_dequantize(node):
        return None
    scale = node.args[1]
    return float(scale) if isinstance(scale, (int, float)) else None


class DifferenceSum:
    """Sums up the difference of one output from one reference. `scale` belongs to a quantized output."""

    def __init__(self, reference: str, output: int, scale: float | None, name: str) -> None:
        self.reference, self.output, self.scale, self.name = reference, output, scale, name
        self.noise, self.product, self.energy, self.largest = Noise(), 0.0, 0.0, 0.0
        self.is_finite = True
        self.is_float, self.equal, self.values = True, 0, 0

    def add(self, value: Tensor, wanted: Tensor) -> None:
        """Adds one sample. Equal infinities of both tensors at one position, as masks have, count as zeros."""
        self.is_float = wanted.is_floating_point()
        self.equal, self.values = self.equal + int((value == wanted).sum()), self.values + wanted.numel()
        value, wanted = value.double(), wanted.double()
        same = value.isinf() & (value == wanted)
        value, wanted = value.masked_fill(same, 0.0), wanted.masked_fill(same, 0.0)
        if not (value.isfinite().all() and wanted.isfinite().all()):
            self.is_finite = False
            return
        self.noise.add(wanted, value)
        self.product += float((value * wanted).sum())
        self.energy += float(value.square().sum())
        self.largest = max(self.largest, float((value - wanted).abs().max()) if value.numel() else 0.0)

    def row(self) -> OutputDifference:
        """Returns the difference over all samples so far: NaN if a value of a sample is not finite."""
        if not self.is_finite:
            lsb = None if self.scale is None else math.nan
            return OutputDifference(self.output, self.reference, -math.inf, math.nan, math.nan, lsb, self.name)
        norm = math.sqrt(self.energy * self.noise.signal)
        cosine = self.product / norm if norm else float(self.energy == self.noise.signal)
        lsb = None if self.scale is None else self.largest / self.scale
        equal = None if self.is_float else self.equal / self.values if self.values else 1.0
        sqnr = self.noise.sqnr_db
        return OutputDifference(self.output, self.reference, sqnr, cosine, self.largest, lsb, self.name, equal)


def _is_beyond(lsb: float | None, limit: float) -> bool:
    """Whether a difference in LSBs exceeds the limit, and the rounding of the floats from which it is computed."""
    return lsb is not None and lsb > limit + rounding_in_lsb(LARGEST_CODE, limit)


def _failures(
    rows: Sequence[OutputDifference], layers: Comparison | None, min_sqnr_db: float | None, max_lsb: float | None
) -> Iterator[str]:
    for row in rows:
        if math.isnan(row.largest):
            yield (
                f"{row.title} of the program or of the {row.reference} model has values that are not finite. "
                "Check the weights and the inputs for NaN and overflow."
            )
            continue
        least = min_sqnr_db if row.reference == FLOAT and row.equal is None else None
        if least is not None and row.sqnr_db < least:
            yield f"{row.title} has {row.sqnr_db:.1f} dB against float, less than {least:g} dB."
        if row.reference == CONVERTED and max_lsb is not None and _is_beyond(row.lsb, max_lsb):
            yield f"{row.title} differs from the converted module by {row.lsb:.4g} LSB, more than {max_lsb:g}."
    for layer in layers.layers if layers is not None else ():
        if layer.is_beyond:
            yield (
                f"Layer {layer.node} ({layer.op}) differs from the converted module by {layer.lsb} LSB, more than its "
                f"tolerance of {layer.tolerance}."
            )
