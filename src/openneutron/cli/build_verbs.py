"""Verbs from a model to a program: build, quantize, lower."""

from __future__ import annotations

__all__ = ["add_verbs"]


def add_verbs() -> None:
    """Adds the verbs of this module to the command line."""
