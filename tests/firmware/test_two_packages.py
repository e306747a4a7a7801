"""Two packages in one firmware: their names do not clash, and their arrays are aligned constants."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from tests.firmware.io_check import LINKER_SCRIPT, STARTUP
from tests.firmware.test_device_build import ARM
from tests.firmware.test_documented_code import STRICT
from tests.firmware_models import program

PACKAGES = {"kws": ("int8", "c"), "vision": ("two", "incbin")}
"""For each name of a package: the program, and the form of the array."""
SOURCES = ("kws/kws.c", "kws/test_vectors.c", "vision/vision.S", "vision/test_vectors.S")
APPLICATION = """
#include "kws.h"
#include "kws_config.h"
#include "kws_io.h"
#include "kws/test_vectors.h"
#include "vision.h"
#include "vision_config.h"
#include "vision_io.h"
#include "vision/test_vectors.h"

#include <stdio.h>

int main(void) {
  const uint8_t *const arrays[] = {kws_pte, vision_pte, kws_vectors, vision_vectors};
  int8_t codes[KWS_INPUT_0_ELEMENTS] = {0};
  float values[KWS_INPUT_0_ELEMENTS] = {0};
  int8_t images[VISION_INPUT_0_ELEMENTS];
  float pixels[VISION_INPUT_0_ELEMENTS] = {0};
  unsigned bad = 0;
  for (size_t i = 0; i < 4; ++i) {
    bad += (uintptr_t)arrays[i] % 16u != 0u ? 1u : 0u;
  }
  kws_quantize_input0(values, codes);
  vision_quantize_input0(pixels, images);
  bad += codes[0] != KWS_INPUT_0_ZERO_POINT ? 1u : 0u;
  bad += images[0] != VISION_INPUT_0_ZERO_POINT ? 1u : 0u;
  bad += kws_pte[4] != 'E' || vision_pte[4] != 'E' ? 1u : 0u;
  printf("%s %u\\n", bad == 0u ? "PASS" : "FAIL", bad);
  return (int)bad;
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages."""
    folder = tmp_path_factory.mktemp("firmware")
    for name, (model, array) in PACKAGES.items():
        program(model).package(folder / name, name=name, array=array)
    (folder / "app.c").write_text(APPLICATION)
    (folder / "start.c").write_text(STARTUP)
    (folder / "board.ld").write_text(LINKER_SCRIPT)
    return folder


def run(folder: Path, *command: str) -> str:
    if not command[0].startswith("./") and shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


INCLUDES = ("-I.", "-Ikws", "-Ivision")
PYTHON_LIBRARY = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("LDLIBRARY") or "missing")


@pytest.mark.parametrize(("compiler", "standard"), [("cc", "c11"), ("c++", "c++17")])
def test_they_link_on_a_host(compiler: str, standard: str, folder: Path) -> None:
    objects = tuple(source.replace("/", "_") + ".o" for source in SOURCES)
    for source, made in zip(SOURCES, objects, strict=True):
        run(folder, "cc", "-std=c11", *STRICT, *INCLUDES, "-c", source, "-o", made)
    language = ("-x", "c++", "app.c", "-x", "none") if compiler == "c++" else ("app.c",)
    run(folder, compiler, f"-std={standard}", *STRICT, *INCLUDES, *language, *objects, "-lm", "-o", standard)
    assert run(folder, f"./{standard}") == "PASS 0\n"


def test_they_link_for_cortex_m33(folder: Path) -> None:
    """Their symbols begin with their names, and their arrays are constants, which a linker puts into flash."""
    run(folder, "arm-none-eabi-gcc", "-std=c11", *STRICT, *ARM, *INCLUDES, "-O2", "-c", "app.c", "-o", "app.o")
    run(
        folder, "arm-none-eabi-gcc", "-std=c11", *ARM, *INCLUDES, "--specs=rdimon.specs", "-nostartfiles",
        "-T", "board.ld", "start.c", "app.o", *SOURCES, "-lm", "-o", "app.elf",
    )  # fmt: skip
    for source in SOURCES:
        run(folder, "arm-none-eabi-gcc", "-std=c11", *ARM, *INCLUDES, "-c", source, "-o", "one.o")
        kinds = {line.split()[-1]: line.split()[-2] for line in run(folder, "arm-none-eabi-nm", "one.o").splitlines()}
        symbols = {name: kind for name, kind in kinds.items() if not name.startswith("$")}
        assert set(symbols.values()) == {"R"}
        assert all(name.startswith(f"{source.partition('/')[0]}_") for name in symbols)
    machine = ("-M", "mps2-an505", "-nographic", "-semihosting-config", "enable=on,target=native")
    assert "PASS 0" in run(folder, "qemu-system-arm", *machine, "-kernel", "app.elf")


@pytest.mark.parametrize("name", PACKAGES)
def test_main_compiles_without_warnings(name: str, folder: Path) -> None:
    spec = importlib.util.find_spec("executorch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    headers = f"{spec.submodule_search_locations[0]}/include"
    includes = ("-isystem", headers, "-isystem", f"{headers}/executorch/runtime/core/portable_type/c10")
    for defined in ((), (f"-D{name.upper()}_PRINT_PROFILE=1", "-DET_EVENT_TRACER_ENABLED")):
        run(
            folder, "c++", "-std=c++17", *STRICT, "-fsyntax-only", "-DC10_USING_CUSTOM_GENERATED_MACROS",
            "-DOPENNEUTRON_HOST", *defined, *includes, f"-I{name}", f"{name}/main.cpp",
        )  # fmt: skip


def test_both_programs_run_in_turn_with_one_temporary_pool(tmp_path: Path) -> None:
    """The NPU computes the program "int8" (in LiteRT, on this host), and the CPU the program "cpu"."""
    if shutil.which("cmake") is None or not PYTHON_LIBRARY.exists():
        pytest.skip("needs cmake and Python's library")
    for name, model in (("kws", "int8"), ("vision", "cpu")):
        program(model).package(tmp_path / name, name=name, array="c")
    sources = "kws/kws.c kws/test_vectors.c kws/host_backend.cpp vision/vision.c vision/test_vectors.c"
    text = (tmp_path / "kws" / "CMakeLists.txt").read_text().replace("include(python.cmake", "include(kws/python.cmake")
    application = f'"{Path(__file__).with_name("two_programs.cpp")}" {sources}'
    (tmp_path / "CMakeLists.txt").write_text(
        text.replace("main.cpp host_backend.cpp kws.c test_vectors.c", application)
    )
    run(tmp_path, "cmake", "-B", "build", "-DCMAKE_BUILD_TYPE=Debug")
    run(tmp_path, "cmake", "--build", "build")
    assert run(tmp_path, "./build/kws_test") == "3 vectors, 0 different outputs\n"
