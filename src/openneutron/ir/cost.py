"""What operators cost on the NPU, and what they would cost on the CPU: estimates, for choosing between ways to write
the same function, and for users to be told. They are no measurements, and where they are shown they say so.

The NPU is an array of dot-product units ("pipelines"), M of them with N multipliers each, output-stationary: a pipeline
adds up one output value, N products a cycle. What follows from that:

- A convolution or matrix product keeps all multipliers busy where its input channels are a multiple of N and its output
  channels one of M; channels in between are rounded up.
- A depthwise convolution, a pool, a mean, and arithmetic on elements have one product a cycle in each pipeline.
- Padding, slices, concatenations, transposes and reshapes compute nothing.

What is not known, and assumed here:

- Each tensor crosses a bus of `BYTES_PER_CYCLE` once. On Neutron-S a data mover brings it while the array computes, on
  Neutron-C, which has none, one waits for the other.
- Starting an operator takes `OPERATOR_CYCLES`.
- Multipliers and pipelines of a target where NXP gives none: see `array_of`.

`python -m benchmarks.cycles` sets the estimate beside what NXP and others have measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from openneutron.ir.graph import Op
from openneutron.ir.kinds import Work
from openneutron.targets import NeutronTarget

__all__ = ["BYTES_PER_CYCLE", "OPERATOR_CYCLES", "Cost", "MacArray", "array_of", "cost_of", "cpu_cycles", "cycles_of"]

# A 64-bit bus. Bandwidths are not published.
BYTES_PER_CYCLE = 8
# FOMO on the MCX N94x takes 3.27 ms where the converter, which leaves it out, estimates 353,039 cycles; at 150 MHz, for
# each of 31 operators.
OPERATOR_CYCLES = 4450

# Multiply-accumulates a cycle where NXP gives none: those of the class's largest (i.MX 95) and smaller (RT700) member.
ASSUMED_MACS_PER_CYCLE = {"Neutron-S": 1024, "Neutron-C": 64}

# ExecuTorch's portable kernels convert one element at a time: load, multiply, round, clamp, store.
CPU_CYCLES_PER_ELEMENT = 20
CPU_CYCLES_PER_MAC = 4  # two loads, multiply, add
# Dequantize, the operator, quantize, and one more delegate, since an operator on the CPU parts what is around it.
CPU_CALLS = 4

# Softmax goes over its values for the largest, for the sum of exponentials, and for the quotients.
SOFTMAX_PASSES = 3


@dataclass(frozen=True)
class MacArray:
    """The array of dot-product units as the estimate takes it."""

    pipelines: int
    macs: int
    """Multipliers of a pipeline: input channels that it takes at once."""
    moves_while_computing: bool
    assumptions: tuple[str, ...] = ()
    """What of this is not NXP's own number, in words."""

    @property
    def macs_per_cycle(self) -> int:
        """Products a cycle at best."""
        return self.pipelines * self.macs


def array_of(target: NeutronTarget) -> MacArray:
    """The array of a target; unknown sizes are assumed, and said to be.

    Multipliers of a pipeline: those that the operator limits assume. Pipelines: what is left of the products a cycle.
    Products a cycle: those of the i.MX 95 for Neutron-S, of the RT700 for Neutron-C.
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
    """Multiply-accumulates; for operators without, operations on elements."""
    compute_cycles: int
    weight_bytes: int
    """Constants that it reads."""
    activation_bytes: int
    """Computed tensors that it reads and writes."""
    cycles: int
    """In all: computing, moving, starting."""
    utilization: float
    """Share of the array's multipliers that are busy over those cycles, 0 to 1."""


def cost_of(op: Op, target: NeutronTarget) -> Cost:
    """The estimate for one operator of the IR. Reads shapes, dtypes and attributes only."""
    array = array_of(target)
    compute = _compute_cycles(op, array)
    macs = _compute_cycles(op, MacArray(1, 1, moves_while_computing=False))
    weights = sum(tensor.size * tensor.dtype.itemsize for tensor in op.inputs if tensor.data is not None)
    activations = _activation_bytes(op)
    transfer = _quotient(weights + activations, BYTES_PER_CYCLE)
    busy = max(compute, transfer) if array.moves_while_computing else compute + transfer
    cycles = busy + OPERATOR_CYCLES
    return Cost(macs, compute, weights, activations, cycles, macs / (cycles * array.macs_per_cycle))


def cycles_of(ops: Iterable[Op], target: NeutronTarget) -> int:
    """The estimated cycles of operators that run one after the other."""
    return sum(cost_of(op, target).cycles for op in ops)


def cpu_cycles(elements: int, macs: int) -> int:
    """The cycles of a quantized operator left on the CPU, taken to have the NPU's clock.

    `elements` are those of its inputs and its output: inputs are dequantized and read, the output is written and
    quantized. A call of a kernel or of a delegate is taken to last as long as the start of an operator on the NPU,
    which the CPU does too.
    """
    return CPU_CALLS * OPERATOR_CYCLES + 2 * elements * CPU_CYCLES_PER_ELEMENT + macs * CPU_CYCLES_PER_MAC


def _quotient(dividend: int, divisor: int) -> int:
    """Rounded up."""
    return -(-dividend // divisor)


def _convolution(op: Op, array: MacArray) -> int:
    outputs, height, width, inputs = op.inputs[1].shape
    positions = math.prod(op.output.shape[:3])
    return positions * height * width * _quotient(inputs, array.macs) * _quotient(outputs, array.pipelines)


def _depthwise(op: Op, array: MacArray) -> int:
    _, height, width, channels = op.inputs[1].shape
    return math.prod(op.output.shape[:3]) * height * width * _quotient(channels, array.pipelines)


def _transposed_convolution(op: Op, array: MacArray) -> int:
    """Each position of the input meets the whole kernel."""
    weight = next(tensor for tensor in op.inputs if tensor.data is not None and len(tensor.shape) == 4)
    inputs = next(tensor for tensor in op.inputs if tensor.data is None)
    outputs, height, width, channels = weight.shape
    positions = math.prod(inputs.shape[:3])
    return positions * height * width * _quotient(channels, array.macs) * _quotient(outputs, array.pipelines)


def _matrix_product(op: Op, array: MacArray) -> int:
    """Rows of the first input times columns, those of a constant or of the same batch."""
    *rows, columns = op.output.shape
    depth = op.inputs[0].size // math.prod(rows)
    return math.prod(rows) * _quotient(depth, array.macs) * _quotient(columns, array.pipelines)


def _pool(op: Op, array: MacArray) -> int:
    *positions, channels = op.output.shape
    window = int(op.attrs["filter_height"]) * int(op.attrs["filter_width"])
    return math.prod(positions) * window * _quotient(channels, array.pipelines)


def _reduction(op: Op, array: MacArray) -> int:
    return _quotient(op.inputs[0].size, array.pipelines)


def _softmax(op: Op, array: MacArray) -> int:
    return SOFTMAX_PASSES * _quotient(op.output.size, array.pipelines)


def _elements(op: Op, array: MacArray) -> int:
    return _quotient(op.output.size, array.pipelines)


def _nothing(_: Op, __: MacArray) -> int:
    return 0


_CYCLES: dict[Work, Callable[[Op, MacArray], int]] = {
    Work.CONVOLUTION: _convolution,
    Work.DEPTHWISE: _depthwise,
    Work.TRANSPOSED_CONVOLUTION: _transposed_convolution,
    Work.MATRIX_PRODUCT: _matrix_product,
    Work.WINDOWS: _pool,
    Work.REDUCTION: _reduction,
    Work.SOFTMAX: _softmax,
    Work.ELEMENTS: _elements,
    Work.NOTHING: _nothing,
    Work.VIEW: _nothing,
    Work.PART: _nothing,
}


def _activation_bytes(op: Op) -> int:
    if op.kind.work is Work.VIEW:
        return 0
    if op.kind.work is Work.PART:
        return 2 * op.output.size * op.output.dtype.itemsize
    return sum(tensor.size * tensor.dtype.itemsize for tensor in (*op.inputs, op.output) if tensor.data is None)


def _compute_cycles(op: Op, array: MacArray) -> int:
    return _CYCLES[op.kind.work](op, array)
