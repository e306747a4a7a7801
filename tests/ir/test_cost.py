"""The cost model: its arithmetic, its assumptions, and its deviation from measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from benchmarks.cycles import FOMO, MEASURED, CifarNet, MobileNetV1, compare
from benchmarks.models import MobileNetV2
from tests.graphs import partition_graphs
from tests.oracle import quantized
from torch import nn

from openneutron.ir.cost import (
    _CYCLES,
    BYTES_PER_CYCLE,
    CPU_CALLS,
    OPERATOR_CYCLES,
    array_of,
    cost_of,
    cpu_cycles,
    cycles_of,
)
from openneutron.ir.graph import Op, QParams, Tensor
from openneutron.ir.kinds import (
    ADD,
    BATCH_MATMUL,
    CONCATENATION,
    CONV_2D,
    DEPTHWISE_CONV_2D,
    FULLY_CONNECTED,
    MAX_POOL_2D,
    MEAN,
    PAD,
    RESHAPE,
    SLICE,
    SOFTMAX,
    TRANSPOSE,
    TRANSPOSE_CONV,
    Kind,
    Work,
)
from openneutron.targets import TARGETS

RT700, N1, IMX95 = TARGETS["imxrt700"], TARGETS["mcxn94x"], TARGETS["imx95"]
WINDOW = {"filter_height": 2, "filter_width": 3}

Shape = tuple[int, ...]


def tensor(*shape: int, constant: bool = False) -> Tensor:
    data = np.zeros(shape, np.int8) if constant else None
    return Tensor(shape, np.dtype(np.int8), QParams.per_tensor(1.0, 0), data)


def op(kind: Kind, inputs: list[Shape], weights: list[Shape], output: Shape, **attrs: Any) -> Op:
    tensors = [*(tensor(*shape) for shape in inputs), *(tensor(*shape, constant=True) for shape in weights)]
    return Op(kind, tuple(tensors), tensor(*output), attrs)


# On the RT700, which has 8 pipelines of 8 MACs: operator, multiply-accumulates, cycles of the array.
COMPUTE = {
    "1x1 that fills the array": (op(CONV_2D, [(1, 4, 4, 16)], [(16, 1, 1, 16)], (1, 4, 4, 16)), 4096, 16 * 2 * 2),
    "one channel more": (op(CONV_2D, [(1, 4, 4, 17)], [(16, 1, 1, 17)], (1, 4, 4, 16)), 4352, 16 * 3 * 2),
    "one output more": (op(CONV_2D, [(1, 4, 4, 16)], [(17, 1, 1, 16)], (1, 4, 4, 17)), 4352, 16 * 2 * 3),
    "3x3 of 3 channels": (op(CONV_2D, [(1, 6, 6, 3)], [(8, 3, 3, 3)], (1, 4, 4, 8)), 3456, 16 * 9),
    "depthwise": (op(DEPTHWISE_CONV_2D, [(1, 4, 4, 12)], [(1, 3, 3, 12)], (1, 2, 2, 12)), 432, 4 * 9 * 2),
    "matrix": (op(FULLY_CONNECTED, [(3, 20)], [(10, 20)], (3, 10)), 600, 3 * 3 * 2),
    "batched matrices": (op(BATCH_MATMUL, [(2, 5, 8), (2, 8, 16)], [], (2, 5, 16)), 1280, 10 * 1 * 2),
    "transposed": (op(TRANSPOSE_CONV, [(1, 3, 3, 8)], [(4, 2, 2, 8)], (1, 6, 6, 4)), 9 * 4 * 32, 9 * 4),
    "pool": (op(MAX_POOL_2D, [(1, 4, 6, 9)], [], (1, 2, 2, 9), **WINDOW), 4 * 6 * 9, 4 * 6 * 2),
    "mean": (op(MEAN, [(1, 4, 4, 8)], [], (1, 8), axes=(1, 2)), 128, 16),
    "softmax": (op(SOFTMAX, [(2, 8)], [], (2, 8)), 48, 6),
    "addition": (op(ADD, [(2, 9), (2, 9)], [], (2, 9)), 18, 3),
    "slice": (op(SLICE, [(2, 9)], [], (2, 4)), 0, 0),
    "pad": (op(PAD, [(2, 9)], [], (2, 16)), 0, 0),
    "concatenation": (op(CONCATENATION, [(2, 8), (2, 8)], [], (2, 16)), 0, 0),
    "transpose": (op(TRANSPOSE, [(2, 8)], [], (8, 2)), 0, 0),
    "reshape": (op(RESHAPE, [(2, 8)], [], (16,)), 0, 0),
}


@pytest.mark.parametrize("name", COMPUTE)
def test_products_and_cycles_of_the_array(name: str) -> None:
    operator, macs, cycles = COMPUTE[name]
    cost = cost_of(operator, RT700)
    assert (cost.macs, cost.compute_cycles) == (macs, cycles)
    assert 0 <= cost.utilization <= 1


def test_bytes_that_move() -> None:
    convolution = op(CONV_2D, [(1, 4, 4, 16)], [(8, 1, 1, 16)], (1, 4, 4, 8))
    cost = cost_of(convolution, RT700)
    assert (cost.weight_bytes, cost.activation_bytes) == (128, 256 + 128)
    part = cost_of(op(SLICE, [(1, 4, 4, 16)], [], (1, 4, 4, 4)), RT700)
    assert part.activation_bytes == 2 * 64, "a SLICE reads what it yields"
    assert cost_of(op(RESHAPE, [(2, 8)], [], (16,)), RT700).activation_bytes == 0


def test_neutron_c_computes_or_moves_and_neutron_s_does_both_at_once() -> None:
    operator = op(CONV_2D, [(1, 8, 8, 64)], [(64, 3, 3, 64)], (1, 8, 8, 64))
    for target, join in ((RT700, sum), (IMX95, max)):
        cost = cost_of(operator, target)
        transfer = (cost.weight_bytes + cost.activation_bytes) // BYTES_PER_CYCLE
        assert cost.cycles == join([cost.compute_cycles, transfer]) + OPERATOR_CYCLES


def test_more_channels_never_cost_less() -> None:
    for target in TARGETS.values():
        costs = [
            cycles_of([op(CONV_2D, [(1, 8, 8, size)], [(size, 1, 1, size)], (1, 8, 8, size))], target)
            for size in range(1, 70)
        ]
        assert costs == sorted(costs)


@pytest.mark.parametrize(
    ("name", "size", "assumptions"),
    [
        ("imxrt700", (8, 8), ()),
        ("mcxn94x", (4, 4), ()),
        ("mcxn54x", (4, 4), ()),
        ("imx95", (64, 16), ("16 MACs a pipeline",)),
        ("imx943", (64, 16), ("16 MACs a pipeline", "1024 MACs a cycle")),
        ("imx952", (64, 16), ("16 MACs a pipeline", "1024 MACs a cycle")),
        ("s32n79", (64, 16), ("16 MACs a pipeline", "1024 MACs a cycle")),
        ("s32k5", (4, 16), ("16 MACs a pipeline", "64 MACs a cycle")),
    ],
)
def test_assumptions_are_reported(name: str, size: tuple[int, int], assumptions: tuple[str, ...]) -> None:
    array = array_of(TARGETS[name])
    assert (array.pipelines, array.macs) == size
    assert array.assumptions == assumptions
    assert array.macs_per_cycle == (TARGETS[name].macs_per_cycle or array.macs_per_cycle)


def test_cpu() -> None:
    assert cpu_cycles(0, 0) == CPU_CALLS * OPERATOR_CYCLES
    assert cpu_cycles(1000, 0) < cpu_cycles(2000, 0) < cpu_cycles(2000, 500)


# The limits are generous, because the measured networks may differ. `benchmarks.cycles` has further networks.
BOUNDS: dict[Callable[[], nn.Module], float] = {FOMO: 0.15, MobileNetV2: 0.25, MobileNetV1: 0.6}


@pytest.mark.slow
def test_estimates_are_near_measurements() -> None:
    known = [point for point in MEASURED if point.model in BOUNDS]
    assert len(known) == 4
    for comparison in compare(known):
        assert abs(comparison.error) <= BOUNDS[comparison.point.model], comparison


def test_the_measured_cifarnet_is_another_network() -> None:
    # 1 ms for one of NXP's examples would be more products per cycle than the NPU has
    (point,) = (point for point in MEASURED if point.model is CifarNet)
    model = quantized(CifarNet(), (point.shape,), target=point.target)
    macs = sum(cost_of(operator, N1).macs for graph in partition_graphs(model) for operator in graph.ops)
    assert macs / point.cycles > 5 * array_of(N1).macs_per_cycle


def test_utilization_shows_what_wastes_the_array() -> None:
    model = quantized(nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, groups=64)), ((1, 64, 28, 28),))
    (graph,) = partition_graphs(model)
    costs = {operator.kind.name: cost_of(operator, RT700) for operator in graph.ops}
    assert costs["CONV_2D"].utilization > 0.5
    assert costs["DEPTHWISE_CONV_2D"].utilization < 1 / RT700.channel_granularity


def test_costs_do_not_depend_on_the_clock() -> None:
    operator = op(ADD, [(2, 9), (2, 9)], [], (2, 9))
    assert cost_of(operator, RT700) == cost_of(operator, replace(RT700, clock_hz=1))


def test_each_kind_of_work_has_a_cost() -> None:
    """`cost_of` raises for a kind without a cost. `Kind` has no default for `work`, so each kind declares its work."""
    assert set(_CYCLES) == set(Work)
    with pytest.raises(TypeError, match="work"):
        Kind("NEG")  # type: ignore[call-arg]
