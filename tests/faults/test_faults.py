"""Each writer with a fault at each of its file operations (`python -m tests.faults.walk` walks with all errnos)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

WHOLE = ("NeutronProgram.save", "QuantizedModel.save", "dumps of a driver")
"""The writers whose operations all fail in a test."""
LONG = ("compile_program, cache", "write_build")
"""Some of the writers that take long."""


def walked(*options: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "tests.faults.walk", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results: list[dict[str, object]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert results, done.stderr
    assert done.returncode == int(any(result["findings"] for result in results)), done.stderr
    return results


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="the faults need Linux and a C compiler")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--quick", "--errors", "1", "--kill", "--limit", "8"), id="quick"),
        pytest.param((*WHOLE, "--errors", "1"), id="whole", marks=pytest.mark.slow),
        pytest.param((*LONG, "--errors", "1", "--kill", "--limit", "2"), id="long", marks=pytest.mark.slow),
    ],
)
def test_no_fault_loses_a_file(options: tuple[str, ...]) -> None:
    results = walked(*options)
    assert [finding for result in results for finding in result["findings"]] == []  # type: ignore[attr-defined]
    assert all(result["faults"] for result in results)
    assert any(result["survived"] != result["faults"] for result in results)
