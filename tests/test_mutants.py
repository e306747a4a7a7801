"""Damaged files do not end the process: mutants by seed, and files that were findings of `tests.mutants`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.mutants import kind_models, run_batch
from torch import nn

from openneutron import lower, quantize

FINDINGS = Path(__file__).parent / "findings"


@pytest.fixture(scope="module")
def program() -> bytes:
    torch.manual_seed(0)
    x = torch.rand(1, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    return lower(quantize(net.eval(), (x,), [(x,)])).buffer


# All rows together open 20,400 mutants, in about 50 seconds of processor time.
@pytest.mark.parametrize("name", kind_models())
def test_mutants_of_each_operator(name: str) -> None:
    done = run_batch(name, kind_models()[name], seed=0, count=400)
    assert not done.finding
    assert done.counts["interpret FormatError"] > 100


@pytest.mark.parametrize("seed", range(8))
def test_mutants_of_a_program(program: bytes, seed: int) -> None:
    done = run_batch("program.pte", program, seed, count=600)
    assert not done.finding
    assert done.counts["run HostError"] > 150


@pytest.mark.parametrize("name", sorted(path.name for path in FINDINGS.iterdir()))
def test_files_that_were_findings(name: str) -> None:
    done = run_batch(name, (FINDINGS / name).read_bytes(), seed=0, count=1, mutated=False)
    assert not done.finding
