"""The generated documents in docs/ are current and complete."""

from pathlib import Path

from openneutron.ops import DECOMPOSED, SPECS
from openneutron.ops.document import document

DOCS = Path(__file__).parents[1] / "docs"


def test_operators_md_is_current() -> None:
    assert (DOCS / "operators.md").read_text() == document(), "run `make docs`"


def test_every_operator_and_every_limit_is_listed() -> None:
    text = document()
    for spec in SPECS:
        assert f"\n## {spec.name}\n" in text
        for limit in spec.constraints:
            assert limit.message
            assert f"\n- {limit.message}\n" in text
    for decomposed in DECOMPOSED:
        assert f"\n| {decomposed.name} | " in text
        assert all(limit.message in text for limit in decomposed.constraints)


def test_every_rule_for_the_output_is_in_words() -> None:
    for spec in SPECS:
        assert not callable(spec.output) or spec.output.__doc__
