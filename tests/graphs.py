"""The IR of each partition of a quantized model."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram

from openneutron import QuantizedModel
from openneutron.compile_spec import CompileOptions
from openneutron.ir.graph import Graph
from openneutron.partition.clusters import Constants
from openneutron.partition.compile import PartitionGraphs
from openneutron.partition.placing import Placement, place

__all__ = ["kinds", "partition_graphs", "placed_graphs"]


def partition_graphs(model: QuantizedModel, **options: Any) -> list[Graph]:
    """Returns the optimized IR of each partition, for the model's target unless `options` have another."""
    chosen = CompileOptions(**{"target": model.target, **options})
    return placed_graphs(torch.export.export(model.module, model.example_inputs), chosen)[1]


def placed_graphs(program: ExportedProgram, options: CompileOptions) -> tuple[tuple[Placement, ...], list[Graph]]:
    """Returns the placement of a quantized program, and the IR of each partition."""
    placed = place(program, options)
    graphs = PartitionGraphs(Constants(program), options)
    return placed.rows, [graphs.formatted(partition).graph for partition in placed.partitions]


def kinds(graph: Graph) -> list[str]:
    """Returns the TFLite operators of a graph, in order."""
    return [op.kind.name for op in graph.ops]
