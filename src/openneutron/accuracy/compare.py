"""Compares a converted module with its `.pte` on this machine, layer by layer."""

from __future__ import annotations

import os
import warnings
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, permutations
from operator import mul
from typing import Any

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from openneutron.accuracy.given import given
from openneutron.compile_spec import CompileOptions
from openneutron.core.evaluation import GraphRun, compute_from
from openneutron.core.files import read_file
from openneutron.core.fx import first_operand, is_dequantize, modules_of, op_name, output_node, placeholders, source_of
from openneutron.core.locks import traces_alone
from openneutron.errors import InputError, ModelError
from openneutron.flow import lower
from openneutron.formats import pte, tflite
from openneutron.formats.payload import Payload, parse
from openneutron.model.data import Data
from openneutron.model.examples import arguments_of, examples_of
from openneutron.model.exporting import export
from openneutron.model.state import next_value
from openneutron.neutron_program import NeutronProgram
from openneutron.partition import quantized_io
from openneutron.partition.clusters import Cluster, Constants, qparams_of
from openneutron.partition.compile import compile_partition
from openneutron.partition.dim_orders import assign_dim_orders
from openneutron.partition.placing import Placed, place
from openneutron.partition.scheduling import Partition
from openneutron.passes.functionalize import writes_memory
from openneutron.quantized_model import QuantizedModel
from openneutron.results.comparison import Comparison, LayerDifference
from openneutron.runtime.engine import interpreter_of
from openneutron.runtime.native import native_module
from openneutron.runtime.program import ConstantInfo, HostProgram, TensorInfo
from openneutron.vendor.profiling import node_of

__all__ = ["Comparison", "LayerDifference", "compare_layers"]

_BACKEND = "NeutronBackend"
_TO_NHWC = (0, 2, 3, 1)


@traces_alone
def compare_layers(
    quantized: QuantizedModel | GraphModule | ExportedProgram,
    program: NeutronProgram | HostProgram | bytes | str | os.PathLike[str] | None,
    data: Data,
    *,
    transform: Callable[[Any], Any] | None = None,
    samples: int = 4,
    example_inputs: Any = None,
) -> Comparison:
    """Runs the delegates of a `.pte` and compares each layer in them with the module's layer on the same int8 inputs.

    `program` is a result of `lower`, or a portable `.pte` as bytes or by its path; None lowers `quantized`. `data` and
    `transform` are as for the calibration data of `quantize`; the comparison uses the first `samples`.

    Method:

    1. Compile the module again with the options of the program. The TFLite files then differ only in names and
       constants, and the names identify the output tensor of each layer.
    2. Add these tensors to the outputs of the program's own TFLite files. Operators and constants stay unchanged.
    3. Compute each layer of the module on the inputs that the layer had in the `.pte`. A difference is therefore the
       layer's own, and does not come from earlier layers.

    Limits:

    - A layer that the compiler merged into another one is listed in `unseen`; its difference is part of the next one's.
    - An added output may prevent a fusion inside LiteRT.
    - Each delegate gets the module's inputs, so only `output_lsb` includes what ExecuTorch's kernels compute on the
      CPU.
    - The order of a tensor's dimensions is unknown; the comparison uses the order with the best match. The compiler
      moves some reshapes past layers. If a layer then has the right values, but no order of its dimensions matches, the
      layer is listed in `unseen`.

    `example_inputs` are those of `lower`. They are needed for a module from `convert_pt2e` if their memory format
    differs from that of the data. Raises `ModelError` if the program was not lowered from the module, `InputError`
    for data that do not fit the model and for a program with device payloads, and `NativeModuleError` if the native
    module is not installed.
    """
    native_module()
    read = given(quantized, data, samples, transform)
    quantized, module, streams = read.quantized, read.module, read.streams
    kept = quantized.examples if isinstance(quantized, QuantizedModel) else arguments_of(module, read.first)
    exported = export(module, kept if example_inputs is None else examples_of(example_inputs, module))
    if program is None:
        program = lower(exported, target=quantized.target if isinstance(quantized, QuantizedModel) else None)
    both = _ModuleAndProgram.from_buffer(exported, _bytes_of(program))
    differences = [both.compare_stream(steps) for steps in streams]
    rows = [row for delegate in both.delegates for row in delegate.rows()]
    order = {node.name: position for position, node in enumerate(both.program.graph.nodes)}
    return Comparison(
        samples=sum(map(len, streams)),
        output_lsb=max([0.0, *differences]),
        layers=tuple(sorted(rows, key=lambda row: order[row.node])),
        unseen=tuple(name for delegate in both.delegates for name in delegate.unseen),
    )


@dataclass(frozen=True)
class _ModuleAndProgram:
    """The `.pte`, and the converted module with the placement that the `.pte` has."""

    program: ExportedProgram
    host: HostProgram
    delegates: list[_Delegate]

    @classmethod
    def from_buffer(cls, exported: ExportedProgram, buffer: bytes) -> _ModuleAndProgram:
        """Places and compiles the exported module with the options that the `.pte` contains."""
        host = HostProgram.from_bytes(buffer)
        payloads, options = _payloads(buffer)
        if any(map(_is_int8, (*host.inputs, *host.outputs))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", quantized_io.FloatIOWarning)  # lower() has shown this warning
                quantized_io.int8_io(exported)
        # Profiling writes the names of tensors; the folder of the lowering may be gone.
        placed = place(exported, replace(options, use_profiling=True, intermediates_dir=None))
        return cls(placed.program, host, _delegates(placed, payloads))

    def compare_stream(self, steps: Sequence[Sequence[Any]]) -> float:
        """Runs the steps in the module and in the `.pte`, both from their initial states.

        Returns the largest difference of the outputs, in int8 steps.
        """
        states: dict[Node, torch.Tensor] = {}
        self.host.reset()
        return max((self._compare_step(sample, states) for sample in steps), default=0.0)

    def _compare_step(self, sample: Sequence[Any], states: dict[Node, torch.Tensor]) -> float:
        given = [
            info.quantize(value) if isinstance(info, TensorInfo) and _is_int8(info) else value
            for value, info in zip(sample, self.host.inputs, strict=True)
        ]
        values = _run_program(self.program, given, states)
        constants = {node: values[node] for node in placeholders(self.program.graph)}
        for delegate in self.delegates:
            delegate.compare(self.program, values, constants)
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        return _output_difference(self.program, values, self.host.run(*tensors))


def _is_int8(info: TensorInfo | ConstantInfo) -> bool:
    return isinstance(info, TensorInfo) and info.scale is not None


def _bytes_of(program: NeutronProgram | HostProgram | bytes | str | os.PathLike[str]) -> bytes:
    if isinstance(program, NeutronProgram):
        return program.portable
    if isinstance(program, HostProgram):
        return program.buffer
    return program if isinstance(program, bytes) else read_file(program)


def _payloads(buffer: bytes) -> tuple[list[Payload], CompileOptions]:
    """Returns the payloads of our delegates in order of execution, and the options that they were compiled with."""
    calls = [call for method in pte.read(buffer).methods[:1] for call in method.calls]
    ours = [call for call in calls if isinstance(call, pte.DelegateCall) and call.backend == _BACKEND]
    if not ours:
        raise InputError(
            "This program has no delegate for the NPU, so there are no layers to compare. Check the reasons in its "
            "placement."
        )
    payloads = [parse(call.payload) for call in ours]
    if not all(payload.is_portable for payload in payloads):
        raise InputError("This program contains microcode, which only the board runs. Give the portable .pte.")
    return payloads, CompileOptions.from_values(ours[0].compile_specs)


@dataclass(eq=False)
class _Delegate:
    """A delegate of the program, and the differences of its layers over the samples so far."""

    partition: Partition
    payload: Payload
    interpreter: Interpreter
    tensors: dict[Node, int]
    """For each quantize node of a layer, the index of the TFLite tensor that holds its output."""
    lsb: dict[Cluster, int] = field(default_factory=dict)
    differing: dict[Cluster, list[float]] = field(default_factory=dict)

    @property
    def unseen(self) -> list[str]:
        return [cluster.node.name for cluster in self.partition.clusters if cluster.quantize not in self.tensors]

    def rows(self) -> list[LayerDifference]:
        return [_row(cluster, lsb, self.differing[cluster]) for cluster, lsb in self.lsb.items()]

    def compare(self, program: ExportedProgram, values: Mapping[Node, Any], constants: dict[Node, Any]) -> None:
        """Compares the layers on one sample.

        `values` are the values of the module's nodes, `constants` those of its parameters, buffers and inputs.
        """
        self._invoke(values)
        known = ChainMap({node: values[node] for node in self.partition.inputs}, constants)
        for cluster in self.partition.clusters:
            computed = compute_from(known, program.graph_module, cluster.quantize)
            if cluster.quantize not in self.tensors:
                continue
            stored = torch.from_numpy(np.asarray(self.interpreter.get_tensor(self.tensors[cluster.quantize])))
            found = _match_dimensions(stored, computed)
            if _is_permutation(found, computed, cluster.spec.tolerance):
                del self.tensors[cluster.quantize]
                continue
            difference = (found.int() - computed.int()).abs()
            self.lsb[cluster] = max(self.lsb.get(cluster, 0), int(difference.max()))
            self.differing.setdefault(cluster, []).append(float(difference.ne(0).float().mean()))
            known[cluster.quantize] = found

    def _invoke(self, values: Mapping[Node, Any]) -> None:
        header = self.payload.header
        details = self.interpreter.get_input_details()
        for detail, argument, flag in zip(details, header.input_map, header.input_formats, strict=True):
            value = values[self.partition.inputs[argument]]
            ordered = value.permute(_TO_NHWC) if flag else value
            self.interpreter.set_tensor(detail["index"], ordered.contiguous().numpy().reshape(detail["shape"]))
        self.interpreter.invoke()


def _row(cluster: Cluster, lsb: int, differing: Sequence[float]) -> LayerDifference:
    modules = modules_of(cluster.node)
    return LayerDifference(
        node=cluster.node.name,
        op=op_name(cluster.node),
        module=modules[-1][0] if modules else None,
        source=source_of(cluster.node),
        lsb=lsb,
        differing=sum(differing) / len(differing),
        tolerance=cluster.spec.tolerance,
    )


def _delegates(placed: Placed, payloads: Sequence[Payload]) -> list[_Delegate]:
    partitions = placed.partitions
    if len(payloads) != len(partitions):
        raise _mismatch_error(f"it has {len(payloads)} delegates, but the module has {len(partitions)}")
    orders, constants = assign_dim_orders(placed.program, partitions), Constants(placed.program)
    delegates = []
    for number, (partition, payload) in enumerate(zip(partitions, payloads, strict=True)):
        ours = tflite.read(compile_partition(placed.graphs, partition, orders.is_channels_last).tflite)
        theirs = tflite.read(payload.tflite)
        if _graph_structure(ours) != _graph_structure(theirs) or not _outputs(theirs) <= _outputs(ours):
            raise _mismatch_error(f"delegate {number} has other operators than the module")
        if _scales(ours) != _scales(theirs):
            raise _mismatch_error(
                f"delegate {number} has other scales, so the weights or the calibration differ from the module's"
            )
        tensors = _tensors(partition, ours.subgraphs[0], constants)
        model = tflite.with_more_outputs(payload.tflite, list(tensors.values()))
        delegates.append(_Delegate(partition, payload, interpreter_of(model), tensors))
    return delegates


def _graph_structure(model: tflite.Model) -> list[Any]:
    """Returns the graph without constant data and qparams: the inputs, and the operators with their tensors' shapes."""
    graph = model.subgraphs[0]
    operators = [
        (operator.name, [tensor and (tensor.index, tensor.shape) for tensor in (*operator.inputs, *operator.outputs)])
        for operator in graph.operators
    ]
    return [[tensor.index for tensor in graph.inputs], operators]


def _outputs(model: tflite.Model) -> set[int]:
    """Returns the indices of the outputs. The outputs in a `.pte` do not include those that the CPU does not read."""
    return {tensor.index for tensor in model.subgraphs[0].outputs}


def _scales(model: tflite.Model) -> list[Any]:
    """Returns scales and zero points of the activations, in order of computation."""
    activations = (tensor for operator in model.subgraphs[0].operators for tensor in operator.outputs)
    known = (tensor.quantization for tensor in activations)
    return [None if one is None else (*map(np.float32, one.scale), *one.zero_point) for one in known]


def _tensors(partition: Partition, graph: tflite.Subgraph, constants: Constants) -> dict[Node, int]:
    """Returns the index of each layer's output tensor, by quantize node.

    It is the layer's last tensor with the number of elements and the qparams of the output.
    """
    by_origin: dict[str, list[tflite.FileTensor]] = {}
    for operator in graph.operators:
        for tensor in operator.outputs:
            origin = node_of(tensor.name)
            if origin is not None:
                by_origin.setdefault(origin, []).append(tensor)
    found: dict[Node, int] = {}
    for cluster in partition.clusters:
        output, qparams = cluster.quantize.meta["val"], qparams_of(cluster.quantize, constants)
        for tensor in by_origin.get(cluster.node.name, ()):
            quantization = tensor.quantization
            same = quantization is not None and (
                quantization.zero_point[0] == qparams.zero_point[0]
                and abs(quantization.scale[0] / qparams.scale[0] - 1) < 1e-6
            )
            if same and tensor.elements == output.numel():
                found[cluster.quantize] = tensor.index
    return found


def _match_dimensions(stored: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Permutes `stored` to the dimensions of `like`. Uses the permutation with the smallest L1 distance to `like`.

    Neighboring dimensions may be merged in `stored`: for example, the frames of a volume with the batch.
    """
    best, least = stored.reshape(like.shape), float("inf")
    for order in permutations(range(like.dim())):
        turned = like.permute(order)
        if not _leading_products(stored.shape) <= _leading_products(turned.shape):
            continue
        back = sorted(range(like.dim()), key=order.__getitem__)
        value = stored.reshape(turned.shape).permute(back)
        distance = float((value.int() - like.int()).abs().sum())
        if distance < least:
            best, least = value, distance
        if distance == 0:
            break
    return best


def _is_permutation(found: torch.Tensor, computed: torch.Tensor, tolerance: int) -> bool:
    """Whether `found` has the values of `computed` within `tolerance`, but at other positions."""
    if bool((found.int() - computed.int()).abs().le(tolerance).all()):
        return False
    ordered = found.int().flatten().sort().values - computed.int().flatten().sort().values
    return bool(ordered.abs().le(tolerance).all())


def _leading_products(shape: Sequence[int]) -> set[int]:
    """Returns the products of the first k dimensions, for each k.

    The products of a shape with merged dimensions are a subset of the products of the original shape.
    """
    return set(accumulate(shape, mul, initial=1))


class _ProgramRun(GraphRun):
    """A run that collects in `stored` what the program writes to its states, and leaves the states unchanged."""

    def __init__(self, module: GraphModule, given: Mapping[Node, Any]) -> None:
        super().__init__(module, given, keeps_values=True)
        self.stored: dict[Node, Any] = {}

    def compute(self, node: Node) -> Any:
        """Computes `node` unless it writes memory. A program writes to its states only."""
        if not writes_memory(node):
            return super().compute(node)
        self.stored[first_operand(node)] = self.values[next_value(node)]
        return None


def _run_program(
    program: ExportedProgram, inputs: Sequence[torch.Tensor], states: dict[Node, torch.Tensor]
) -> dict[Node, Any]:
    """Runs an exported program and returns the value of every node.

    `states` holds the values of the states before the call, or is empty for initial values. The call updates it.
    """
    constants = Constants(program)
    waiting = iter(inputs)
    given: dict[Node, Any] = {}
    for node in placeholders(program.graph):
        if node in states:
            given[node] = states[node]
        elif constants.is_written(node):
            given[node] = constants.initial_value(node)
        else:
            given[node] = constants.tensor(node) if node in constants else next(waiting)
    run = _ProgramRun(program.graph_module, given)
    run.run()
    states.update(run.stored)
    return run.values


def _output_difference(program: ExportedProgram, values: Mapping[Node, Any], returned: Any) -> float:
    """Returns the largest difference of an output, in int8 steps of that output."""
    nodes = [leaf for leaf in tree_leaves(output_node(program.graph).args[0]) if isinstance(leaf, Node)]
    tensors = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
    worst = 0.0
    for node, found in zip(nodes, tensors, strict=True):
        if not found.numel():
            continue
        difference = (found.double() - values[node].double()).abs().max()
        worst = max(worst, float(difference) / _step(node))
    return worst


def _step(node: Node) -> float:
    """Returns the scale of an output, from the last dequantize on its path; 1 for an integer output."""
    if not node.meta["val"].is_floating_point():
        return 1.0
    while not is_dequantize(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return float(node.args[1]) if is_dequantize(node) else 1.0  # type: ignore[arg-type]


def _mismatch_error(fault: str) -> ModelError:
    return ModelError(
        f"This program was not lowered from this module: {fault}. Lower the module again. For a module from "
        "convert_pt2e, also give the example_inputs of lower()."
    )
