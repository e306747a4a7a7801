"""The IR that a quantized model becomes, partition by partition."""

from __future__ import annotations

from typing import Any

import torch

from openneutron import QuantizedModel
from openneutron.compile_spec import CompileOptions
from openneutron.ir.graph import Graph
from openneutron.partition.compile import format_partition
from openneutron.partition.placing import place

__all__ = ["kinds", "partition_graphs"]


def partition_graphs(model: QuantizedModel, **options: Any) -> list[Graph]:
    """The optimized IR of each partition, for the model's target unless `options` name another."""
    chosen = CompileOptions(**{"target": model.target, **options})
    program = torch.export.export(model.module, model.example_inputs)
    return [format_partition(program, partition, chosen).graph for partition in place(program, chosen).partitions]


def kinds(graph: Graph) -> list[str]:
    """The TFLite operators of a graph, in order."""
    return [op.kind.name for op in graph.ops]
