"""The time of a program on this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from torch import nn

from openneutron import lower, quantize
from openneutron.errors import OptionError
from openneutron.runtime import HostProgram, time_on_host
from openneutron.runtime.session import Session


def test_the_median_of_some_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 3)
    program = lower(quantize(seeded(lambda: nn.Linear(3, 2)).eval(), (x,), [x], progress=False))
    loaded = HostProgram(program.portable, leaves=program.leaves)
    call = Session.call
    runs: list[Any] = []

    def counted(session: Session, inputs: Any) -> Any:
        runs.append(inputs)
        return call(session, inputs)

    monkeypatch.setattr(Session, "call", counted)
    assert 0 < time_on_host(loaded, (x,), repeat=3) < 1
    assert len(runs) == 4
    assert time_on_host(loaded, {"input": x}, repeat=1) > 0
    assert torch.equal(runs[-1][0], x)
    for repeat in (0, 1.5, True):
        with pytest.raises(OptionError, match="repeat must be a positive number of runs"):
            time_on_host(loaded, (x,), repeat)  # type: ignore[arg-type]


class NamedLikeParameters(nn.Module):
    """Has inputs with the names of parameters of the functions that measure."""

    def forward(self, repeat: torch.Tensor, inputs: torch.Tensor, program: torch.Tensor) -> torch.Tensor:
        return repeat + inputs + program


def test_inputs_with_names_of_parameters() -> None:
    x = torch.ones(1, 4)
    given = {"repeat": x, "inputs": x, "program": x}
    program = lower(quantize(NamedLikeParameters().eval(), given, [given], progress=False))
    loaded = HostProgram(program.portable, leaves=program.leaves)
    assert time_on_host(loaded, given, repeat=1) > 0
