"""The whole way from a float model to a program and its report.

The names are imported on their first use, because verbs that only read the files of a build need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openneutron.workflow.building import Build, build
    from openneutron.workflow.from_settings import build_from_settings
    from openneutron.workflow.trying import try_changes

__all__ = ["Build", "build", "build_from_settings", "try_changes"]

_HOMES = {
    "Build": "building",
    "build": "building",
    "build_from_settings": "from_settings",
    "try_changes": "trying",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
