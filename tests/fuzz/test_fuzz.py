"""Readers raise typed errors for mutated files, and for all files that have failed once."""

from __future__ import annotations

import random

import pytest
from tests.fuzz.mutations import mutated
from tests.fuzz.readers import READERS
from tests.fuzz.run import check, seeds

MUTANTS = 150


@pytest.mark.parametrize("name", list(READERS))
def test_examples_are_read(name: str) -> None:
    assert all(check(name, data) for data in READERS[name].examples())


@pytest.mark.parametrize("name", list(READERS))
def test_mutants_and_seeds(name: str) -> None:
    files = READERS[name].examples()
    chance = random.Random(name)
    for data in seeds(name):
        check(name, data)
    for _ in range(MUTANTS):
        check(name, mutated(chance.choice(files), files, READERS[name].words, chance))
