"""The event tracer of a package prints what `openneutron profile` reads."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import executorch
import pytest
from tests.firmware_models import program

from openneutron.profiling.recorded import DelegateTimes
from openneutron.profiling.records import profile_of_log

ROOT = Path(executorch.__path__[0])
INCLUDES = (
    "-isystem",
    str(ROOT / "include"),
    "-isystem",
    str(ROOT / "include/executorch/runtime/core/portable_type/c10"),
)
DEFINITIONS = ("-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED")
POOLS = ("-DNET_METHOD_POOL_BYTES=4096u", "-DNET_TEMPORARY_POOL_BYTES=4096u")
WARNINGS = (
    "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wsign-conversion", "-Wshadow", "-Wcast-align", "-Wcast-qual",
    "-Wundef", "-Wdouble-promotion", "-Wold-style-cast", "-Wformat=2", "-Werror",
)  # fmt: skip
"""Warnings that projects of firmware often turn on."""

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs c++")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "firmware"
    return program("delegates").package(folder, name="net").folder


def compiled(folder: Path, *arguments: str, compiler: Sequence[str] = ("c++",)) -> subprocess.CompletedProcess[str]:
    command = [*compiler, "-std=c++17", *INCLUDES, *WARNINGS, "-I", str(folder), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def test_profiles_of_delegates_are_printed_and_read_back(package: Path, tmp_path: Path) -> None:
    libraries = (f"-L{ROOT / 'lib'}", "-lexecutorch", f"-Wl,-rpath,{ROOT / 'lib'}")
    source = str(Path(__file__).with_name("profile_check.cpp"))
    made = compiled(package, *DEFINITIONS, source, *libraries, "-o", str(tmp_path / "check"))
    assert made.returncode == 0, made.stderr
    text = subprocess.run([tmp_path / "check"], capture_output=True, text=True, check=True).stdout
    profile = profile_of_log(text, "the log")
    assert profile is not None
    assert profile.delegates == (
        DelegateTimes(((100, 101, 102), (20000, 20000, 20000)), (7, 7, 7)),
        DelegateTimes(((70000, 70000, 70000),), (8, 8, 8)),
    )


@pytest.mark.parametrize("prints", ["0", "1"])
def test_main_compiles_with_and_without_profiles(package: Path, prints: str) -> None:
    made = compiled(package, *DEFINITIONS, *POOLS, f"-DNET_PRINT_PROFILE={prints}", "-fsyntax-only", "main.cpp")
    assert made.returncode == 0, made.stderr


def test_profiles_without_executorchs_event_tracer_are_refused(package: Path) -> None:
    made = compiled(package, DEFINITIONS[0], *POOLS, "-DNET_PRINT_PROFILE=1", "-fsyntax-only", "main.cpp")
    assert made.returncode != 0
    assert "Profiles need ET_EVENT_TRACER_ENABLED" in made.stderr
