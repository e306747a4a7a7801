"""Assigns the dim order of each value of the lowered program: NCHW (contiguous) or NHWC (channels last)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.core.fx import first_operand, is_dequantize, is_quantize
from openneutron.partition.clusters import Constants
from openneutron.partition.scheduling import Partition

__all__ = ["DimOrders", "assign_dim_orders", "is_nhwc", "nchw_strides"]


@dataclass(frozen=True)
class DimOrders:
    """The fake tensor of each node, with the strides of the lowered program."""

    values: dict[Node, Any]

    def is_channels_last(self, node: Node) -> bool:
        """Whether the value of `node` is NHWC in memory. False if NHWC and NCHW are the same order."""
        return is_nhwc(self.values[node])


def assign_dim_orders(program: ExportedProgram, partitions: Sequence[Partition]) -> DimOrders:
    """Applies these rules to each node in order. Linear in nodes and uses.

    1. An input of the program is NHWC if its example input is, and NCHW otherwise: ExecuTorch supports no other order.
    2. An output of a partition has the order that it had in the converted module, and NCHW if only CPU operators read
       it.
    3. Quantize and dequantize on the CPU keep the order of their input.
    4. Constants, states and outputs of CPU operators are NCHW: ExecuTorch's kernels require one order for all operands,
       and some read NHWC as if it were NCHW (seen in 1.5: cat, constant_pad_nd).
    5. If both orders are the same because of dimensions of size 1, the order is NCHW.
    """
    constants = Constants(program)
    inside = {operator: partition for partition in partitions for cluster in partition.clusters
              for operator in cluster.operators}  # fmt: skip
    outputs = {output: partition for partition in partitions for output in partition.outputs}
    values: dict[Node, Any] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node in outputs:
            only_cpu = _is_read_by_cpu_only(node, outputs[node], inside)
            values[node] = _to_nchw(value) if only_cpu else _nchw_if_contiguous(_to_delegate_order(value))
        elif node.op == "placeholder" and node not in constants and not constants.is_written(node):
            values[node] = _nchw_if_contiguous(_to_delegate_order(value)) if isinstance(value, torch.Tensor) else value
        elif is_quantize(node) or is_dequantize(node):
            source = first_operand(node)
            values[node] = _with_strides(value, values[source].stride())
        else:
            values[node] = _to_nchw(value)
    return DimOrders(values)


def _is_read_by_cpu_only(output: Node, partition: Partition, inside: dict[Node, Partition]) -> bool:
    """Whether CPU operators are the only readers of a partition's output outside `partition`."""
    if not all(map(is_dequantize, output.users)):
        return False
    readers = [reader for dequantize in output.users for reader in dequantize.users]
    outside = [reader for reader in readers if inside.get(reader) is not partition]
    return all(reader not in inside and reader.op == "call_function" and not is_quantize(reader) for reader in outside)


def is_nhwc(value: object) -> bool:
    """Whether a value is a tensor that is NHWC in memory. False if NHWC and NCHW are the same order."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 4
        and value.is_contiguous(memory_format=torch.channels_last)
        and not value.is_contiguous()
    )


def _to_nchw(value: Any) -> Any:
    """Returns a fake tensor, or each fake tensor of a list, with NCHW strides. Returns other values unchanged."""
    if isinstance(value, (list, tuple)):
        return [_to_nchw(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    return _with_strides(value, nchw_strides(value.shape))


def nchw_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides of a contiguous tensor, in elements."""
    strides, elements = [], 1
    for size in reversed(shape):
        strides.append(elements)
        elements *= max(size, 1)
    return tuple(reversed(strides))


def _to_delegate_order(value: torch.Tensor) -> torch.Tensor:
    """Returns `value` with NHWC strides if it is NHWC, else with NCHW strides. Delegates support no other order.

    The strides of dimensions of size 1 do not matter to torch, but ExecuTorch sorts the dimensions by their strides: an
    image from `image.permute(2, 0, 1)[None]` would get the order (2, 0, 3, 1).
    """
    strides = _nhwc_strides(value.shape) if is_nhwc(value) else nchw_strides(value.shape)
    found: torch.Tensor = _with_strides(value, strides)
    return found


def _nhwc_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides of a channels-last tensor of four dimensions, in elements."""
    batch, rows, columns, channels = nchw_strides([shape[dim] for dim in (0, 2, 3, 1)])
    return batch, channels, rows, columns


def _nchw_if_contiguous(value: Any) -> Any:
    """Returns a contiguous tensor with NCHW strides (rule 5). Returns other values unchanged."""
    return _to_nchw(value) if isinstance(value, torch.Tensor) and value.is_contiguous() else value


def _with_strides(value: Any, strides: Sequence[int]) -> Any:
    return value if value.stride() == tuple(strides) else value.new_empty_strided(value.shape, strides)
