"""Runs the native module under a sanitizer: `python -m tests.sanitize [address | thread]`, or `make sanitize`.

Builds `_host` with AddressSanitizer and UndefinedBehaviorSanitizer, or with ThreadSanitizer, into `out/sanitize`,
beside a copy of the package. Then it runs the tests that call the native module, and mutated programs for some seconds.
Needs cmake, ninja, and gcc with its sanitizers. The detection of leaks is off, because Python does not free everything
when it exits. Torch, ExecuTorch and LiteRT are not instrumented: their allocations are checked, their accesses are not.
ThreadSanitizer sees no race between two threads in these libraries. It also does not see the locks in them and in
glibc's loader, so it may report a race that a lock prevents. `SUPPRESSIONS` lists reports that have no cause in this
code. ThreadSanitizer needs the addresses of a process without randomization, hence `setarch`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer",
    "thread": "-fsanitize=thread -fno-omit-frame-pointer",
}
LIBRARIES = {"address": ("asan", "ubsan"), "thread": ("tsan",)}
NAMES = ("host_kernels", "memory", "runtime", "runtime_failures", "threads")
TESTS = {
    "address": (
        *(f"tests/runtime/test_{name}.py" for name in NAMES),
        # AddressSanitizer keeps freed memory for a while.
        "--deselect=tests/runtime/test_runtime.py::test_memory_of_dropped_programs_is_given_back",
        "--deselect=tests/runtime/test_threads.py::test_worker_processes[spawn]",  # the import of torch takes minutes
    ),
    # A process that multiprocessing spawns has randomized addresses. ThreadSanitizer ends pytest where it enables
    # faulthandler of Python.
    "thread": ("-p", "no:faulthandler", "tests/runtime/test_threads.py", "-k", "not fork and not spawn"),
}
SUPPRESSIONS = """\
# glibc frees the thread-local memory of a finished thread when another thread reuses its stack. The lock of its list of
# stacks orders the two, but is not instrumented.
race:_dl_deallocate_tls
"""
PREFIX = {"address": (), "thread": ("setarch", "--addr-no-randomize")}


def build(sanitizer: str, folder: Path) -> Path:
    """Builds the module. Returns the folder for PYTHONPATH."""
    flags = f"{FLAGS[sanitizer]} -O1 -g"
    options = [f"-DCMAKE_CXX_FLAGS={flags}", f"-DPython_EXECUTABLE={sys.executable}"]
    make: list[str | Path] = ["cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", *options]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder / "build"], check=True, stdout=subprocess.DEVNULL)
    package = folder / "package" / "openneutron"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "src" / "openneutron", package, ignore=shutil.ignore_patterns("_host*", "__pycache__"))
    (module,) = (folder / "build").glob("_host*")
    shutil.copy(module, package / "runtime")
    return package.parent


def environment(sanitizer: str, package: Path) -> dict[str, str]:
    """Returns the environment of a process that runs the module. Writes the file of suppressions beside `package`."""
    suppressions = package.with_name("suppressions.txt")
    suppressions.write_text(SUPPRESSIONS)
    names = [f"lib{name}.so" for name in (*LIBRARIES[sanitizer], "stdc++")]
    found = [
        subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        "PYTHONPATH": str(package),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:detect_container_overflow=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": f"halt_on_error=0:report_signal_unsafe=0:exitcode=66:suppressions={suppressions}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizer", nargs="?", choices=FLAGS, default="address")
    parser.add_argument("--seconds", type=int, default=30, help="for mutated programs")
    options = parser.parse_args()
    folder = ROOT / "out" / "sanitize" / options.sanitizer
    environ = environment(options.sanitizer, build(options.sanitizer, folder))
    tests = [
        *PREFIX[options.sanitizer],
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rf",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *TESTS[options.sanitizer],
    ]
    code = subprocess.run(tests, env=environ, cwd=ROOT, check=False).returncode
    if options.sanitizer == "address":
        mutants = [sys.executable, "-m", "tests.fuzz.programs", f"--seconds={options.seconds}"]
        code |= subprocess.run(mutants, env=environ, cwd=ROOT, check=False).returncode
    return code


if __name__ == "__main__":
    sys.exit(main())
