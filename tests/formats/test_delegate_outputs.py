"""Delegates that would write to constants of the program are refused: by the loader, and by the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.firmware_models import program

from openneutron.errors import FormatError, HostError
from openneutron.firmware import package
from openneutron.formats import pte
from openneutron.formats.delegate_outputs import check_delegate_outputs
from openneutron.runtime import HostProgram


def method_with_constant_output() -> tuple[pte.Program, pte.Method]:
    """Returns a program whose delegate has a constant of the program as its output."""
    read = pte.read(program("constants").buffer)
    method = read.methods[0]
    constant = method.output_numbers[1]
    assert method.slots[constant].has_data
    assert not method.slots[constant].is_planned
    calls = tuple(replace(call, numbers=(*call.numbers[:-1], constant)) for call in method.delegates)
    return read, replace(method, delegates=calls)


def test_a_constant_output_is_named() -> None:
    read, wrong = method_with_constant_output()
    check_delegate_outputs(read.methods[0], "net.pte")
    with pytest.raises(FormatError, match=r"net.pte: output 0 of delegate 0 is a constant of the program"):
        check_delegate_outputs(wrong, "net.pte")


def test_an_output_that_is_not_a_tensor_is_named() -> None:
    method = pte.read(program("constants").buffer).methods[0]
    number = method.output_numbers[2]
    calls = tuple(replace(call, numbers=(*call.numbers[:-1], number)) for call in method.delegates)
    with pytest.raises(FormatError, match=r"output 0 of delegate 0 is not a tensor"):
        check_delegate_outputs(replace(method, delegates=calls), "net.pte")


def test_a_state_is_a_valid_output() -> None:
    check_delegate_outputs(pte.read(program("stream").buffer).methods[0], "net.pte")


def test_loading_and_packaging_refuse_constant_outputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read, wrong = method_with_constant_output()
    changed = replace(read, methods=(wrong, *read.methods[1:]))
    data = program("constants").buffer
    monkeypatch.setattr(pte, "read", lambda *_: changed)
    with pytest.raises(HostError, match=r"the program cannot be loaded: .* is a constant of the program"):
        HostProgram(data)
    with pytest.raises(FormatError, match="is a constant of the program"):
        package(data, tmp_path / "firmware")
    assert not list(tmp_path.iterdir())
