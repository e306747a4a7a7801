"""Checks a few random models with `tests/random_model_check.py`. `make soak` checks many more."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.random_model_check import Flow, Outcome, check, check_seed, draw_flow
from tests.random_models import draw_model, model_of_table
from tests.random_statements import TABLE, Table

SEEDS = range(150)
SEEDS_OF_A_TEST = 15
ENTRIES_OF_A_TEST = 16


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(SEEDS), SEEDS_OF_A_TEST))
def test_a_random_model_is_refused_with_a_typed_error_or_runs(first: int) -> None:
    found = {seed: check_seed(seed)[2] for seed in SEEDS[first : first + SEEDS_OF_A_TEST]}
    faults = [f"{seed}: {finding}" for seed, finding in found.items() if finding.is_fault]
    assert not faults, "python -m tests.soak --seed N shows the model\n" + "\n".join(faults)
    refused = sum(finding.outcome is Outcome.REFUSED for finding in found.values())
    assert refused <= SEEDS_OF_A_TEST // 2, "most models are refused: this test shows little"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(TABLE), ENTRIES_OF_A_TEST))
def test_each_entry_of_the_table_of_statements_runs(first: int) -> None:
    """Entries run in one of the two flows in turn, because passes, observers and lowerings of both are the same.

    Recurrent entries run in both flows: `convert_pt2e` recovers recurrent networks, and `recover=None` does not.
    """
    faults = []
    for place, text in enumerate(TABLE[first : first + ENTRIES_OF_A_TEST]):
        model = model_of_table(text)
        assert model is not None, f"no shape of an input suits {text}"
        for documented in (False, True) if _is_recurrent(text) else (place % 2 == 1,):
            flow = Flow(documented, strict=False, recover=None, channels_last=False, scattered=False)
            finding = check(model, flow)
            if finding.is_fault:
                faults.append(f"{text}, {flow}: {finding}")
    assert not faults, "\n".join(faults)


def _is_recurrent(entry: Table) -> bool:
    return any(name in str(entry) for name in ("nn.LSTM", "nn.GRU", "nn.RNN"))


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), statements=st.integers(3, 30))
def test_models_of_any_seed_and_size(seed: int, statements: int) -> None:
    random = Random(seed)
    model = draw_model(random, most_statements=statements)
    finding = check(model, draw_flow(random))
    assert not finding.is_fault, f"{model.source}\n{finding}"
