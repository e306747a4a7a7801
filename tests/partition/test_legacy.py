"""The legacy generation of converters: padded operands, whole networks, all targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from benchmarks.cycles import FOMO, CifarNet
from benchmarks.models import DSCNN, MobileNetV1, MobileNetV2, ResNet8, ResNet20, WakeWord
from tests.case import Case, Rejected, Shape
from tests.graphs import kinds, partition_graphs, placed_graphs
from tests.legacy_cases import LEGACY_CASES, SqueezeExcite
from tests.legacy_table import faults
from tests.operator_cases import CASES, REJECTED
from tests.oracle import Function, agreement, everything_on_the_npu, lowered, quantized
from torch import nn
from torch.fx import Node

from openneutron import QuantizedModel
from openneutron.compile_spec import CompileOptions
from openneutron.core.fx import op_name
from openneutron.ops import OPERATORS, OpSpec
from openneutron.ops.channel_alignment import PaddedInstance, pad_to_alignment
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import Constraint, legacy_constraint
from openneutron.partition.placing import Placement, placement
from openneutron.targets import TARGETS, Generation, chips

LEGACY = "SDK_25_06"
RT700 = TARGETS["imxrt700"]
GRANULARITY = {
    "imxrt700": 8, "mcxn94x": 4, "mcxn54x": 4, "imx95": 16, "imx943": 16, "imx952": 16, "s32n79": 16, "s32k5": 16,
}  # fmt: skip


def rows_of(model: QuantizedModel, target: str, flavor: str | None = LEGACY) -> tuple[Placement, ...]:
    """Returns the placement of a quantized model on another target."""
    program = torch.export.export(model.module, model.example_inputs)
    return placement(program, CompileOptions(target, neutron_converter_flavor=flavor))


def reasons(rows: tuple[Placement, ...]) -> list[str]:
    return [row.reason for row in rows if row.reason is not None]


@pytest.mark.parametrize("case", LEGACY_CASES, ids=lambda case: case.id)
def test_program_follows_the_converted_module(case: Case) -> None:
    model = quantized(case.build(), case.shapes, case.spread)
    program = lowered(model, neutron_converter_flavor=LEGACY)
    assert everything_on_the_npu(program), program.placement
    (graph,) = partition_graphs(model, neutron_converter_flavor=LEGACY)
    assert not faults(graph, RT700)
    assert agreement(program, model).worst <= case.spec.tolerance


@pytest.mark.slow
@pytest.mark.parametrize(("target", "turn"), [("imxrt700", 0), ("imx95", 1)])
def test_no_partition_has_operators_that_the_generation_lacks(target: str, turn: int) -> None:
    """Tests the first case of every second declaration on one target, and of the others on the other target. The last
    case of a declaration with a lowering is tested on the target that does not have the first one.
    """
    first = {case.spec.name: case for case in reversed(CASES)}
    last = {case.spec.name: case for case in CASES if isinstance(case.spec, OpSpec)}
    names = sorted(first)
    others = [name for name in names[1 - turn :: 2] if name in last]
    for case in [*(first[name] for name in names[turn::2]), *(last[name] for name in others)]:
        model = quantized(case.build(), case.shapes, case.spread, target=target, **dict(case.options))
        for graph in partition_graphs(model, neutron_converter_flavor=LEGACY):
            assert not faults(graph, TARGETS[target]), case.id


# Operators on [1, C, 3, 3], and their lowering if C is not a multiple of the MACs per pipeline.
GRANULAR: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "max_pool2d": (lambda _: nn.MaxPool2d(2), "padded"),
    "adaptive_avg_pool2d": (lambda _: nn.AdaptiveAvgPool2d(1), "padded"),
    "mean": (lambda _: Function(lambda x: x.mean((2, 3))), "padded"),
    "slice": (lambda _: Function(lambda x: (x + x)[:, 1:3]), "padded"),
    "cat along the width": (lambda _: Function(lambda x: torch.cat([x, x + x], 3)), "padded"),
    "cat along the channels": (lambda _: Function(lambda x: torch.cat([x, x + x], 1)), "cpu"),
    "softmax": (lambda _: Function(lambda x: x.softmax(1)), "cpu"),
    "permute": (lambda _: Function(lambda x: (x + x).permute(0, 2, 3, 1)), "cpu"),
    "avg_pool2d": (lambda _: nn.AvgPool2d(2), "as it is"),
    "sum": (lambda _: Function(lambda x: x.sum((2, 3))), "as it is"),
    "convolution": (lambda channels: nn.Conv2d(channels, 5, 2), "as it is"),
    "groups": (lambda channels: nn.Conv2d(channels, channels, 2, groups=2), "as it is"),
}


class TestTargets:
    """Operators that each target supports directly, padded, or not at all."""

    @pytest.mark.parametrize("channels", [4, 8, 12, 16, 20])
    @pytest.mark.parametrize("name", GRANULAR)
    def test_each_target_takes_multiples_of_its_macs(self, name: str, channels: int) -> None:
        build, otherwise = GRANULAR[name]
        model = quantized(build(channels), ((1, channels, 3, 3),))
        program = torch.export.export(model.module, model.example_inputs)
        for target, granularity in GRANULARITY.items():
            rows, graphs = placed_graphs(program, CompileOptions(target, neutron_converter_flavor=LEGACY))
            padded = any("PAD" in kinds(graph) for graph in graphs)
            found = "cpu" if reasons(rows) else "padded" if padded else "as it is"
            assert found == (otherwise if channels % granularity else "as it is"), (target, rows)
            if found == "cpu":
                assert all(TARGETS[target].granularity_note in reason for reason in reasons(rows))

    @pytest.mark.parametrize("target", TARGETS)
    def test_reasons_name_the_macs_or_the_assumption(self, target: str) -> None:
        model = quantized(Function(lambda x: x.softmax(1)), ((2, 10),))
        (reason,) = reasons(rows_of(model, target))
        known = {
            "imxrt700": "A pipeline of imxrt700 has 8 MACs.",
            "mcxn94x": "A pipeline of mcxn94x has 4 MACs.",
            "mcxn54x": "A pipeline of mcxn54x has 4 MACs.",
        }
        unknown = f"The MACs per pipeline of {target} are unknown; the limits assume 16."
        assert reason.endswith(known.get(target, unknown))
        assert not reasons(rows_of(model, target, flavor=None)), "the modern generation lifted it"

    @pytest.mark.parametrize(
        "case",
        [case for case in REJECTED if case.is_legacy and case.constraint.depends_on_alignment],
        ids=lambda case: case.id,
    )
    def test_limits_belong_to_the_target_of_each_call(self, case: Rejected) -> None:
        torch.manual_seed(0)
        model = quantized(case.model(), case.shapes)
        nodes = torch.export.export(model.module, model.example_inputs).graph.nodes
        (node,) = (node for node in nodes if op_name(node) in case.declared.targets)
        for name, target in TARGETS.items():
            rows = {row.node: row for row in rows_of(model, name)}
            holds = case.constraint.holds(OpInstance(node, target, Generation.LEGACY))
            assert (rows[node.name].where == "npu") == (holds or case.padded), rows[node.name]
            if not holds and not case.padded:
                assert f"{name} takes {case.spec} only if: {case.constraint.message}" in (rows[node.name].reason or "")

    @pytest.mark.parametrize(
        ("target", "most"), [("imxrt700", 2040), ("mcxn94x", 2040), ("imx95", 240), ("imx943", 240), ("s32k5", 2032)]
    )
    def test_softmax_is_narrower_with_more_pipelines(self, target: str, most: int) -> None:
        for width in (most, most + GRANULARITY[target]):
            rows = rows_of(quantized(Function(lambda x: x.softmax(1)), ((1, width),), target=target), target)
            assert (not reasons(rows)) == (width == most), rows

    @pytest.mark.parametrize(("channels", "takers"), [(65530, {4}), (65528, {4, 8}), (65504, {4, 8, 16})])
    def test_weights_of_one_output_are_rounded_up_to_the_granularity(self, channels: int, takers: set[int]) -> None:
        for target, granularity in GRANULARITY.items():
            model = quantized(nn.Conv2d(channels, 1, 1), ((1, channels, 1, 1),), target=target)
            rows = rows_of(model, target, flavor=None)
            assert (not reasons(rows)) == (granularity in takers), rows
            assert all(TARGETS[target].granularity_note in reason for reason in reasons(rows))


def padded_instance(granularity: int, model: nn.Module, *shape: int) -> PaddedInstance | None:
    """Returns the only operator of `model`, padded for a target of this granularity."""
    node = one_operator(model, *shape)
    target = replace(RT700, macs_per_pipeline=granularity)
    return pad_to_alignment(OPERATORS[op_name(node)], OpInstance(node, target, Generation.LEGACY))


def one_operator(model: nn.Module, *shape: int) -> Node:
    graph = torch.export.export(model.eval(), (torch.zeros(shape),)).graph
    found: list[Node] = [node for node in graph.nodes if op_name(node) in OPERATORS]
    assert len(found) == 1
    return found[0]


class TestPadding:
    def test_stand_ins_have_the_padded_shapes(self) -> None:
        padded = padded_instance(8, nn.MaxPool2d(2), 1, 12, 6, 6)
        assert padded is not None
        assert padded.instance.shape_of("self") == (1, 16, 6, 6)
        assert padded.instance.shape == (1, 16, 3, 3)
        assert padded.original.shape == (1, 12, 3, 3)
        assert padded.instance.node.name == padded.original.node.name

    def test_padding_that_does_not_suffice_is_not_added(self) -> None:
        assert padded_instance(8, nn.MaxPool2d(2, dilation=2), 1, 12, 6, 6) is None
        assert padded_instance(8, Function(lambda x: x.mean(1)), 1, 12, 6, 6) is None
        assert padded_instance(8, Function(lambda x: x.softmax(1)), 1, 12) is None

    def test_few_zeros_cost_less_than_the_cpu_and_many_cost_more(self) -> None:
        few, many = (padded_instance(granularity, nn.MaxPool2d(2), 1, 3, 32, 32) for granularity in (16, 4096))
        assert few is not None
        assert many is not None
        assert few.cycles < few.cpu_cycles
        assert few.cpu_cycles == many.cpu_cycles < many.cycles

    def test_operators_that_cost_more_on_the_npu_stay_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chips, "ASSUMED_MACS_PER_PIPELINE", 4096)
        (row,) = rows_of(quantized(nn.MaxPool2d(2), ((1, 3, 32, 32),)), "imx95")
        assert row.where == "cpu"
        assert row.reason is not None
        assert "a multiple of the MACs per pipeline" in row.reason
        assert row.reason.endswith("cycles on the NPU, and it takes about 171400 on the CPU (estimates).")

    def test_no_padding_remains_between_convolutions(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.Conv2d(12, 12, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
        )  # fmt: skip
        (graph,) = partition_graphs(quantized(model, ((1, 3, 18, 18),)), neutron_converter_flavor=LEGACY)
        assert kinds(graph) == [
            "CONV_2D", "MAX_POOL_2D", "MAX_POOL_2D", "CONV_2D", "MEAN", "RESHAPE", "FULLY_CONNECTED",
        ]  # fmt: skip

    def test_one_pad_remains_if_others_read_the_value(self) -> None:
        (graph,) = partition_graphs(quantized(SqueezeExcite(12), ((1, 12, 9, 9),)), neutron_converter_flavor=LEGACY)
        assert kinds(graph) == ["PAD", "MEAN", "CONV_2D", "CONV_2D", "LOGISTIC", "MUL"]

    def test_the_modern_generation_pads_nothing(self) -> None:
        (graph,) = partition_graphs(quantized(nn.MaxPool2d(2), ((1, 12, 6, 6),)))
        assert not {"PAD", "SLICE"} & set(kinds(graph))


class TestTransposes:
    def test_images_are_converted_outside(self) -> None:
        model = quantized(Function(lambda layer, x: F.relu(x + layer(x)), nn.Conv2d(8, 8, 1)), ((1, 8, 5, 5),))
        (graph,) = partition_graphs(model, neutron_converter_flavor=LEGACY)
        assert graph.inputs[0].shape == graph.outputs[0].shape == (1, 5, 5, 8)
        assert "TRANSPOSE" not in kinds(graph)
        assert "TRANSPOSE" in kinds(partition_graphs(model)[0])
        assert agreement(lowered(model, neutron_converter_flavor=LEGACY), model).worst <= 1

    def test_matrices_are_not_padded(self) -> None:
        model = quantized(nn.Linear(6, 5), ((2, 3, 4, 6),))
        (graph,) = partition_graphs(model, neutron_converter_flavor=LEGACY)
        assert "TRANSPOSE" not in kinds(graph)

    def test_swap_is_written_as_a_transpose_of_an_image(self) -> None:
        model = quantized(nn.Conv1d(8, 16, 3), ((1, 8, 12),))
        (graph,) = partition_graphs(model, neutron_converter_flavor=LEGACY)
        transposes = [op for op in graph.ops if op.kind.name == "TRANSPOSE"]
        assert [op.attrs["perm"] for op in transposes] == [(0, 3, 1, 2)] * 2
        assert [op.inputs[0].shape for op in transposes] == [(1, 8, 1, 12), (1, 10, 1, 16)]

    @pytest.mark.parametrize("shape", [(2, 8, 16), (1, 12, 9)], ids=str)
    def test_other_sequences_stay_on_the_cpu(self, shape: Shape) -> None:
        model = quantized(nn.Sequential(nn.Conv1d(shape[1], 8, 3), nn.Conv1d(8, 6, 1)), (shape,))
        program = lowered(model, neutron_converter_flavor=LEGACY)
        assert {row.where for row in program.placement} == {"cpu"}
        assert all("would have to transpose" in reason for reason in reasons(program.placement))
        assert agreement(program, model).worst <= 1

    def test_only_the_operator_with_unsupported_transposes_stays_on_the_cpu(self) -> None:
        model = quantized(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten()), ((1, 3, 5, 5),))
        program = lowered(model, neutron_converter_flavor=LEGACY)
        assert {row.op: row.where for row in program.placement} == {
            "aten.convolution.default": "npu", "aten.relu.default": "npu", "aten.view_copy.default": "cpu",
        }  # fmt: skip
        assert agreement(program, model).worst <= 1


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "MobileNetV2": (MobileNetV2, (1, 3, 96, 96)),
    "MobileNetV1 0.25": (MobileNetV1, (1, 3, 96, 96)),
    "ResNet-8": (ResNet8, (1, 3, 32, 32)),
    "ResNet-20": (ResNet20, (1, 3, 32, 32)),
    "DS-CNN": (DSCNN, (1, 1, 49, 10)),
    "wake word": (WakeWord, (1, 40, 30)),
    "CifarNet": (CifarNet, (1, 3, 32, 32)),
    "FOMO": (FOMO, (1, 3, 64, 64)),
}
# The CPU computes softmaxes over these numbers of values.
CLASSES = {"MobileNetV1 0.25": 2, "ResNet-8": 10, "FOMO": 3}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["imxrt700", "mcxn94x", "imx95"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, target: str) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = quantized(build(), (shape,), target=target)
    program = torch.export.export(model.module, model.example_inputs)
    rows, graphs = placed_graphs(program, CompileOptions(target, neutron_converter_flavor=LEGACY))
    left = [row.op for row in rows if row.where == "cpu"]
    if name == "wake word" and target == "imx95":  # 40 bands of 30 frames: neither is a multiple of 16
        assert set(left) == {row.op for row in rows}
    else:
        assert left == (["aten._softmax.default"] if name in CLASSES else [])
    assert not [fault for graph in graphs for fault in faults(graph, TARGETS[target])]


class TestDeclaration:
    """Padding needs nothing besides `pads` in an operator's declaration."""

    @pytest.fixture(params=["per_tensor", "per_channel"])
    def granularity(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_of_weight_and_bias(self, monkeypatch: pytest.MonkeyPatch, granularity: str) -> None:
        pads = {"input": (1,), "weight": (0, 1), "bias": (0,)}
        declare(monkeypatch, "aten.conv2d.default", pads, takes_whole_channels("input"))
        model = quantized(nn.Conv2d(12, 5, 3), ((1, 12, 6, 6),), weight_granularity=granularity)
        # SDK_25_09 is the first that supports a scale per channel
        flavor = LEGACY if granularity == "per_tensor" else "SDK_25_09"
        (graph,) = partition_graphs(model, neutron_converter_flavor=flavor)
        assert kinds(graph) == ["PAD", "CONV_2D", "SLICE"]
        assert [tensor.shape for tensor in graph.ops[1].inputs[1:]] == [(8, 3, 3, 16), (8,)]
        assert agreement(lowered(model, neutron_converter_flavor=flavor), model).worst <= 1

    def test_padding_of_two_operands(self, monkeypatch: pytest.MonkeyPatch) -> None:
        declare(monkeypatch, "aten.mul.Tensor", {"self": (1,), "other": (1,)}, takes_whole_channels("self"))
        model = quantized(Function(lambda x, y: x * y), ((1, 12, 3, 3), (1, 12, 1, 1)))
        (graph,) = partition_graphs(model, neutron_converter_flavor=LEGACY)
        assert kinds(graph) == ["PAD", "PAD", "MUL", "SLICE"]
        assert agreement(lowered(model, neutron_converter_flavor=LEGACY), model).worst <= 1

    def test_padding_of_a_constant_operand(self, monkeypatch: pytest.MonkeyPatch) -> None:
        declare(monkeypatch, "aten.mul.Tensor", {"self": (1,), "other": (0,)}, takes_whole_channels("self"))
        slopes = torch.linspace(-1, 2, 12).reshape(12, 1, 1)
        model = quantized(Function(lambda slopes, x: x * slopes, slopes), ((1, 12, 3, 3),))
        (graph,) = partition_graphs(model, neutron_converter_flavor=LEGACY)
        assert kinds(graph) == ["PAD", "MUL", "SLICE"]
        assert agreement(lowered(model, neutron_converter_flavor=LEGACY), model).worst <= 1


def takes_whole_channels(argument: str) -> Constraint:
    def holds(instance: OpInstance) -> bool:
        """The channels are a multiple of the MACs per pipeline."""
        return instance.shape_of(argument)[1] % instance.target.channel_granularity == 0

    return legacy_constraint(holds)


def declare(monkeypatch: pytest.MonkeyPatch, name: str, pads: dict[str, tuple[int, ...]], limit: Constraint) -> None:
    """Adds a limit of the legacy generation to the operator, which padding lifts."""
    spec = OPERATORS[name]
    monkeypatch.setitem(OPERATORS, name, replace(spec, pads=pads, constraints=(*spec.constraints, limit)))
