"""Packages of whole networks, built and run on this machine (all of them: `python -m benchmarks.firmware`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.firmware import measure, measure_streaming
from benchmarks.zoo import ZOO
from benchmarks.zoo.streaming import STREAMING
from tests.firmware.test_host_build import pytestmark as needs_tools

pytestmark = [*needs_tools, pytest.mark.slow]


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_outputs_of_a_network_equal_the_host(name: str, tmp_path: Path) -> None:
    row = measure(ZOO[name], small=True, folder=tmp_path / "firmware")
    assert row.is_exact, row.message


@pytest.mark.parametrize("name", STREAMING)
def test_outputs_of_a_stream_equal_the_host(name: str, tmp_path: Path) -> None:
    row = measure_streaming(name, folder=tmp_path / "firmware")
    assert row.is_exact, row.message
