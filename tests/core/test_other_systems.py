"""Functions that only Linux has: macOS has no CPU affinity, Windows also has no process groups."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from openneutron.core import parallel
from openneutron.vendor import sdk


def test_without_affinity_all_cores_of_the_machine_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert parallel._cores() == os.cpu_count()


def test_a_converter_is_ended_without_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "killpg", raising=False)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    sdk._kill_process_group(child)
    assert child.poll() is not None
