"""Estimated cost of operators on the NPU and on the CPU.

The compiler compares estimates to choose between equivalent lowerings, and reports show them to users, marked as
estimates. They are not measurements.

The NPU is an array of M dot-product units ("pipelines") with N multipliers each. It is output-stationary: a pipeline
accumulates one output value, with N products in each cycle. Therefore:

- A convolution or matrix product uses all multipliers if its input channels are a multiple of N and its output channels
  a multiple of M. Other numbers of channels cost as much as the next multiple.
- A depthwise convolution, a pool, a mean, and elementwise arithmetic compute one product per cycle in each pipeline.
- Padding, slices, concatenations, transposes and reshapes compute nothing.

Assumptions, because NXP does not publish these facts:

- Each tensor crosses a bus of `Costs.bytes_per_cycle` once. Neutron-S has a data mover, which transfers tensors during
  computation. Neutron-C has none, so its transfers and computations do not overlap.
- The start of an operator takes `Costs.operator_cycles`.
- Multipliers and pipelines of targets without published numbers: see `array_of`.

A board file can replace these coefficients (`openneutron.targets.Costs`) by those of measurements. The compiler always
uses the defaults.

`python -m benchmarks.cycles` compares the estimates with measurements of NXP and others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from openneutron.ir.graph import Op
from openneutron.ir.kinds import Work
from openneutron.targets import Costs, NeutronTarget

__all__ = ["BYTES_PER_CYCLE", "OPERATOR_CYCLES", "Cost", "MacArray", "array_of", "cost_of", "cpu_cycles", "cycles_of"]

DEFAULT_COSTS = Costs()
BYTES_PER_CYCLE = round(DEFAULT_COSTS.bytes_per_cycle)
OPERATOR_CYCLES = round(DEFAULT_COSTS.operator_cycles)

# Assumed multiply-accumulates per cycle of targets without a published number: those of the i.MX 95 and of the RT700.
ASSUMED_MACS_PER_CYCLE = {"Neutron-S": 1024, "Neutron-C": 64}

# Dequantize, the operator, quantize, and one more delegate call, because an operator on the CPU splits a partition.
CPU_CALLS = 4

# Softmax reads its values three times: for the maximum, for the sum of exponentials, and for the quotients.
SOFTMAX_PASSES = 3


@dataclass(frozen=True)
class MacArray:
    """The array of dot-product units of a target."""

    pipelines: int
    macs: int
    """Multipliers of a pipeline: the number of input channels that it processes at once."""
    moves_while_computing: bool
    assumptions: tuple[str, ...] = ()
    """The numbers that NXP does not publish, as text ("16 MACs a pipeline")."""

    @property
    def macs_per_cycle(self) -> int:
        """The largest number of products per cycle."""
        return self.pipelines * self.macs


def array_of(target: NeutronTarget) -> MacArray:
    """Returns the array of a target. Assumes a value for each number that is unknown:

    - Multipliers of a pipeline: the number in the operator limits.
    - Products per cycle: the number of the i.MX 95 for Neutron-S, and that of the RT700 for Neutron-C.
    - Pipelines: products per cycle, divided by the multipliers of a pipeline.
    """
    macs, per_cycle = target.channel_granularity, target.macs_per_cycle or ASSUMED_MACS_PER_CYCLE[target.neutron_class]
    assumptions = [
        *([] if target.macs_per_pipeline else [f"{macs} MACs a pipeline"]),
        *([] if target.macs_per_cycle else [f"{per_cycle} MACs a cycle"]),
    ]
    pipelines = target.pipelines or max(1, per_cycle // macs)
    return MacArray(pipelines, macs, target.neutron_class == "Neutron-S", tuple(assumptions))


@dataclass(frozen=True)
class Cost:
    """The estimate for one operator on one target."""

    macs: int
    """Multiply-accumulates; for operators without multiply-accumulates, operations on elements."""
    compute_cycles: int
    weight_bytes: int
    """Bytes of the constants that it reads."""
    activation_bytes: int
    """Bytes of the computed tensors that it reads and writes."""
    cycles: int
    """Cycles in total: computation, transfer and start."""
    utilization: float
    """Average share of busy multipliers during these cycles, 0 to 1."""
    formula_cycles: int
    """Cycles of computation by the formula alone, without a measured factor of `Costs.compute`."""


def cost_of(op: Op, target: NeutronTarget) -> Cost:
    """Returns the estimate for one operator of the IR. Reads shapes, dtypes and attributes only."""
    array, costs = array_of(target), target.costs
    formula = _compute_cycles(op, array)
    compute = round(formula * costs.compute_factor(op.kind.work.name.lower()))
    macs = _compute_cycles(op, MacArray(1, 1, moves_while_computing=False))
    weights = sum(tensor.size * tensor.dtype.itemsize for tensor in op.inputs if tensor.data is not None)
    activations = _activation_bytes(op)
    transfer = math.ceil((weights + activations) / costs.bytes_per_cycle)
    busy = max(compute, transfer) if array.moves_while_computing else compute + transfer
    cycles = busy + round(costs.operator_cycles)
    utilization = min(1.0, macs / max(1, cycles * array.macs_per_cycle))
    return Cost(macs, compute, weights, activations, cycles, utilization, formula)


def cycles_of(ops: Iterable[Op], target: NeutronTarget) -> int:
    """Returns the estimated cycles of operators that run in sequence."""
    return sum(cost_of(op, target).cycles for op in ops)


def cpu_cycles(elements: int, macs: int, costs: Costs = DEFAULT_COSTS) -> int:
    """Returns the estimated cycles of a quantized operator on the CPU. Assumes that CPU and NPU have the same clock.

    `elements` is the number of elements of its inputs and its output. Inputs are dequantized and read, the output is
    written and quantized. A call of a kernel or of a delegate is assumed to take as long as the start of an operator on
    the NPU, because the CPU does both.
    """
    converted = 2 * elements * costs.cpu_cycles_per_element
    return round(CPU_CALLS * costs.operator_cycles + converted + macs * costs.cpu_cycles_per_mac)


def _ceil_div(dividend: int, divisor: int) -> int:
    """Returns the quotient, rounded up."""
    return -(-dividend // divisor)


def _convolution_cycles(op: Op, array: MacArray) -> int:
    outputs, height, width, inputs = op.inputs[1].shape
    positions = math.prod(op.output.shape[:3])
    return positions * height * width * _ceil_div(inputs, array.macs) * _ceil_div(outputs, array.pipelines)


def _depthwise_cycles(op: Op, array: MacArray) -> int:
    _, height, width, channels = op.inputs[1].shape
    return math.prod(op.output.shape[:3]) * height * width * _ceil_div(channels, array.pipelines)


def _transposed_convolution_cycles(op: Op, array: MacArray) -> int:
    """Returns the cycles of a product of each input position with the whole kernel."""
    weight = next(tensor for tensor in op.inputs if tensor.data is not None and len(tensor.shape) == 4)
    inputs = next(tensor for tensor in op.inputs if tensor.data is None)
    outputs, height, width, channels = weight.shape
    positions = math.prod(inputs.shape[:3])
    return positions * height * width * _ceil_div(channels, array.macs) * _ceil_div(outputs, array.pipelines)


def _matrix_product_cycles(op: Op, array: MacArray) -> int:
    """Returns the cycles of a product of each row of the first input with each column of the second."""
    *rows, columns = op.output.shape
    depth = op.inputs[0].size // math.prod(rows)
    return math.prod(rows) * _ceil_div(depth, array.macs) * _ceil_div(columns, array.pipelines)


def _pool_cycles(op: Op, array: MacArray) -> int:
    *positions, channels = op.output.shape
    window = int(op.attrs["filter_height"]) * int(op.attrs["filter_width"])
    return math.prod(positions) * window * _ceil_div(channels, array.pipelines)


def _reduction_cycles(op: Op, array: MacArray) -> int:
    return _ceil_div(op.inputs[0].size, array.pipelines)


def _softmax_cycles(op: Op, array: MacArray) -> int:
    return SOFTMAX_PASSES * _ceil_div(op.output.size, array.pipelines)


def _elementwise_cycles(op: Op, array: MacArray) -> int:
    return _ceil_div(op.output.size, array.pipelines)


def _no_cycles(_: Op, __: MacArray) -> int:
    return 0


_CYCLES: dict[Work, Callable[[Op, MacArray], int]] = {
    Work.CONVOLUTION: _convolution_cycles,
    Work.DEPTHWISE: _depthwise_cycles,
    Work.TRANSPOSED_CONVOLUTION: _transposed_convolution_cycles,
    Work.MATRIX_PRODUCT: _matrix_product_cycles,
    Work.WINDOWS: _pool_cycles,
    Work.REDUCTION: _reduction_cycles,
    Work.SOFTMAX: _softmax_cycles,
    Work.ELEMENTS: _elementwise_cycles,
    Work.NOTHING: _no_cycles,
    Work.VIEW: _no_cycles,
    Work.PART: _no_cycles,
}


def _activation_bytes(op: Op) -> int:
    if op.kind.work is Work.VIEW:
        return 0
    if op.kind.work is Work.PART:
        return 2 * op.output.size * op.output.dtype.itemsize
    return sum(tensor.size * tensor.dtype.itemsize for tensor in (*op.inputs, op.output) if tensor.data is None)


def _compute_cycles(op: Op, array: MacArray) -> int:
    return _CYCLES[op.kind.work](op, array)
