"""Damaged files do not end the process: mutants by seed, and files that were findings of `tests.mutants`."""

from __future__ import annotations

import os
import signal
import zlib
from pathlib import Path

import pytest
import torch
from tests import mutants
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
    assert not done.findings
    assert done.counts["interpret FormatError"] > 100


@pytest.mark.parametrize("seed", range(8))
def test_mutants_of_a_program(program: bytes, seed: int) -> None:
    done = run_batch("program.pte", program, seed, count=600)
    assert not done.findings
    assert done.counts["check FormatError"] > 300
    assert done.counts["run HostError"] > 30
    assert done.counts["run ok"] > 30
    assert {"mutants of bytes", "mutants of program", "mutants of payload"} <= set(done.counts)


@pytest.mark.parametrize("name", sorted(path.name for path in FINDINGS.iterdir()))
def test_files_that_were_findings(name: str) -> None:
    done = run_batch(name, (FINDINGS / name).read_bytes(), seed=0, count=1, mutated=False)
    assert not done.findings


def is_chosen(data: bytes, number: int) -> bool:
    return zlib.crc32(data) % 200 == number


def end_process(data: bytes, _: Path) -> None:
    if is_chosen(data, 1):
        os.kill(os.getpid(), signal.SIGKILL)


def accept(*_: object) -> None:
    pass


def fail(data: bytes, _: Path) -> None:
    if is_chosen(data, 2):
        raise ZeroDivisionError("by a mutant")


def test_mutants_after_one_that_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds each of them, keeps its bytes, and counts those after the last one."""
    monkeypatch.setitem(mutants.FAST, ".tflite", {"inspect": end_process, "interpret": fail})
    data = kind_models()["ABS.tflite"]
    done = run_batch("ABS.tflite", data, seed=0, count=2000, keep=tmp_path)
    kept = [zlib.crc32(path.read_bytes()) % 200 for path in tmp_path.iterdir()]
    assert set(kept) == {1, 2}
    assert len(done.findings) == len(kept)
    assert sum("SIGKILL" in finding for finding in done.findings) == kept.count(1)
    assert sum("ZeroDivisionError: by a mutant" in finding for finding in done.findings) == kept.count(2)
    last = max(int(finding.partition("mutant ")[2].partition(":")[0]) for finding in done.findings)
    tried = sum(count for name, count in done.counts.items() if name.startswith("mutants of"))
    assert tried >= 2000 - last - 1


def test_a_verb_that_accepts_what_the_check_refuses(program: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mutants.FAST, ".pte", {"run": accept})
    monkeypatch.setitem(mutants.SLOW, ".pte", {})
    done = run_batch("program.pte", program, seed=0, count=200)
    assert done.findings
    assert all("the check refuses this mutant" in finding for finding in done.findings)
