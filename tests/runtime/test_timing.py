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


def test_the_median_of_some_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 3)
    program = lower(quantize(seeded(lambda: nn.Linear(3, 2)).eval(), (x,), [x], progress=False))
    loaded = HostProgram(program.portable, leaves=program.leaves)
    runs: list[Any] = []
    run = loaded.run

    def counted(*args: Any, **named: Any) -> Any:
        runs.append((args, named))
        return run(*args, **named)

    monkeypatch.setattr(loaded, "run", counted)
    assert 0 < time_on_host(loaded, (x,), repeat=3) < 1
    assert len(runs) == 4
    assert time_on_host(loaded, {"input": x}, repeat=1) > 0
    assert runs[-1] == ((), {"input": x})
    for repeat in (0, 1.5, True):
        with pytest.raises(OptionError, match="repeat must be a positive number of runs"):
            time_on_host(loaded, (x,), repeat)  # type: ignore[arg-type]
