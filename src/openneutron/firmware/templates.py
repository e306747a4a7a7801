"""Fills the templates of the files of a package."""

from __future__ import annotations

import re
from importlib import resources

__all__ = ["filled"]

_PLACE = re.compile(r"@(\w+)@")


def filled(template: str, **values: object) -> str:
    """Returns the text of a file in `templates/`, with each @name@ replaced by the value of that name.

    Raises `KeyError` if `values` lacks one of these names.
    """
    text = resources.files("openneutron.firmware").joinpath("templates", template).read_text(encoding="utf-8")
    return _PLACE.sub(lambda found: str(values[found[1]]), text)
