"""The option `recover` of `quantize`: recipes, and the search for the best one."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.recovery_models import IMAGE, exported, images, network
from torch import Tensor, nn
from torch.fx import GraphModule

from openneutron import QuantizedModel, lower, quantize
from openneutron.core.constants import constant_of
from openneutron.core.fx import arguments, is_quantize
from openneutron.errors import CalibrationError, OptionError
from openneutron.ops.declared import layer_kind
from openneutron.quantizer import DistributionObserver, RangeObserver
from openneutron.recovery import Recipe, Trial, recover_exported
from openneutron.recovery.layerwise import evenly_spaced
from openneutron.recovery.recipes import AUTO, ENOUGH_SAMPLES, FAST, FEW_INPUTS, FEW_SAMPLES
from openneutron.recovery.search import FEWEST_SAMPLES, HIGHEST_SQNR, coordinate_descent, split_held_out, sqnr_db
from openneutron.recovery.weighted_layers import layers_of


def float_weights(model: QuantizedModel) -> list[Tensor]:
    assert model.reference is not None
    found = []
    for node in model.reference.graph.nodes:
        weight = constant_of(model.reference, arguments(node)["weight"]) if layer_kind(node) is not None else None
        if weight is not None:
            found.append(weight)
    return found


@pytest.mark.parametrize("recipe", ["fast", "auto"])
def test_recipes_lower_the_noise_of_the_pte_and_add_no_operator(recipe: str) -> None:
    model, samples = network().eval(), images(32)
    naive = lower(quantize(model, samples[0], samples, recover=None))
    program = lower(quantize(model, samples[0], samples, recover=recipe))
    assert [row.op for row in program.placement] == [row.op for row in naive.placement]
    assert all(row.where == "npu" for row in program.placement if "quantize" not in row.op)
    fresh = images(48)[32:]
    with torch.no_grad():
        real = torch.cat([model(*sample) for sample in fresh])
    errors = [
        float((torch.cat([torch.as_tensor(run(*sample)) for sample in fresh]) - real).square().sum())
        for run in (naive.run, program.run)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_the_float_outputs_on_the_samples_do_not_change() -> None:
    module, samples = exported(network()), images(ENOUGH_SAMPLES)
    before = [module(*sample) for sample in samples]
    recover_exported(module, samples)
    for sample, expected in zip(samples, before, strict=True):
        assert float((module(*sample) - expected).norm() / expected.norm()) < 1e-4


def test_statistics_of_few_samples_are_not_used() -> None:
    """With few samples, a channel that is never active, or never reaches its clip, may do so for another input."""
    module, fresh = exported(network()), [(10 * sample,) for (sample,) in images(8)]
    before = [module(*sample) for sample in fresh]
    recover_exported(module, [(torch.zeros(IMAGE),)] * (ENOUGH_SAMPLES - 1))
    for sample, expected in zip(fresh, before, strict=True):
        assert float((module(*sample) - expected).norm() / expected.norm()) < 1e-4


def test_layers_that_are_not_equalized_keep_their_weights() -> None:
    samples = images(4)
    plain, kept, evened = (
        float_weights(quantize(network().eval(), samples[0], samples, **options))
        for options in ({"recover": None, "equalize": False}, {"equalize": False}, {})
    )
    assert all(map(torch.equal, kept, plain))
    assert not all(map(torch.equal, evened, plain))


def test_quantize_recovers_accuracy_by_default() -> None:
    model, samples = network().eval(), images(4)
    by_default, auto, naive = (
        lower(quantize(model, samples[0], samples, **options)).buffer
        for options in ({}, {"recover": "auto"}, {"recover": None})
    )
    assert by_default == auto != naive


@pytest.mark.parametrize("recipe", ["better", 3, ["auto"], True])
def test_a_recipe_that_does_not_exist_is_refused(recipe: Any) -> None:
    expected = f"recover must be one of 'fast', 'auto', 'best', a Recipe, or None, not {recipe!r}."
    with pytest.raises(OptionError, match=re.escape(expected)):
        quantize(network().eval(), images(1)[0], images(1), recover=recipe)


@pytest.mark.parametrize(
    "wrong",
    [{"correction": "all"}, {"range_by": "luck"}, {"equalizes": 1}, {"trusts_samples": None}, {"use_all_samples": 2}],
)
def test_a_recipe_with_wrong_values_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Recipe(**wrong)


@given(st.integers(1, 300), st.integers(1, 60))
def test_few_of_the_samples_are_spread_over_all(count: int, most: int) -> None:
    chosen = [int(sample) for (sample,) in evenly_spaced([(torch.tensor(index),) for index in range(count)], most)]
    assert len(chosen) == min(count, most)
    gaps = [later - before for before, later in itertools.pairwise([*chosen, count])]
    assert chosen[0] == 0
    assert max(gaps) - min(gaps) <= 1


def weight_codes(model: QuantizedModel) -> list[Tensor]:
    return [layer.codes for layer in layers_of(model.module)]


def test_a_fast_recipe_keeps_the_weights_of_large_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, FEW_INPUTS + 1), nn.ReLU(), nn.Linear(FEW_INPUTS + 1, 2)).eval()
    samples = images(FEW_SAMPLES, (1, 16))
    recipes = (Recipe(correction=None), Recipe(use_all_samples=False), Recipe())
    naive, fast, full = (weight_codes(quantize(model, samples[0], samples, recover=recipe)) for recipe in recipes)
    assert not torch.equal(fast[0], naive[0])
    assert torch.equal(fast[0], full[0])  # both recipes use all samples, because there are few
    assert torch.equal(fast[1], naive[1])
    assert not torch.equal(full[1], naive[1])


def activation_scales(model: QuantizedModel) -> list[float]:
    nodes = model.module.graph.nodes
    return [float(arguments(node)["scale"]) for node in nodes if is_quantize(node)]


def test_the_rule_of_a_recipe_finds_the_ranges() -> None:
    samples = images(16)
    samples[0][0][0, 0, 0, 0] = 20.0
    calls: list[dict[str, Any]] = [
        {"recover": Recipe(correction=None, range_by="minmax")},
        {"recover": Recipe(correction=None), "observer": RangeObserver},
        {"recover": Recipe(correction=None)},
    ]
    extremes, observed, by_default = (
        activation_scales(quantize(network().eval(), samples[0], samples, **call)) for call in calls
    )
    assert extremes == observed != by_default


@pytest.mark.parametrize(("name", "recipe"), [("auto", AUTO), ("fast", FAST)])
def test_a_recipe_with_a_name_leaves_ranges_to_an_observer(name: str, recipe: Recipe) -> None:
    samples = images(2)
    plain = quantize(network().eval(), samples[0], samples, recover=name)
    observed = quantize(network().eval(), samples[0], samples, recover=name, observer=RangeObserver)
    assert plain.recipe == recipe
    assert observed.recipe == replace(recipe, range_by=None)
    again = quantize(network().eval(), samples[0], samples, recover=observed.recipe, observer=RangeObserver)
    assert activation_scales(observed) == activation_scales(again) != activation_scales(plain)


def test_an_observer_and_a_recipe_with_a_rule_are_refused() -> None:
    options: dict[str, Any] = {"recover": Recipe(range_by="mse"), "observer": DistributionObserver}
    with pytest.raises(OptionError, match="Leave one of them out"):
        quantize(network().eval(), images(1)[0], images(1), **options)


# ------------------------------------------------------------------------------------------------------------- search

CHOICES: dict[str, tuple[Any, ...]] = {"correction": ("biases", None), "range_by": ("minmax", "kl")}


def scored(score: Callable[[Recipe], float], seconds: float = 0.0) -> Callable[[Recipe], Trial]:
    return lambda recipe: Trial(recipe, (score(recipe), score(recipe) + 1), seconds)


def test_each_choice_is_tried_with_the_best_earlier_choices() -> None:
    scores: dict[tuple[str | None, str | None], float] = {
        ("weights", None): 1.0,
        ("biases", None): 3.0,
        ("biases", "kl"): 4.0,
    }
    best, trials = coordinate_descent(
        Recipe(), CHOICES, scored(lambda recipe: scores.get((recipe.correction, recipe.range_by), 0.0)), math.inf
    )
    assert best == Recipe("biases", "kl")
    tried = [(trial.recipe.correction, trial.recipe.range_by) for trial in trials]
    assert tried == [("weights", None), ("biases", None), (None, None), ("biases", "minmax"), ("biases", "kl")]


def test_the_first_of_equal_recipes_stays() -> None:
    assert coordinate_descent(Recipe(), CHOICES, scored(lambda _: 7.0), math.inf)[0] == Recipe()


def test_without_time_only_the_first_recipe_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    best, trials = coordinate_descent(Recipe(), CHOICES, scored(lambda _: 7.0, seconds=1e9), deadline=0.0)
    assert (best, len(trials)) == (Recipe(), 1)
    assert "The time limit is reached. Recipes with correction='biases'" in caplog.text


def test_a_gain_is_more_than_chance() -> None:
    first = Trial(Recipe(), tuple(20.0 + index for index in range(10)), 0.0)
    steady = Trial(Recipe(), tuple(20.5 + index for index in range(10)), 0.0)
    lucky = Trial(Recipe(), (40.0, *first.sqnrs_db[1:]), 0.0)
    assert steady.is_better_than(first)
    assert not first.is_better_than(steady)
    assert lucky.sqnr_db > steady.sqnr_db
    assert not lucky.is_better_than(first)


@given(st.integers(FEWEST_SAMPLES, 500))
def test_every_sample_is_either_seen_or_held_out(count: int) -> None:
    samples = [(torch.tensor(index),) for index in range(count)]
    seen, unseen = ([int(sample) for (sample,) in part] for part in split_held_out(samples))
    assert sorted(seen + unseen) == list(range(count))
    assert len(seen) >= ENOUGH_SAMPLES
    assert len(unseen) == count // 5


class Outputs(nn.Module):
    """Two float outputs and one of integers. The first has a relative error of `off`."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.off = off

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x * (1 + self.off), {"kept": x + 0.0, "index": x.argmax()}


def test_the_noise_is_the_mean_of_the_outputs() -> None:
    inputs = (torch.randn(8),)
    exact, off = (torch.export.export(Outputs(off), inputs).module() for off in (0.0, 0.1))
    assert isinstance(exact, GraphModule)
    assert isinstance(off, GraphModule)
    assert sqnr_db(exact, exact, inputs) == HIGHEST_SQNR
    assert sqnr_db(exact, off, inputs) == pytest.approx(10 * math.log10(2 / 0.1**2), abs=1e-3)
    assert sqnr_db(exact, off, (torch.zeros(8),)) == HIGHEST_SQNR


@pytest.mark.parametrize(
    ("options", "tried", "rules"),
    [
        ({}, 8, ["mse", "relative", "minmax", "percentile"]),
        ({"observer": RangeObserver}, 5, [None]),
        ({"equalize": False}, 7, ["mse", "relative", "minmax", "percentile"]),
        ({"recovery_seconds": 1e-6}, 1, ["mse"]),
    ],
    ids=str,
)
def test_the_best_recipe_is_followed_and_said(options: dict[str, Any], tried: int, rules: list[str | None]) -> None:
    samples = images(FEWEST_SAMPLES)
    found = quantize(network().eval(), samples[0], samples, recover="best", **options)
    assert len(found.trials) == tried
    assert found.recipe in [trial.recipe for trial in found.trials]
    chosen = next(trial for trial in found.trials if trial.recipe == found.recipe)
    assert not any(trial.is_better_than(chosen) for trial in found.trials)
    assert {trial.recipe.range_by for trial in found.trials} == set(rules)
    assert not any(trial.recipe.equalizes for trial in found.trials if "equalize" in options)
    again = quantize(network().eval(), samples[0], samples, **{**options, "recover": found.recipe})
    assert lower(again).buffer == lower(found).buffer


def test_too_few_samples_to_judge_by_are_refused() -> None:
    samples = images(FEWEST_SAMPLES - 1)
    with pytest.raises(CalibrationError, match=r'needs at least 40 inputs; there are 39.*or use recover="auto"'):
        quantize(network().eval(), samples[0], samples, recover="best")


@pytest.mark.parametrize("seconds", [0, -1, True, "long", math.nan])
def test_an_invalid_time_is_refused(seconds: Any) -> None:
    with pytest.raises(OptionError, match="recovery_seconds must be a number above 0"):
        quantize(network().eval(), images(1)[0], images(1), recover="best", recovery_seconds=seconds)


@pytest.mark.parametrize(
    ("recipe", "bars"),
    [
        (None, ["Calibrating"]),
        ("auto", ["Calibrating", "Recovering layers"]),
        ("best", ["Trying recipes", "Calibrating", "Recovering layers"]),
    ],
)
def test_progress_bars_name_each_step(recipe: str | None, bars: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    samples = images(FEWEST_SAMPLES)
    quantize(network().eval(), samples[0], samples, recover=recipe, progress=True)
    shown = capfd.readouterr().err
    assert [bar for bar in ("Trying recipes", "Calibrating", "Recovering layers") if bar in shown] == bars
