"""Names of options that a function takes as keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable

from openneutron.core.messages import did_you_mean
from openneutron.errors import OptionError

__all__ = ["check_option_names"]


def check_option_names(function: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raises `OptionError` for the first of `options` that is not in `known`. The message lists the known options."""
    names = sorted(known)
    for option in options:
        if option not in names:
            hint = did_you_mean(option.lower(), names)
            raise OptionError(f"{function}() has no option '{option}'.{hint} Options: {', '.join(names)}.")
