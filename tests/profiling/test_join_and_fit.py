"""Profiles joined with programs, and the cost model fitted to them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from docs.generators.schemas import SCHEMAS
from tests.profiling.test_reading import a_run, etdump, event, records
from tests.verbs import call_verb
from torch import nn

from openneutron import lower, quantize
from openneutron.errors import InputError
from openneutron.page import Summary, page_of, summarize
from openneutron.page.content import KernelRow, LayerRow, ProfileRow, ProfileRows
from openneutron.profiling import BoardProfile, DelegateTimes, FitWarning, fit_costs, joined, with_profile
from openneutron.profiling.join import layer_cycles
from openneutron.targets import TARGETS, Costs, NeutronTargetSpec, read_board


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, groups=16, padding=1),
            nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(x)
        return found


@pytest.fixture(scope="module")
def summary() -> Summary:
    torch.manual_seed(0)
    data = [torch.randn(1, 8, 16, 16) for _ in range(4)]
    model = Net().eval()
    return summarize("Net", lower(quantize(model, (data[0],), data, recover=None)))


def times(cycles: Sequence[int]) -> BoardProfile:
    return BoardProfile((DelegateTimes(tuple((one, one + 10, one - 10) for one in cycles), (5, 5, 5)),))


def test_a_summary_has_the_work_that_the_cost_model_counts(summary: Summary) -> None:
    costs = TARGETS["imxrt700"].costs
    for layer in summary.layers:
        assert layer.work
        assert layer_cycles(layer, costs, moves_while_computing=False) == pytest.approx(layer.cycles, abs=1)


def test_equal_numbers_are_joined_by_order(summary: Summary) -> None:
    cycles = [1000 * (number + 1) for number in range(len(summary.layers))]
    found = joined(summary, times(cycles))
    assert [row.cycles for row in found.rows] == cycles
    assert [row.estimated for row in found.rows] == [layer.cycles for layer in summary.layers]
    assert found.runs == 3
    assert found.end_cycles == 5
    assert "by their order" in found.notes[0]
    convolution = next(row for row in found.rows if row.operator == "CONV_2D")
    assert convolution.module == "layers.0"
    assert convolution.source is not None
    assert (convolution.low, convolution.high) == (convolution.cycles - 10, convolution.cycles + 10)


def test_other_numbers_give_the_sum(summary: Summary) -> None:
    (row,) = joined(summary, times([100, 200])).rows
    assert row.cycles == 300
    assert row.estimated == summary.cycles


def test_map_of_kernels(summary: Summary) -> None:
    """A kernel may compute several operators, and several kernels one operator."""
    nodes = [layer.node for layer in summary.layers if layer.node is not None]
    first, second, third, *_ = dict.fromkeys(nodes)
    kernels = (
        KernelRow(0, 0, "fused", (first, second)), KernelRow(0, 1, "copy", ()), KernelRow(0, 2, "half", (third,)),
        KernelRow(0, 3, "half", (third,)),
    )  # fmt: skip
    found = joined(replace(summary, kernels=kernels), times([100, 20, 300, 400]))
    assert [(row.kernels, row.cycles) for row in found.rows] == [((0,), 100), ((1,), 20), ((2, 3), 700)]
    assert found.rows[0].estimated == sum(one.cycles for one in summary.layers if one.node in (first, second))
    assert found.rows[1].estimated is None
    assert (found.rows[1].operator, found.rows[1].name) == ("copy", "kernels 1")
    assert not found.notes


def test_profile_of_another_program(summary: Summary) -> None:
    with pytest.raises(InputError, match="times of 2 delegates, and the program has 1"):
        joined(summary, BoardProfile(times([1]).delegates * 2))
    kernels = replace(summary, kernels=(KernelRow(0, 0, "k", ()),))
    with pytest.raises(InputError, match="2 kernels in the profile and 1 in the program"):
        joined(kernels, times([100, 200]))


@pytest.mark.parametrize("number", [-1, 2, 7])
def test_map_with_a_kernel_that_the_profile_lacks(summary: Summary, number: int) -> None:
    kernels = replace(summary, kernels=(KernelRow(0, 0, "k", ()), KernelRow(0, number, "k", ())))
    with pytest.raises(InputError, match=f"no kernel {number} in the profile"):
        joined(kernels, times([100, 200]))


def test_a_profile_without_events(summary: Summary) -> None:
    with pytest.raises(InputError, match=r"no events of kernels\. Build ExecuTorch .* with ET_EVENT_TRACER_ENABLED"):
        joined(summary, BoardProfile(()))


@pytest.mark.parametrize("operators", [0, 1])
def test_programs_with_few_operators(summary: Summary, operators: int) -> None:
    few = replace(summary, layers=summary.layers[:operators])
    found = with_profile(few, times([100]))
    assert found.profile is not None
    assert [(row.cycles, row.estimated) for row in found.profile.rows] == [
        (100, summary.layers[0].cycles if operators else None)
    ]
    with pytest.raises(InputError, match=f"have {operators} rows with cycles and known operators"):
        fit_costs([found], Costs())


def test_profiles_without_cycles_give_no_fit(summary: Summary) -> None:
    profile = BoardProfile((DelegateTimes(tuple((0,) for _ in summary.layers), (0,)),))
    with pytest.raises(InputError, match="have 0 rows with cycles"):
        fit_costs([with_profile(summary, profile)], Costs())


def test_page_has_the_profile(summary: Summary) -> None:
    found = with_profile(summary, times([1000 * (number + 1) for number in range(len(summary.layers))]))
    page = page_of(found)
    assert 'id="profile"' in page
    assert "layers.0" in page
    assert Summary.from_json(found.as_json()) == found
    assert 'id="profile"' not in page_of(summary)


def made_up(target: str, truth: Costs, noise: float, rows: int = 40) -> Summary:
    """Returns a summary of operators of random sizes, with a profile that follows `truth`."""
    generator = random.Random(0)
    layers, found = [], []
    base = NeutronTargetSpec(target).neutron_target
    moves = base.neutron_class == "Neutron-S"
    for number in range(rows):
        work = generator.choice(["convolution", "depthwise", "elements", "nothing"])
        compute = 0 if work == "nothing" else round(10 ** generator.uniform(2, 6))
        layer = LayerRow(
            "OP", f"t{number}", (1,), 0, 0, 0, 0.0, 0, 0, f"n{number}", None, None, work, compute,
            round(10 ** generator.uniform(2, 6)),
        )  # fmt: skip
        cycles = layer_cycles(layer, truth, moves_while_computing=moves) * (1 + noise * generator.gauss(0, 1))
        layers.append(layer)
        found.append(ProfileRow(f"n{number}", "OP", 0, (number,), round(cycles), 0, 0, None, (number,)))
    empty = Summary.from_json(EMPTY.as_json())
    row = replace(empty.target, name=target, neutron_class=base.neutron_class)
    return replace(empty, target=row, layers=tuple(layers), profile=ProfileRows(1, tuple(found), 0))


@pytest.fixture(scope="module", autouse=True)
def _empty(summary: Summary) -> None:
    global EMPTY  # noqa: PLW0603
    EMPTY = replace(summary, layers=(), placement=())


EMPTY: Summary
COMPUTE = (("convolution", 1.5), ("depthwise", 3.0), ("elements", 1.0))


@pytest.mark.parametrize("target", ["imxrt700", "imx95"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_known_coefficients_are_recovered(target: str, noise: float) -> None:
    truth = Costs(operator_cycles=1200, bytes_per_cycle=3, compute=COMPUTE)
    found = fit_costs([made_up(target, truth, noise, 120)], TARGETS[target].costs, "a test")
    near = 0.03 if noise == 0 else 0.15
    assert found.costs.operator_cycles == pytest.approx(1200, rel=near)
    assert found.costs.bytes_per_cycle == pytest.approx(3, rel=near)
    for kind, factor in COMPUTE:
        assert found.costs.compute_factor(kind) == pytest.approx(factor, rel=near)
    assert found.error_before > 0.3
    assert found.error_after < (0.01 if noise == 0 else 0.08)
    assert found.costs.source == "a test"


@pytest.mark.parametrize("target", ["imxrt700", "imx95"])
@pytest.mark.parametrize("cycles", [0.0, 4450.0])
def test_the_start_of_an_operator_is_found_from_a_target_without_it(target: str, cycles: float) -> None:
    truth = Costs(operator_cycles=3000, bytes_per_cycle=8)
    found = fit_costs([made_up(target, truth, 0.0)], Costs(operator_cycles=cycles)).costs
    assert found.operator_cycles == pytest.approx(3000, rel=0.03)
    assert found.bytes_per_cycle == pytest.approx(8, rel=0.03)


def test_wrong_rows_do_not_matter() -> None:
    truth = Costs(operator_cycles=1200, bytes_per_cycle=3, compute=COMPUTE)
    summary = made_up("imxrt700", truth, 0.0, 80)
    assert summary.profile is not None
    rows = [replace(row, cycles=9 * row.cycles) if at % 10 == 0 else row for at, row in enumerate(summary.profile.rows)]
    found = fit_costs([replace(summary, profile=replace(summary.profile, rows=tuple(rows)))], Costs())
    assert found.costs.bytes_per_cycle == pytest.approx(3, rel=0.2)
    assert found.error_after < 0.05


def test_coefficients_are_never_negative() -> None:
    """Cycles that do not depend on the sizes leave nothing for transfers and computations."""
    summary = made_up("imxrt700", Costs(), 0.0)
    assert summary.profile is not None
    rows = tuple(replace(row, cycles=5000 - 10 * at) for at, row in enumerate(summary.profile.rows))
    found = fit_costs([replace(summary, profile=replace(summary.profile, rows=rows))], Costs()).costs
    assert found.operator_cycles > 0
    assert found.bytes_per_cycle > 0
    assert all(factor > 0 for _, factor in found.compute)


def test_right_estimates_stay(summary: Summary) -> None:
    cycles = [layer.cycles for layer in summary.layers]
    found = fit_costs([with_profile(summary, times(cycles))], Costs())
    assert found.error_before < 0.001
    assert found.error_after < 0.03
    assert not found.kept


def cycles_of_two_kinds(cycles: Sequence[int]) -> list[int]:
    """Returns 1.02 times the cycles for every second row, and twice those for others. No coefficient explains both."""
    return [round(cycle * (1.02 if at % 2 else 2)) for at, cycle in enumerate(cycles)]


@pytest.mark.parametrize("target", ["imxrt700", "imx95"])
def test_coefficients_stay_if_the_fit_is_worse(target: str) -> None:
    base = TARGETS[target].costs
    summary = made_up(target, base, 0.0)
    assert summary.profile is not None
    measured = cycles_of_two_kinds([row.cycles for row in summary.profile.rows])
    rows = tuple(replace(row, cycles=cycles) for row, cycles in zip(summary.profile.rows, measured, strict=True))
    with pytest.warns(FitWarning, match=r"from 26 % to .*of the target are kept\. Give profiles of more operators"):
        found = fit_costs([replace(summary, profile=replace(summary.profile, rows=rows))], base, "a test")
    assert found.kept
    assert (found.costs, found.kinds) == (base, ())
    assert found.error_before == pytest.approx(0.26, abs=0.001)
    assert found.error_after > 0.27
    assert "% after; the coefficients of the target are kept" in str(found)


def test_too_few_rows(summary: Summary) -> None:
    with pytest.raises(InputError, match="a fit needs at least 8"):
        fit_costs([with_profile(summary, times([100, 200]))], Costs())


def test_different_npus() -> None:
    with pytest.raises(InputError, match="targets with different NPUs"):
        fit_costs([made_up(target, Costs(), 0.0) for target in ("imxrt700", "imx95")], Costs())


class TestVerbs:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory, summary: Summary) -> Path:
        """A folder of a build, and a profile in which each operator takes half of the estimate."""
        folder = tmp_path_factory.mktemp("profile")
        torch.manual_seed(0)
        data = [torch.randn(1, 8, 16, 16) for _ in range(4)]
        program = lower(quantize(Net().eval(), (data[0],), data, recover=None))
        (folder / "build").mkdir()
        program.save(folder / "build" / "model.pte")
        (folder / "build" / "summary.json").write_text(summary.as_json())
        data_of_board = records([layer.cycles // 2 for layer in summary.layers])
        (folder / "board.log").write_text(f"PROFILE 0 0 {data_of_board.hex()}\n")
        (folder / "run.etdp").write_bytes(etdump([a_run(1)[:1] + a_run(1)[1:2]]))
        events = [event(None, 1, at, 0, layer.cycles // 2) for at, layer in enumerate(summary.layers)]
        (folder / "npu.etdp").write_bytes(etdump([[*events, event(None, 1, len(events), 0, 3)]]))
        return folder

    @pytest.fixture
    def run(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Any:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "200")
        return lambda *arguments: call_verb(monkeypatch, capsys, *arguments)

    @pytest.mark.parametrize("recorded", ["board.log", "npu.etdp"])
    def test_profile(self, run: Any, folder: Path, summary: Summary, recorded: str) -> None:
        code, text = run("profile", recorded, "--program", "build", "-o", "page.html")
        assert code == 0
        assert "where the estimate is wrong" in text
        assert "0.50" in text
        assert 'id="profile"' in (folder / "page.html").read_text()
        code, text = run("profile", recorded, "--program", "build", "--json")
        found, _ = json.JSONDecoder().raw_decode(text)
        jsonschema.validate(found, SCHEMAS["profile"])
        assert found["estimated"] == summary.cycles
        assert len(found["rows"]) == len(summary.layers)

    def test_bare_program(self, run: Any) -> None:
        code, text = run("profile", "board.log", "--program", "build/model.pte", "--json")
        assert code == 0
        found, _ = json.JSONDecoder().raw_decode(text)
        assert all(row["estimated"] for row in found["rows"])

    def test_portable_program(self, run: Any) -> None:
        code, text = run("profile", "run.etdp", "--program", "build")
        assert code == 0
        assert "no kernels of the NPU" in text
        assert "quantize_per_tensor.out" in text

    def test_fitted_board_makes_the_estimates_right(self, run: Any, folder: Path, summary: Summary) -> None:
        code, text = run("fit-costs", "board.log", "npu.etdp", "--program", "build", "-o", "our_board.toml")
        assert code == 0
        assert "median relative error" in text
        _, text = run("fit-costs", "board.log", "--program", "build", "-o", "our_board.toml", "--json")
        jsonschema.validate(json.JSONDecoder().raw_decode(text)[0], SCHEMAS["fit-costs"])
        board = read_board(folder / "our_board.toml")
        assert board.chip == summary.target.name
        assert board.costs.operator_cycles < Costs().operator_cycles
        code, text = run("profile", "board.log", "--program", "build", "--target", "our_board.toml", "--json")
        found, _ = json.JSONDecoder().raw_decode(text)
        assert found["estimated"] == pytest.approx(found["cycles"], rel=0.1)
        assert run("inspect", "build/model.pte", "--target", "our_board.toml")[0] == 0

    def test_a_worse_fit_keeps_the_coefficients(self, run: Any, folder: Path, summary: Summary) -> None:
        measured = records(cycles_of_two_kinds([layer.cycles for layer in summary.layers]))
        (folder / "mixed.log").write_text(f"PROFILE 0 0 {measured.hex()}\n")
        code, text = run("fit-costs", "mixed.log", "--program", "build", "-o", "same.toml", "--json")
        assert code == 1
        start = text.index("{")
        assert json.JSONDecoder().raw_decode(text[start:])[0]["kept"]
        assert "warning: The fit increases the median relative error" in " ".join(text.split())
        assert read_board(folder / "same.toml").costs == TARGETS[summary.target.name].costs

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("board.log", "-o", "board.txt"), "not the name of a board file"),
            (("board.log", "--program", "build", "-o", "b.toml"), "2 programs"),
            (("run.etdp", "-o", "b.toml"), "a fit needs at least"),
        ],
    )
    def test_wrong_use(self, run: Any, folder: Path, arguments: tuple[str, ...], message: str) -> None:
        code, text = run("fit-costs", "--program", "build", *arguments)
        assert code == 2
        assert message in " ".join(text.split())
        assert not (folder / "b.toml").exists()


def test_records_are_16_bytes() -> None:
    assert len(records((1,))) % struct.calcsize("<BBBBIBBBBI") == 0
