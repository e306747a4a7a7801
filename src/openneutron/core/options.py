"""Checks of options that a function takes as keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable

from openneutron.core.messages import did_you_mean
from openneutron.errors import OptionError

__all__ = ["MOST_JOBS", "check_option_names", "check_size_of_random"]

MOST_JOBS = 1024
"""The largest number of processes that share work."""
LARGEST_RANDOM_BYTES = 1 << 30
"""The largest size of all random inputs of a call."""


def check_option_names(function: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raises `OptionError` for the first of `options` that is not in `known`. The message lists the known options."""
    names = sorted(known)
    for option in options:
        if option not in names:
            hint = did_you_mean(option.lower(), names)
            raise OptionError(f"{function}() has no option '{option}'.{hint} Options: {', '.join(names)}.")


def check_size_of_random(count: int, bytes_each: int, what: str, most: int = LARGEST_RANDOM_BYTES) -> None:
    """Raises `OptionError` if `count` random values of `bytes_each` bytes need more than `most` bytes of memory.

    `what` names the values in the plural.
    """
    if count * bytes_each > most:
        raise OptionError(
            f"{count:,} {what} have {count * bytes_each:,} bytes, more than {most:,}. Give at most "
            f"{max(1, most // bytes_each):,}."
        )
