"""The compilation of one partition: the IR, its TFLite file, its payload."""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch.export import ExportedProgram
from torch.fx import Node

from openneutron import tflite
from openneutron.compile_spec import CompileOptions
from openneutron.ir.build import build, is_channels_last, optimize
from openneutron.ir.graph import Graph, QParams
from openneutron.ir.rewrites import copy_unwritten_outputs, hoist_format_conversions
from openneutron.ir.verify import verify
from openneutron.partition.clusters import Constants, qparams_of
from openneutron.partition.levels import Partition
from openneutron.payload import PayloadHeader, pack_portable

__all__ = ["compile_partition", "lower_partition"]


def lower_partition(
    program: ExportedProgram, partition: Partition, channels_last: Callable[[Node], bool] = is_channels_last
) -> Graph:
    """The optimized IR of a partition; `channels_last` says which of its inputs and outputs are NHWC."""
    constants = Constants(program)
    qparams: dict[object, QParams] = {}
    for cluster in partition.clusters:
        for operand in cluster.operands:
            qparams.setdefault(operand.args[0], qparams_of(operand, constants))
    return optimize(
        build(
            partition.clusters,
            {node: qparams[node] for node in partition.inputs},
            partition.outputs,
            constants.array,
            lambda node: qparams_of(node, constants),
            channels_last=channels_last,
        )
    )


def compile_partition(
    program: ExportedProgram,
    partition: Partition,
    options: CompileOptions,
    channels_last: Callable[[Node], bool] = is_channels_last,
) -> bytes:
    """The delegate payload of a partition: its TFLite model, which the host runs and the vendor's converter takes."""
    graph = lower_partition(program, partition, channels_last)
    input_formats = tuple(map(channels_last, partition.inputs))
    output_formats = tuple(map(channels_last, partition.outputs))
    if not options.use_neutron_for_format_conversion:
        graph, hoisted_inputs, hoisted_outputs = hoist_format_conversions(graph)
        input_formats = tuple(map(operator.or_, input_formats, hoisted_inputs))
        output_formats = tuple(map(operator.or_, output_formats, hoisted_outputs))
        graph = copy_unwritten_outputs(graph)
    model = tflite.write(verify(graph, "hoist_format_conversions"))
    header = PayloadHeader(
        input_formats=tuple(map(int, input_formats)),
        output_formats=tuple(map(int, output_formats)),
        input_map=tuple(range(len(partition.inputs))),
        output_map=tuple(range(len(partition.outputs))),
        argument_count=len(partition.inputs),
    )
    return pack_portable(header, model)
