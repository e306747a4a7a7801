"""Estimates of memory and cycles before conversion, compared with files of NXP's converter and measurements."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.cycles import FOMO, MEASURED, MobileNetV1
from benchmarks.models import MobileNetV2
from executorch.exir._serialize._program import deserialize_pte_binary
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from openneutron import NeutronProgram, inspect, lower, quantize
from openneutron.errors import TargetError
from openneutron.formats.arena import Lifetime, lifetimes, plan
from openneutron.ir.cost import OPERATOR_CYCLES
from openneutron.report.contents import Report, blocks_of_report
from openneutron.report.estimate import Fit, LayerEstimate
from openneutron.report.estimating import fit_of
from openneutron.report.inspect import inspect_bytes
from openneutron.targets import TARGETS

FOLDERS = {"imxrt700": "imxrt700", "mcxn94x": "mcxn947"}
DS_CNN, MOBILENET, CIFARNET = "ds_cnn_s", "mobilenet_v1_0.25_128_quant_int8", "cifarnet_quant_int8"


@pytest.mark.data
class TestTwins:
    """The same model before and after NXP's converter."""

    @pytest.mark.parametrize(
        ("target", "model", "scratch", "percent"),
        [
            ("imxrt700", DS_CNN, 16_000, -0.4),
            ("imxrt700", MOBILENET, 98_304, -0.0),
            # Not all data that N1 stores besides the codes are known: see openneutron/report/weights.py.
            ("mcxn94x", DS_CNN, 16_000, -2.2),
            ("mcxn94x", MOBILENET, 98_304, 0.1),
            ("mcxn94x", CIFARNET, 40_960, -1.3),
        ],
    )
    def test_scratch_is_exact_and_weights_are_near(
        self, data_folder: Path, target: str, model: str, scratch: int, percent: float
    ) -> None:
        vendor = data_folder / "vendor"
        before, after = reference(vendor, model, target), converted(vendor, target, model)
        assert before.scratch_bytes == after.scratch_bytes == scratch
        assert 100 * (before.weight_bytes / after.weight_bytes - 1) == pytest.approx(percent, abs=0.06)
        if target == "imxrt700":
            assert abs(before.weight_bytes / after.weight_bytes - 1) < 0.02

    @pytest.mark.parametrize("model", [DS_CNN, MOBILENET, CIFARNET])
    def test_the_same_operators_are_left_to_the_cpu(self, data_folder: Path, model: str) -> None:
        vendor = data_folder / "vendor"
        before, after = reference(vendor, model, "mcxn94x"), converted(vendor, "mcxn94x", model)
        assert before.cpu_operators == after.cpu_operators

    def test_numbers_of_microcode_are_not_estimates(self, data_folder: Path) -> None:
        report = converted(data_folder / "vendor", "imxrt700", DS_CNN)
        assert report.cycles is None
        assert report.layers == ()


def reference(vendor: Path, model: str, target: str) -> Report:
    return inspect(vendor / "ref" / f"{model}.tflite", target)


def converted(vendor: Path, target: str, model: str) -> Report:
    return inspect(vendor / FOLDERS[target] / f"{model}_npu.tflite")


# Deviation of the estimate from the published number, in percent. The size of the MobileNetV1 is unknown; 1.0 at 224 is
# assumed.
ERRORS: dict[Callable[[], nn.Module], tuple[int, ...]] = {FOMO: (-2, -3), MobileNetV2: (-17,), MobileNetV1: (23,)}


@pytest.mark.slow
@pytest.mark.parametrize("network", ERRORS)
def test_estimated_cycles_beside_measurements(network: Callable[[], nn.Module]) -> None:
    points = [point for point in MEASURED if point.model is network]
    torch.manual_seed(0)
    inputs = (torch.randn(points[0].shape),)
    program = lower(quantize(network().eval(), inputs, [inputs], points[0].target))
    estimate = program.estimate()
    assert estimate.target == points[0].target
    starts = [0 if point.counts_starts else len(estimate.layers) * OPERATOR_CYCLES for point in points]
    errors = [(estimate.cycles - start) / point.cycles - 1 for start, point in zip(starts, points, strict=True)]
    assert tuple(round(100 * error) for error in errors) == ERRORS[network]


class TestProgram:
    @pytest.fixture(scope="class")
    def program(self) -> NeutronProgram:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16)).eval()
        inputs = (torch.randn(1, 8, 16, 16).contiguous(memory_format=torch.channels_last),)
        return lower(quantize(model, inputs, [inputs]))

    def test_the_estimate_is_for_the_programs_target_by_default(self, program: NeutronProgram) -> None:
        assert program.estimate().target == "imxrt700"
        there = program.estimate("mcxn94x")
        assert there.target == "mcxn94x"
        assert there.milliseconds == pytest.approx(there.cycles / 150e6 * 1000)
        assert there.cycles > program.estimate().cycles
        with pytest.raises(TargetError, match="Known targets"):
            program.estimate("imx9")

    def test_sums_equal_the_sums_over_layers(self, program: NeutronProgram) -> None:
        estimate = program.estimate()
        assert [layer.operator for layer in estimate.layers] == ["CONV_2D", "DEPTHWISE_CONV_2D"]
        assert estimate.cycles == sum(layer.cycles for layer in estimate.layers)
        assert estimate.weight_bytes == sum(layer.weight_bytes for layer in estimate.layers)
        assert estimate.macs == 16 * 16 * 16 * 8 * 9 + 14 * 14 * 16 * 9
        assert estimate.scratch_bytes == 16 * 16 * 16
        assert estimate.io_bytes == 16 * 16 * 8 + 14 * 14 * 16
        assert estimate.layers[0].utilization > 2 * estimate.layers[1].utilization

    def test_a_saved_program_reads_the_same(self, program: NeutronProgram, tmp_path: Path) -> None:
        program.save(tmp_path / "model.pte")
        report = inspect(tmp_path / "model.pte")
        assert report.estimate == program.estimate()
        assert (report.scratch_bytes, report.weight_bytes, report.cycles) == (
            program.estimate().scratch_bytes, program.estimate().weight_bytes, program.estimate().cycles,
        )  # fmt: skip
        assert inspect(tmp_path / "model.pte", "imx95").estimate == program.estimate("imx95")

    def test_delegates_share_a_scratch_and_add_up(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 8, 1)).eval()
        inputs = (torch.randn(1, 4, 8, 8),)
        whole = lower(quantize(model, inputs, [inputs]), operators_not_to_delegate=["sigmoid"])
        first, second = (one.estimate for one in inspect_bytes(whole.portable, "the program").delegates)
        assert first is not None
        assert second is not None
        estimate = whole.estimate()
        assert estimate.layers == first.layers + second.layers
        assert estimate.scratch_bytes == max(first.scratch_bytes, second.scratch_bytes)
        assert estimate.cycles == first.cycles + second.cycles

    def test_a_program_without_the_npu_has_no_cycles(self) -> None:
        inputs = (torch.randn(1, 4, 8, 8),)
        model = lower(quantize(nn.Conv2d(4, 4, 1).eval(), inputs, [inputs]), operators_not_to_delegate=["conv2d"])
        estimate = model.estimate()
        assert (estimate.layers, estimate.cycles, estimate.scratch_bytes, estimate.fit.verdict) == ((), 0, 0, "fits")


class TestFit:
    TARGET = replace(TARGETS["mcxn94x"], sram_bytes=1000, flash_bytes=5000)

    def fit(self, weights: list[int], scratch: int = 100) -> Fit:
        layers = [
            LayerEstimate("CONV_2D", f"t{i}", (1, 1, 1, 1), 0, 0, 0.0, size, scratch) for i, size in enumerate(weights)
        ]
        return fit_of(layers, scratch, 50, self.TARGET)

    def test_all_in_sram(self) -> None:
        assert self.fit([400, 450]) == Fit("fits", 1000, 5000, 1000, 0, ())

    def test_two_layers_at_a_time(self) -> None:
        assert self.fit([400, 400, 400]) == Fit("fits with fetch_constants_to_sram", 1000, 5000, 950, 0, ())

    def test_too_much_sram_names_the_layers(self) -> None:
        fit = self.fit([10, 700, 800])
        assert (fit.verdict, fit.needed_bytes, fit.missing_bytes) == ("does not fit", 1650, 650)
        assert fit.blame[0].startswith("CONV_2D 't2' (1, 1, 1, 1): 100 bytes of tensors, 800 of weights")

    def test_too_much_flash(self) -> None:
        fit = self.fit([400] * 14)
        assert (fit.verdict, fit.missing_bytes) == ("does not fit", 14 * 400 - 5000)

    def test_the_verdict_for_unknown_memory_is_unknown(self) -> None:
        assert fit_of([], 100, 50, TARGETS["imx95"]).verdict == "unknown"


def scaled(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


# name: model, shape of its input, options of lower
MEMORY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "a large image": (lambda: scaled(nn.Conv2d(3, 4, 3, stride=2)), (1, 3, 224, 224), {}),
    "an image out": (lambda: nn.Conv2d(3, 4, 1), (1, 3, 32, 32), {}),
    "a vector": (lambda: nn.Linear(40, 30), (1, 40), {}),
    "transposed on the CPU": (
        lambda: scaled(nn.Conv2d(3, 4, 3)), (1, 3, 32, 32), {"use_neutron_for_format_conversion": False},
    ),
    "a part on the CPU": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 1)), (1, 3, 32, 32),
        {"operators_not_to_delegate": ["sigmoid"]},
    ),
}  # fmt: skip


class TestRuntimeMemory:
    """Memory that ExecuTorch's runtime allocates besides the NPU's memory."""

    def program(self, name: str, *, channels_last: bool = False, int8_io: bool = False) -> NeutronProgram:
        build, shape, options = MEMORY[name]
        torch.manual_seed(0)
        inputs = torch.randn(shape)
        if channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        quantized = quantize(build().eval(), (inputs,), [(inputs,)], "mcxn94x", recover=None)
        return lower(quantized, target="mcxn94x", int8_io=int8_io, **options)

    @pytest.mark.parametrize("name", MEMORY)
    def test_planned_memory_equals_the_program_and_counts_once(self, name: str) -> None:
        program = self.program(name)
        estimate = program.estimate()
        plan_of_method = deserialize_pte_binary(program.buffer).program.execution_plan[0]
        assert estimate.memory is not None
        assert estimate.memory.planned_bytes == sum(plan_of_method.non_const_buffer_sizes[1:])
        assert estimate.memory.given_bytes == 0
        assert 200 < estimate.memory.method_bytes < 3000
        parts = estimate.scratch_bytes + estimate.weight_bytes + estimate.memory.total_bytes
        if estimate.fit.verdict == "fits":
            assert estimate.fit.needed_bytes == parts

    @pytest.mark.parametrize("name", MEMORY)
    def test_int8_io_saves_the_reported_bytes(self, name: str) -> None:
        memory, int8 = self.program(name).estimate().memory, self.program(name, int8_io=True).estimate().memory
        assert memory is not None
        assert int8 is not None
        assert (memory.int8_io_saves > 0) == (name != "a part on the CPU")  # it needs more memory in the middle
        assert memory.planned_bytes - int8.planned_bytes == pytest.approx(memory.int8_io_saves, abs=64)
        assert int8.int8_io_saves == 0

    @pytest.mark.parametrize("name", ["a large image", "an image out", "transposed on the CPU"])
    def test_channels_last_saves_the_reported_bytes(self, name: str) -> None:
        estimate, other = self.program(name).estimate(), self.program(name, channels_last=True).estimate()
        assert estimate.memory is not None
        assert other.memory is not None
        saved = estimate.scratch_bytes + estimate.memory.temporary_bytes
        saved -= other.scratch_bytes + other.memory.temporary_bytes
        assert estimate.channels_last_saves == pytest.approx(saved, abs=64)
        assert estimate.channels_last_saves > 0
        assert other.channels_last_saves == 0

    def test_no_saving_is_reported_if_there_is_none(self) -> None:
        for name in ("a vector", "a part on the CPU"):
            assert self.program(name).estimate().channels_last_saves == 0

    def test_floats_alone_may_not_fit(self) -> None:
        estimate = self.program("a large image").estimate()
        assert estimate.fit.verdict == "does not fit"
        assert estimate.fit.needed_bytes > 5 * 224 * 224 * 3
        assert self.program("a large image", int8_io=True).estimate().fit.verdict == "fits"

    def test_the_text_has_these_numbers(self) -> None:
        report = inspect_bytes(self.program("a large image").buffer, "the program")
        memory, console = report.estimate.memory, Console(file=io.StringIO(), width=200)
        assert memory is not None
        console.print(blocks_of_report(report))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        for expected in (
            f"planned {memory.planned_bytes:,} (with inputs and outputs)",
            f"method allocator {memory.method_bytes:,}",
            f"does not fit: needs {report.estimate.fit.needed_bytes:,} of 524,288 bytes",
            f"int8_io=True would save about {memory.int8_io_saves:,} bytes",
            f"channels-last would save about {report.estimate.channels_last_saves:,} bytes",
        ):
            assert text.count(expected) == 1


class TestPlan:
    def test_the_arena_of_a_chain_has_its_two_largest_neighbours(self) -> None:
        steps = [(["in"], ["a"]), (["a"], ["b"]), (["b"], ["c"]), (["c"], ["out"])]
        values = lifetimes(steps, {"a": 10, "b": 30, "c": 20, "out": 99}, ["in", "out"])
        assert plan(values, len(steps)).size == 50

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9), st.integers(0, 9)), max_size=25))
    def test_live_tensors_do_not_overlap(self, drawn: list[tuple[int, int, int]]) -> None:
        values = {i: Lifetime(size, min(a, b), max(a, b)) for i, (size, a, b) in enumerate(drawn)}
        arena = plan(values, 10)
        assert arena.peak <= arena.size <= sum(life.size for life in values.values())
        for i, one in values.items():
            for j, other in values.items():
                if i < j and one.first <= other.last and other.first <= one.last:
                    ends = arena.offsets[i] + one.size <= arena.offsets[j]
                    assert ends or arena.offsets[j] + other.size <= arena.offsets[i]
