"""The documented flow as functions, and the comparison of the converted module with the program."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from executorch.exir import to_edge_transform_and_lower
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronPartitioner, NeutronQuantizer, generate_neutron_compile_spec
from openneutron.core.fx import is_dequantize, is_quantize, op_name, output_node
from openneutron.model.arguments import INPUT_NAMES, text_of_leaves
from openneutron.model.examples import leaves_of
from openneutron.partition.partitioner import CpuWarning
from openneutron.quantizer import UnquantizedWarning
from openneutron.runtime import HostProgram

__all__ = [
    "Inputs", "Lowered", "convert", "cpu_operators", "delegate_count", "flat", "lower_documented", "qparams",
    "quantization_nodes", "seeded", "worst_lsb",
]  # fmt: skip

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Lowered:
    """A `.pte`, and the facts that ExecuTorch reports about it."""

    pte: bytes
    delegates: int
    cpu: list[str]

    def run(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        outputs: torch.Tensor | tuple[torch.Tensor, ...] = self._loaded.run(*inputs)
        return outputs

    @functools.cached_property
    def _loaded(self) -> HostProgram:
        return HostProgram.from_bytes(self.pte)


def seeded(build: Callable[[], torch.nn.Module], seed: int = 0) -> torch.nn.Module:
    """Builds a model with the same weights in each run, and restores the global random generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def convert(
    model: torch.nn.Module,
    inputs: Inputs,
    *,
    quantizer: NeutronQuantizer | None = None,
    strict: bool = False,
    calibration: Iterable[Inputs] | None = None,
) -> GraphModule:
    """Runs steps 1 to 4 of the documented flow. Ignores warnings about operators that remain in float."""
    exported = torch.export.export(model, inputs, strict=strict).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnquantizedWarning)
        prepared = prepare_pt2e(exported, quantizer or NeutronQuantizer())
    for sample in [inputs] if calibration is None else calibration:
        prepared(*sample)
    converted: GraphModule = convert_pt2e(prepared)
    return converted


def names_of_inputs(exported: ExportedProgram) -> dict[str, str]:
    """Returns the constant method that `lower` adds to a program: the names of its inputs."""
    return {INPUT_NAMES: text_of_leaves(leaves_of(exported.module()))}


def lower_documented(
    converted: GraphModule, inputs: Inputs, *, strict: bool = False, with_names: bool = False, **spec: Any
) -> Lowered:
    """Runs steps 5 and 6 of the documented flow. `with_names` adds the names of the inputs, as `lower` does."""
    compile_spec = generate_neutron_compile_spec(spec.pop("config", "imxrt700"), **spec)
    exported = torch.export.export(converted, inputs, strict=strict)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CpuWarning)
        partitioner = [NeutronPartitioner(compile_spec=compile_spec)]
        methods = names_of_inputs(exported) if with_names else None
        edge = to_edge_transform_and_lower(exported, partitioner=partitioner, constant_methods=methods)
    program = edge.exported_program().graph_module
    delegates, cpu = delegate_count(program), cpu_operators(program)  # to_executorch() changes the graph
    return Lowered(bytes(edge.to_executorch().buffer), delegates, cpu)


def delegate_count(module: GraphModule) -> int:
    return sum("call_delegate" in str(node.target) for node in module.graph.nodes)


def cpu_operators(module: GraphModule) -> list[str]:
    """Returns the operators on the CPU, without quantize and dequantize."""
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
    return [
        op_name(node)
        for node in nodes
        if "call_delegate" not in str(node.target) and not is_quantize(node) and not is_dequantize(node)
    ]


def quantization_nodes(module: GraphModule) -> tuple[int, int]:
    """Returns the number of quantize and dequantize nodes."""
    nodes = list(module.graph.nodes)
    return sum(map(is_quantize, nodes)), sum(map(is_dequantize, nodes))


def flat(value: Any) -> list[Any]:
    """Returns the tensors of an output in the order in which a program returns them."""
    leaves: list[Any] = tree_flatten(value)[0]
    return leaves


def qparams(module: GraphModule) -> list[tuple[Any, ...]]:
    """Returns scale, zero point and range of each quantize and dequantize node, sorted independently of names."""
    nodes = [node for node in module.graph.nodes if is_quantize(node) or is_dequantize(node)]
    return sorted((op_name(node), *map(str, node.args[1:])) for node in nodes)


def worst_lsb(converted: GraphModule, run: Callable[..., Any], samples: Sequence[Inputs]) -> float:
    """Returns the largest difference between `run` and the converted module, in steps of each output."""
    steps = [_lsb(node) for node in _returned(converted)]
    worst = 0.0
    for sample in samples:
        found, expected = flat(run(*sample)), flat(converted(*sample))
        assert len(found) == len(expected) == len(steps)
        for got, want, step in zip(found, expected, steps, strict=True):
            assert got.shape == want.shape
            worst = max(worst, ((got.float() - want.float()).abs().max() / step).item())
    return worst


def _returned(converted: GraphModule) -> list[Node]:
    return [leaf for leaf in flat(output_node(converted.graph).args[0]) if isinstance(leaf, Node)]


def _lsb(node: Node) -> float:
    """Returns the step of an output: the scale of the dequantize that it comes from, or a step for a float output."""
    while not is_dequantize(node):
        if not node.all_input_nodes:
            return 1e-5
        node = node.all_input_nodes[0]
    scale = node.args[1]
    assert isinstance(scale, float)
    return scale
