"""Verbs of the command line in the process of a test."""

from __future__ import annotations

import sys

import pytest

from openneutron.cli import main

__all__ = ["call_verb"]


def call_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str]:
    """Runs `openneutron` with `arguments`. Returns the exit code and the output."""
    monkeypatch.setattr(sys, "argv", ["openneutron", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out + printed.err
