"""Random models, each held to the contract of `tests/random_model_check.py`. `make soak` checks many more."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from tests.random_model_check import Outcome, check, check_seed, draw_way
from tests.random_models import draw_model

SEEDS = range(300)
SEEDS_OF_A_TEST = 20


@pytest.mark.slow
@pytest.mark.parametrize("first", SEEDS[::SEEDS_OF_A_TEST])
def test_a_random_model_is_refused_with_a_typed_error_or_runs(first: int) -> None:
    found = {seed: check_seed(seed)[2] for seed in SEEDS[first : first + SEEDS_OF_A_TEST]}
    faults = [f"{seed}: {finding}" for seed, finding in found.items() if finding.is_fault]
    assert not faults, "python -m tests.soak --seed N shows the model\n" + "\n".join(faults)
    refused = sum(finding.outcome is Outcome.REFUSED for finding in found.values())
    assert refused <= SEEDS_OF_A_TEST // 2, "most models are refused: this test shows little"


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(random=st.randoms(use_true_random=False))
def test_a_small_random_model_is_refused_with_a_typed_error_or_runs(random: Random) -> None:
    model, way = draw_model(random, most_statements=5), draw_way(random)
    note(f"{model.source}\n{way}")
    finding = check(model, way)
    assert not finding.is_fault, finding
