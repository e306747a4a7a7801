"""The table of accuracies: its arithmetic, and its networks with rescaled channels, which fail in per-tensor int8."""

from __future__ import annotations

import pytest
import torch
from benchmarks.accuracy import ROWS, Bench, Draws, Flow, Row, documented_flow, outputs_of, table_of_draws
from benchmarks.rescaled import RESCALED, digits, largest_difference, rescaled
from benchmarks.targets import Comparison, Target, compare

from openneutron.recovery import RECIPES

FEW_EPOCHS = 6


def logits(*classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 4).float()


class TestCompare:
    def test_samples_that_flip_are_counted_both_ways(self) -> None:
        found = compare(logits(0, 1, 2, 3), logits(0, 0, 1, 2), torch.tensor([0, 1, 1, 2]))
        assert found == Comparison(samples=4, top1_float=50, top1_int8=75, lost=1, gained=2)
        assert found.difference == 25
        assert found.error == pytest.approx(100 * (3 - 1 / 4) ** 0.5 / 4)


@pytest.mark.parametrize(
    ("lost", "gained", "seconds", "holds"),
    [(3, 0, 1, True), (4, 0, 1, False), (4, 1, 1, True), (0, 9, 1, True), (0, 0, 61, False)],
)
def test_a_target_is_points_below_float_and_seconds(lost: int, gained: int, seconds: float, *, holds: bool) -> None:
    found = Comparison(1000, 90, 90 + (gained - lost) / 10, lost, gained)
    assert Target(0.3, 60).holds(found, seconds) == holds
    assert Target(0.3).holds(found, 1e6) == (holds or seconds > 60)


def test_every_row_is_a_way_that_exists() -> None:
    assert [name for name, row in ROWS.items() if not all(flow.exists for flow in (row.flow, *row.naive))] == []
    assert {row.flow.options.get("recover") for row in ROWS.values()} <= {None, *RECIPES}
    assert not Flow(options={"recovers": "auto"}).exists
    assert not Flow("documented", {"recover": "auto"}).exists


def test_rescaling_keeps_the_float_function() -> None:
    network = RESCALED["efficientnet_lite_rescaled"].make().eval()
    network.fold()
    assert largest_difference(network, rescaled(network), digits().test_images[:32]) < 1e-4


def test_fewer_inputs_to_calibrate_with_are_spread_over_all() -> None:
    network = RESCALED["se_resnet_rescaled"].network()
    fewer = network.with_calibration_of(20)
    assert len(fewer.calibration()) == 20
    assert set(fewer.calibrates) <= set(network.calibrates)
    assert fewer.calibrates[-1] > network.calibrates[-1] * 0.9
    assert list(network.with_calibration_of(10**9).calibrates) == list(network.calibrates)


def test_draws_of_calibration_inputs_differ_and_repeat() -> None:
    network = RESCALED["se_resnet_rescaled"].network()
    first, second, again = (network.with_drawn_calibration(seed).calibrates for seed in (0, 1, 0))
    assert len(set(first)) == len(first) == len(network.calibrates) * 4 // 5
    assert set(first) <= set(network.calibrates)
    assert first == again != second


def test_the_table_of_draws_shows_means_and_deviations() -> None:
    table = table_of_draws([Draws("net", "auto", 90, top1=[88.0, 92.0], sqnr=[30.0, 31.0])])
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["net", "auto", "2", "90.00", "90.00", "2.00", "2.83", "30.50 dB", "0.71 dB"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RESCALED))
def test_rescaled_networks_are_as_good_as_float(name: str) -> None:
    network = RESCALED[name].network(FEW_EPOCHS)
    result = Bench().measure(Row(name, lambda: network, Flow(options={"recover": "auto"}), Target(0.5)))
    assert result.comparison.top1_float > 90
    assert result.holds, result


@pytest.mark.slow
def test_a_rescaled_network_fails_without_equalization() -> None:
    """Runs the converted module, because the host has no kernels for scales with such ratios."""
    network = RESCALED["efficientnet_lite_rescaled"].network(FEW_EPOCHS)
    model = network.build()
    module = documented_flow(model, network, equalize=False, correct_bias=False)
    samples = [inputs for inputs, _ in network.evaluation().spread(100)]
    agreeing = outputs_of(module, samples).argmax(1) == outputs_of(model, samples).argmax(1)
    assert float(agreeing.float().mean()) < 0.5
