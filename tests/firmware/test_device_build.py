"""The C files of a package, compiled for this machine and for Cortex-M33, and run here and in QEMU.

ExecuTorch's runtime is not built for Arm here, because its wheel has no sources.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tests.firmware.io_check import LINKER_SCRIPT, STARTUP, check_source
from tests.firmware_models import PROGRAMS, program

from openneutron.firmware.config import PoolSizes, config_header
from openneutron.firmware.io_functions import io_header
from openneutron.firmware.ports import Port

WARNINGS = (
    "-Wall", "-Wextra", "-Wconversion", "-Wsign-conversion", "-Wshadow", "-Wcast-align", "-Wcast-qual",
    "-Wundef", "-Wdouble-promotion", "-Wformat=2", "-Werror",
)  # fmt: skip
ARM = ("-mcpu=cortex-m33", "-mthumb", "-mfpu=fpv5-sp-d16", "-mfloat-abi=hard")
NAMES = sorted(set(PROGRAMS) - {"indices", "outputs", "delegates", "cpu", "arguments"})
"""Programs with functions that no other program has."""

needs_compilers = pytest.mark.skipif(not (shutil.which("cc") and shutil.which("c++")), reason="needs cc and c++")
needs_arm = pytest.mark.skipif(
    not (shutil.which("arm-none-eabi-gcc") and shutil.which("qemu-system-arm")),
    reason="needs arm-none-eabi-gcc and qemu-system-arm",
)


def made(name: str, folder: Path, array: str = "auto", section: str | None = None) -> None:
    """Writes the package and the check."""
    program(name).package(folder, name=name, array=array, section=section)
    source = check_source(program(name), name, (folder / "test_vectors.bin").read_bytes())
    (folder / "check.c").write_text(source)
    (folder / "check.cpp").write_text(source)


def run(folder: Path, *command: str) -> str:
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@needs_compilers
@pytest.mark.parametrize("name", NAMES)
def test_headers_on_the_host_equal_python(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "firmware"
    made(name, folder)
    arrays = (f"{name}.c", "test_vectors.c")
    run(folder, "cc", "-std=c11", *WARNINGS, "-pedantic", "-O1", "check.c", *arrays, "-lm", "-o", "c")
    assert run(folder, "./c").startswith("PASS")
    objects = tuple(Path(array).with_suffix(".o").name for array in arrays)
    run(folder, "cc", "-std=c11", *WARNINGS, "-c", *arrays)
    run(folder, "c++", "-std=c++17", *WARNINGS, "-O1", "check.cpp", *objects, "-lm", "-o", "cpp")
    assert run(folder, "./cpp").startswith("PASS")


@needs_compilers
def test_int32_scores_far_apart_have_a_softmax(tmp_path: Path) -> None:
    scores = Port("scores", "int32", (1, 2), (0, 1))
    codes = replace(scores, name="codes", scale=0.5, zero_point=0)
    texts = {
        "net_config.h": config_header("", "net", PoolSizes((), (0, 0), (0, 0)), (codes,), (scores,)),
        "net_io.h": io_header("", "net", (codes,), (scores,)),
        "check.c": """#include "net_io.h"
int main(void) {
  const int32_t scores[] = {INT32_MIN, INT32_MAX};
  float found[2];
  net_softmax_output0(scores, found);
  return found[0] == 0.0f && found[1] == 1.0f ? 0 : 1;
}
""",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert "quantize" not in texts["net_io.h"]
    run(tmp_path, "cc", "-std=c11", *WARNINGS, "-O1", "check.c", "-lm", "-o", "check")
    run(tmp_path, "./check")


@needs_arm
@pytest.mark.parametrize("array", ["c", "incbin"])
@pytest.mark.parametrize("name", NAMES)
def test_headers_on_cortex_m33_equal_python(name: str, array: str, tmp_path: Path) -> None:
    folder = tmp_path / "firmware"
    made(name, folder, array=array, section=".flash_model")
    (folder / "start.c").write_text(STARTUP)
    (folder / "board.ld").write_text(LINKER_SCRIPT)
    suffix = "c" if array == "c" else "S"
    run(
        folder, "arm-none-eabi-gcc", "-std=c11", *WARNINGS, *ARM, "-O2", "--specs=rdimon.specs", "-nostartfiles",
        "-T", "board.ld", "start.c", "check.c", f"{name}.{suffix}", f"test_vectors.{suffix}", "-lm", "-o", "check.elf",
    )  # fmt: skip
    text = run(
        folder, "qemu-system-arm", "-M", "mps2-an505", "-nographic", "-semihosting-config", "enable=on,target=native",
        "-kernel", "check.elf",
    )  # fmt: skip
    assert "PASS" in text
