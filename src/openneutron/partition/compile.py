"""Compiles a partition: builds and optimizes its IR, writes its TFLite model, packs its payload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import or_

from torch.fx import Node

from openneutron.compile_spec import CompileOptions
from openneutron.core.fx import op_name, source_of
from openneutron.errors import ModelError
from openneutron.formats import tflite
from openneutron.formats.payload import Payload, PayloadHeader
from openneutron.formats.tflite.trial import error_in_subprocess
from openneutron.ir.build import Stage, build, driver_of, is_channels_last, optimize, run_stage
from openneutron.ir.graph import Graph, Op, QParams
from openneutron.ir.kinds import TRANSPOSE
from openneutron.ir.rewrites import hoisted_ends
from openneutron.ir.scales import is_unusual_scale
from openneutron.ir.views import swapped_blocks
from openneutron.ops.shapes import is_legacy_swap
from openneutron.partition.clusters import Constants, qparams_of
from openneutron.partition.scheduling import Partition
from openneutron.targets import Generation, NeutronTarget

__all__ = ["FormattedGraph", "PartitionGraphs", "compile_partition", "lower_partition", "unsupported_transposes"]


def lower_partition(
    constants: Constants, partition: Partition, channels_last: Callable[[Node], bool] = is_channels_last
) -> Graph:
    """Returns the optimized IR of a partition. An input or output is NHWC in memory if `channels_last(node)`."""
    return optimize(_unoptimized(constants, partition, channels_last), partition.target)


def _unoptimized(constants: Constants, partition: Partition, channels_last: Callable[[Node], bool]) -> Graph:
    """Returns the IR of a partition before optimization."""
    qparams: dict[object, QParams] = {}
    for cluster in partition.clusters:
        for operand in cluster.operands:
            qparams.setdefault(operand.args[0], qparams_of(operand, constants))
    return build(
        partition.clusters,
        {node: qparams[node] for node in partition.inputs},
        partition.outputs,
        constants.array,
        lambda node: qparams_of(node, constants),
        channels_last=channels_last,
    )


@dataclass(frozen=True)
class FormattedGraph:
    """The IR of a partition, and for each input and output whether it is NHWC in the IR.

    The runtime converts such a value from or to NCHW if it is NCHW in the memory of the program.
    """

    graph: Graph
    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]


@dataclass(frozen=True)
class PartitionGraphs:
    """A cache of the IR of the partitions of one program.

    Each partition is built once for each combination of dim orders of its inputs and outputs. Compilation reuses the
    IR that the search for partitions built.
    """

    constants: Constants
    options: CompileOptions
    _formatted: dict[object, FormattedGraph] = field(default_factory=dict)

    def formatted(
        self, partition: Partition, channels_last: Callable[[Node], bool] = is_channels_last
    ) -> FormattedGraph:
        """Returns the IR of a partition with the formats of its inputs and outputs.

        An input or output is NHWC in the memory of the program if `channels_last(node)`. By default, it has the same
        format in the IR.

        The legacy generation supports few transposes. For this generation, the method also builds the IR with all
        images in NHWC, which the runtime converts. It returns the IR with fewer unsupported transposes; if both have
        equally many, the IR with fewer transposes.
        """
        unchanged = self._choose_formats(partition, channels_last)
        if self.options.generation is not Generation.LEGACY:
            return unchanged
        as_images = self._choose_formats(partition, _is_image)
        return min(unchanged, as_images, key=lambda formatted: _count_transposes(formatted.graph, partition.target))

    def _choose_formats(self, partition: Partition, channels_last: Callable[[Node], bool]) -> FormattedGraph:
        inputs, outputs = (tuple(map(channels_last, nodes)) for nodes in (partition.inputs, partition.outputs))
        key = (partition.clusters, partition.inputs, partition.outputs, inputs, outputs)
        if key not in self._formatted:
            self._formatted[key] = self._optimize_with_formats(partition, channels_last, inputs, outputs)
        return self._formatted[key]

    def _optimize_with_formats(
        self,
        partition: Partition,
        channels_last: Callable[[Node], bool],
        inputs: tuple[bool, ...],
        outputs: tuple[bool, ...],
    ) -> FormattedGraph:
        is_legacy = self.options.generation is Generation.LEGACY
        driver = driver_of(partition.name, self.options.intermediates_dir)
        graph = optimize(_unoptimized(self.constants, partition, channels_last), partition.target, driver)
        if is_legacy or not self.options.use_neutron_for_format_conversion:
            optimized = graph
            graph = run_stage(Stage.FORMATS, optimized, driver)
            hoisted_inputs, hoisted_outputs = hoisted_ends(optimized, graph)
            inputs, outputs = tuple(map(or_, inputs, hoisted_inputs)), tuple(map(or_, outputs, hoisted_outputs))
            if is_legacy:
                graph = run_stage(Stage.LEGACY, graph, driver)
            graph = run_stage(Stage.ENDS, graph, driver)
        driver.finish()
        return FormattedGraph(graph, inputs, outputs)


def compile_partition(
    graphs: PartitionGraphs, partition: Partition, channels_last: Callable[[Node], bool] = is_channels_last
) -> Payload:
    """Returns the portable payload of a partition: its TFLite model, for the host and for the vendor's converter.

    An input or output is NHWC in memory if `channels_last(node)`. Raises `ModelError` for scales that LiteRT cannot
    run.
    """
    formatted = graphs.formatted(partition, channels_last)
    model = tflite.write(formatted.graph, names=graphs.options.use_profiling)
    _try_unusual_scales(formatted.graph, model, partition)
    header = PayloadHeader(
        input_formats=tuple(map(int, formatted.inputs)),
        output_formats=tuple(map(int, formatted.outputs)),
        input_map=tuple(range(len(partition.inputs))),
        output_map=tuple(range(len(partition.outputs))),
        argument_count=len(partition.inputs),
    )
    return Payload.portable(header, model)


def _try_unusual_scales(graph: Graph, model: bytes, partition: Partition) -> None:
    """Raises `ModelError` if a scale is unusual and LiteRT fails to run the model, in a separate process."""
    doubtful = [op for op in graph.ops if is_unusual_scale(op)]
    failure = error_in_subprocess(model) if doubtful else None
    if failure is None:
        return
    origins = {op.origin for op in doubtful}
    node = next((cluster.node for cluster in partition.clusters if cluster.node.name in origins), None)
    scales = sorted({scale for op in doubtful for scale in op.output.qparams.scale})
    raise ModelError(
        f"LiteRT cannot run the model with the scales that calibration found ({failure}): they are between "
        f"{scales[0]:.3g} and {scales[-1]:.3g}. Give inputs in other units, so that values are nearer to 1, or leave "
        "the operator to the CPU with operators_not_to_delegate.",
        node=node.name if node else doubtful[0].origin,
        op=op_name(node) if node else doubtful[0].kind.name,
        source=source_of(node) if node else None,
    )


def unsupported_transposes(graph: Graph, target: NeutronTarget) -> list[Op]:
    """Returns the transposes that the legacy generation does not support."""
    transposes = ((op, swapped_blocks(op.inputs[0].shape, op.attrs["perm"])) for op in _transposes_of(graph))
    return [op for op, blocks in transposes if blocks is None or not is_legacy_swap(blocks, target)]


def _is_image(node: Node) -> bool:
    return len(node.meta["val"].shape) == 4


def _transposes_of(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if op.kind is TRANSPOSE]


def _count_transposes(graph: Graph, target: NeutronTarget) -> tuple[int, int]:
    """Returns the number of transposes that the legacy generation does not support, and the number of all."""
    return len(unsupported_transposes(graph, target)), len(_transposes_of(graph))
