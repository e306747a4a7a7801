"""ExecuTorch's own runner verifies the bundled programs of packages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.extension.pybindings import _C
from tests.firmware_models import program

from openneutron.firmware.ports import input_ports, output_ports
from openneutron.firmware.vectors import computed_vectors
from openneutron.formats import pte
from openneutron.runtime import HostProgram
from openneutron.runtime.native import native_module

VECTORS = 3


@pytest.fixture(autouse=True)
def _host_delegate() -> None:
    native_module()  # registers the delegate with ExecuTorch's runtime


def verify(runner: Any, vector: int) -> list[torch.Tensor]:
    """Runs and verifies a vector. The tolerances are zero, because the same machine computed the expected outputs."""
    found: list[torch.Tensor] = runner.verify_result_with_bundled_expected_output("forward", vector, rtol=0.0, atol=0.0)
    return found


@pytest.mark.parametrize("name", ["int8", "floats", "segmentation", "two", "stream", "delegates", "indices", "cpu"])
def test_executorch_verifies_all_vectors(name: str, tmp_path: Path) -> None:
    written = program(name).package(tmp_path / "firmware", name=name, vectors=VECTORS).folder
    runner = _C._load_bundled_program_from_buffer((written / f"{name}.bpte").read_bytes())
    for vector in range(VECTORS):
        assert len(verify(runner, vector)) == len(program(name).outputs)


@pytest.mark.parametrize("output", [0, 1])
def test_executorch_finds_one_changed_element_of_an_output(output: int) -> None:
    data = program("two").buffer
    host, method = HostProgram(data), pte.read(data).methods[0]
    vectors = computed_vectors(host, None, VECTORS)
    rows = [[value.clone() for value in row] for row in vectors.outputs]
    rows[1][output].reshape(-1)[-1] ^= 1  # one LSB
    changed = dataclasses.replace(vectors, outputs=tuple(map(tuple, rows)))
    bundled = changed.bundle(data, "forward", input_ports(host, method), output_ports(host, method))
    assert bundled is not None
    runner = _C._load_bundled_program_from_buffer(bundled)
    verify(runner, 0)
    with pytest.raises(RuntimeError, match="verification failed"):
        verify(runner, 1)
    verify(runner, 2)
