"""Cures for the messages that do not say what to do.

Most messages name the remedy in a sentence that starts with a verb ("Give ...", "Call ..."). For all others,
`cures.toml` has the remedy. `tests/docs/test_site.py` checks that each message has one.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from docs.generators.messages import Message

__all__ = ["RULES", "Rule", "cure_of", "says_its_cure"]

VERBS = (
    "Build", "Call", "Check", "Choose", "Compare", "Compile", "Compute", "Convert", "Delete", "Draw", "Export", "Free",
    "Give",
    "Import", "Increase", "Install", "Keep", "Leave", "Load", "Lower", "Make", "Mask", "Near matches", "Options",
    "Otherwise", "Put", "Quantize", "Reduce", "Register", "Remove", "Reset", "Return", "Run", "Save", "Scale", "Set",
    "Split", "Train", "Transpose", "Unroll", "Use", "Write", "pip install",
    "Did you mean",
)  # fmt: skip
"""Words that start a sentence or clause about what to do."""
_SAYS_CURE = re.compile(
    rf"(?:^|[.;:?)›\n] ?|, or |\bor )(?:{'|'.join(VERBS)}|{'|'.join(verb.lower() for verb in VERBS)})\b"
)


@dataclass(frozen=True)
class Rule:
    """The cure of all messages that match `pattern`, a regular expression of "module: message"."""

    pattern: str
    cure: str


RULES = tuple(Rule(**rule) for rule in tomllib.loads(Path(__file__).with_name("cures.toml").read_text())["rule"])
"""The first rule that matches holds."""


def says_its_cure(message: Message) -> bool:
    """Whether the message itself, or a text that it may go on with, says what to do."""
    return _SAYS_CURE.search(message.whole) is not None


def cure_of(message: Message) -> str | None:
    """Returns the cure of a message that does not say it; None if no rule matches."""
    matched = (rule for rule in RULES if re.search(rule.pattern, f"{message.module}: {message.text}", re.IGNORECASE))
    found = next(matched, None)
    return None if found is None else found.cure
