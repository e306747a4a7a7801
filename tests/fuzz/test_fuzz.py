"""Readers raise typed errors for mutated files, and for all files that have failed once."""

from __future__ import annotations

import random
import re

import pytest
from tests.fuzz.readers import READERS
from tests.fuzz.run import check, seeds

from openneutron.model.arguments import leaves_from_text


@pytest.mark.parametrize("name", list(READERS))
def test_examples_are_read(name: str) -> None:
    assert all(check(name, data) for data in READERS[name].examples())


@pytest.mark.parametrize("name", list(READERS))
def test_mutants_and_seeds(name: str) -> None:
    files = READERS[name].examples()
    chance = random.Random(name)
    for data in seeds(name):
        check(name, data)
    for _ in range(READERS[name].mutants):
        check(name, READERS[name].mutant(files, chance))


@pytest.mark.parametrize("number", [b"1" + 400 * b"0", b"-1e400", b"NaN", b"1" + 5000 * b"0"])
def test_numbers_of_a_summary_that_no_float_has(number: bytes) -> None:
    (summary,) = READERS["summary"].examples()
    changed = re.sub(rb'(?<=": )\d+\.\d+', number, summary, count=1)
    assert changed != summary
    assert not check("summary", changed)


@pytest.mark.parametrize("text", [b"[[[], true, null]]", b'[[[["x"]], true, null]]', 5000 * b"["])
def test_texts_that_are_not_paths_of_inputs(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"no list of inputs|not enough values"):
        leaves_from_text(text.decode())
