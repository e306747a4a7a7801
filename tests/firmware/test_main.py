"""The test program of a package, `main.cpp`: variants that the tests on the host do not build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge
from executorch.exir.passes import MemoryPlanningPass
from tests.firmware.test_documented_code import STRICT
from tests.firmware.test_profile_tracer import DEFINITIONS, POOLS, compiled
from tests.firmware_models import PROGRAMS, program
from tests.runtime.test_memory_sizes import preprocessed
from torch import nn

from openneutron.firmware import package

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs c++")
CHECK = (DEFINITIONS[0], "-fsyntax-only", "main.cpp")


def test_a_program_without_inputs_and_outputs_compiles(tmp_path: Path) -> None:
    folder = program("int8").package(tmp_path / "firmware", name="net").folder
    for file in ("net_config.h", "test_vectors.h", "main.cpp"):
        text = re.sub(r"NET_(IN|OUT)PUTS 1", r"NET_\1PUTS 0", (folder / file).read_text())
        text = re.sub(r"^  \{0, .*\n", "", text, flags=re.MULTILINE)
        (folder / file).write_text(text.replace("INPUTS + 1] = {nullptr}", "INPUTS + 1] = {}"))
    made = compiled(folder, *CHECK, *POOLS)
    assert made.returncode == 0, made.stderr


@pytest.mark.skipif(sys.maxsize < 2**32, reason="needs a 64-bit compiler")
def test_a_64_bit_board_needs_the_sizes_of_its_pools(tmp_path: Path) -> None:
    folder = program("int8").package(tmp_path / "firmware", name="net").folder
    for defined in ((), POOLS[:1], POOLS[1:]):
        made = compiled(folder, *CHECK, *defined)
        assert "Define NET_METHOD_POOL_BYTES and NET_TEMPORARY_POOL_BYTES" in made.stderr
    assert compiled(folder, *CHECK, *POOLS).returncode == 0


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_sources_have_no_warnings(name: str, tmp_path: Path) -> None:
    """Compiles the sources for a board and for this host. The compiler knows ExecuTorch's headers as system headers."""
    folder = program(name).package(tmp_path / "firmware", name="net", array="c").folder
    for options in (POOLS, (*POOLS, "-DOPENNEUTRON_HOST"), (*POOLS, "-DNET_PRINT_PROFILE=1", DEFINITIONS[1])):
        made = compiled(folder, *CHECK, *options)
        assert made.returncode == 0, made.stderr
    python = ("-isystem", sysconfig.get_path("include"), '-DOPENNEUTRON_PYTHON="python"')
    for others in (("-fsyntax-only", "host_backend.cpp", *python), ("-fsyntax-only", "-x", "c++", "net_io.h")):
        made = compiled(folder, *others)
        assert made.returncode == 0, made.stderr
    if shutil.which("cc") is not None:
        command = ["cc", "-std=c11", *STRICT, "-fsyntax-only", "net.c", "test_vectors.c"]
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr


ARM = ("arm-none-eabi-g++", "-mcpu=cortex-m33", "-mthumb", "-fno-exceptions", "-fno-rtti")


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_the_test_program_compiles_for_cortex_m33(name: str, tmp_path: Path) -> None:
    if shutil.which(ARM[0]) is None or preprocessed(list(ARM), "#include <optional>\n") is None:
        pytest.skip("needs arm-none-eabi-g++ with C++ headers (Debian: libstdc++-arm-none-eabi-newlib)")
    folder = program(name).package(tmp_path / "firmware", name="net", array="c").folder
    for options in ((), ("-DNET_PRINT_PROFILE=1", DEFINITIONS[1]), ("-DNET_PRINT_OUTPUTS=0",)):
        made = compiled(folder, *CHECK, *options, compiler=ARM)
        assert made.returncode == 0, made.stderr


def test_inputs_without_planned_memory_are_copied_from_the_vectors(tmp_path: Path) -> None:
    exported = torch.export.export(nn.Linear(4, 4).eval(), (torch.randn(1, 4),))
    planning = MemoryPlanningPass(alloc_graph_input=False)
    config = ExecutorchBackendConfig(memory_planning_pass=planning)
    data = bytes(to_edge(exported).to_executorch(config).buffer)
    folder = package(data, tmp_path / "firmware", name="net").folder
    text = (folder / "main.cpp").read_text()
    assert "POOL input_0[NET_INPUT_0_BYTES];\n" in text
    assert "input_memory[NET_INPUTS + 1] = {input_0};" in text
    made = compiled(folder, *CHECK, *POOLS)
    assert made.returncode == 0, made.stderr
