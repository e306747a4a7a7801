"""The error stream without LiteRT's notices."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from openneutron.runtime.notices import without_notices


def test_only_the_notice_is_removed(capfd: pytest.CaptureFixture[str]) -> None:
    with without_notices():
        os.write(2, b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\nERROR: kept\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "ERROR: kept\nafter\n"


def test_text_is_kept_if_the_block_fails(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with without_notices():
            os.write(2, b"kept\n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert capfd.readouterr().err == "kept\n"


@pytest.mark.slow
def test_a_program_runs_without_a_notice() -> None:
    code = (
        "import torch, openneutron\n"
        "x = [torch.randn(1, 4) for _ in range(2)]\n"
        "program = openneutron.lower(openneutron.quantize(torch.nn.Linear(4, 4).eval(), (x[0],), x, recover=None))\n"
        "program.run(x[0])\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "XNNPACK" not in done.stderr
