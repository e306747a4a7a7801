"""Parts of error messages."""

from __future__ import annotations

import pytest

from openneutron.core.messages import as_sentence


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("Save it with numpy.savez", "Save it with numpy.savez."),
        ("Save it.", "Save it."),
        ("Is it 'x'?\n", "Is it 'x'?"),
        (ValueError("no number"), "no number."),
    ],
)
def test_a_sentence_ends_with_a_mark(message: object, sentence: str) -> None:
    assert as_sentence(message) == sentence
