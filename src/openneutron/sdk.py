"""The vendor's converter: what is installed, and its runs in processes of their own. The only module that knows it.

The converter ends the process that calls it when it meets an error, and prints what it has to say. So it runs in a
child (`python -m openneutron.sdk FOLDER`), which reads its request from a folder and leaves its answer there. Interface
and names of the vendor's packages are those of eiq_neutron_sdk 3.x and of the flavoured neutron_converter_SDK_YY_MM.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openneutron.errors import ConverterError, OptionError
from openneutron.files import write_file

__all__ = ["Conversion", "Converted", "Converter", "choose", "convert", "convert_all", "installed"]

PACKAGE = "eiq_neutron_sdk"
DISTRIBUTION = "eiq-neutron-sdk"
FLAVOR_PREFIX = "neutron_converter_"
TIME_LIMIT_SECONDS = 600.0
CACHE_VARIABLE = "OPENNEUTRON_CACHE"
LONGEST_LOG = 4000  # characters of the converter's output in an error; the end says what went wrong
# What ExecuTorch's own backend asks of the converter for every model.
DEFAULT_FLAGS: Mapping[str, Any] = {
    "minNumOpsPerGraph": 1,
    "excludeGraphPasses": "HoistSliceAboveTranspose,MergeTranspose",
}
KERNEL_SELECTION = "_kernel_selection.c"

OOM_SCORE = Path("/proc/self/oom_score_adj")

_REQUEST, _MODEL, _RESULT, _ANSWER = "request.json", "model.tflite", "converted.tflite", "answer.json"


@dataclass(frozen=True)
class Converter:
    """An installed converter."""

    module: str
    """What Python imports."""
    version: str
    """Of the distribution; "unknown" where it has no metadata."""

    @property
    def flavor(self) -> str:
        """The name under which `neutron_converter_flavor` means it: "SDK_25_06", or the version of eiq-neutron-sdk."""
        return self.version if self.module == PACKAGE else self.module.removeprefix(FLAVOR_PREFIX)

    def __str__(self) -> str:
        return f"{self.module} {self.version}"


@dataclass(frozen=True)
class Conversion:
    """What a run of the converter is asked for: a TFLite model, a target, and fields of its `compilationOpts`."""

    tflite: bytes
    target: str
    flags: Mapping[str, Any]
    name: str = "the model"
    """What errors call it."""


@dataclass(frozen=True)
class Converted:
    """What the converter gave back."""

    tflite: bytes
    log: str
    """All that it printed."""
    kernel_selection: str | None
    """The C source that `dumpKernelSelectionCode` asks for."""


def installed() -> tuple[Converter, ...]:
    """The converters that this Python can import, the newer package first. None is imported to find out."""
    names = [name for _, name, _ in pkgutil.iter_modules() if name == PACKAGE or name.startswith(FLAVOR_PREFIX)]
    flavored = sorted((name for name in names if name != PACKAGE), reverse=True)
    return tuple(Converter(name, _version(name)) for name in [PACKAGE] * (PACKAGE in names) + flavored)


def _version(module: str) -> str:
    candidates = importlib.metadata.packages_distributions().get(module, [])
    return importlib.metadata.version(candidates[0]) if candidates else "unknown"


def choose(flavor: str | None, found: Sequence[Converter] | None = None) -> Converter:
    """The converter for `neutron_converter_flavor`; without one, eiq_neutron_sdk, or the only one there is.

    Raises `ConverterError`, listing what is installed, where none fits.
    """
    found = installed() if found is None else found
    fits = [converter for converter in found if flavor in (converter.flavor, converter.module)]
    if flavor is None:
        fits = [converter for converter in found if converter.module == PACKAGE] or list(found)
    if len(fits) == 1:
        return fits[0]
    there = ", ".join(map(str, found)) or "none"
    wanted = f"for neutron_converter_flavor='{flavor}'" if flavor else "of a single flavour, or eiq_neutron_sdk,"
    raise ConverterError(
        f"There is no converter {wanted} in this Python; installed: {there}. Microcode must match the firmware's SDK "
        "release, so no other is taken. A portable program needs none: keep it, and run `openneutron compile` on a "
        "machine that has the converter."
    )


def convert(
    request: Conversion, converter: Converter, *, time_limit: float = TIME_LIMIT_SECONDS, cache: Path | None = None
) -> Converted:
    """Run the converter on one model in a process of its own, or answer from `cache`.

    `time_limit` counts in seconds. Raises `ConverterError` with what the converter printed where it crashes, hangs,
    runs out of memory, or yields nothing.
    """
    kept = None if cache is None else cache / _key(request, converter)
    if kept is not None and (kept / _ANSWER).exists():
        return _load(kept, request)
    with tempfile.TemporaryDirectory(prefix="openneutron-") as folder:
        work = Path(folder)
        (work / _MODEL).write_bytes(request.tflite)
        asked = {"module": converter.module, "target": request.target, "flags": dict(request.flags)}
        (work / _REQUEST).write_text(json.dumps(asked))
        log = _run(work, request, converter, time_limit)
        converted = _take(work, request, converter, log)
    if kept is not None:
        _keep(kept, converted)
    return converted


def convert_all(
    requests: Sequence[Conversion],
    converter: Converter,
    *,
    time_limit: float = TIME_LIMIT_SECONDS,
    cache: Path | None = None,
) -> tuple[Converted, ...]:
    """`convert` for each model, side by side on the machine's processors. The first error is raised when all ended."""
    with ThreadPoolExecutor(max_workers=max(1, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(convert, request, converter, time_limit=time_limit, cache=cache) for request in requests]
    return tuple(future.result() for future in futures)


def default_cache() -> Path | None:
    """The folder of earlier results: `OPENNEUTRON_CACHE` (empty: none), else one under the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openneutron"


def _run(work: Path, request: Conversion, converter: Converter, time_limit: float) -> str:
    """All that the child printed. Raises `ConverterError` where it did not end well."""
    with (work / "log").open("w+b") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "openneutron.sdk", str(work)],
            cwd=work,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(time_limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
        log.seek(0)
        printed = log.read().decode(errors="backslashreplace")
    if code is None:
        raise _failed(request, converter, f"did not end within {time_limit:g} s", printed)
    if code < 0:
        memory = "; so ends a process that takes too much memory" if code == -signal.SIGKILL else ""
        raise _failed(request, converter, f"was ended by signal {-code}{memory}", printed)
    if code:
        raise _failed(request, converter, f"ended with exit code {code}", printed)
    return printed


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and all that it started; they are a session of their own."""
    with contextlib.suppress(ProcessLookupError):  # all of them ended by themselves
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _take(work: Path, request: Conversion, converter: Converter, log: str) -> Converted:
    answer, result = work / _ANSWER, work / _RESULT
    if not answer.exists():
        raise _failed(request, converter, "ended without an answer", log)
    told = json.loads(answer.read_text())
    if "error" in told:
        raise _failed(request, converter, told["error"], log)
    if not result.exists() or not result.stat().st_size:
        raise _failed(request, converter, "gave back no model", log)
    selection = work / KERNEL_SELECTION
    return Converted(result.read_bytes(), log, selection.read_text(errors="replace") if selection.exists() else None)


def _failed(request: Conversion, converter: Converter, how: str, log: str) -> ConverterError:
    printed = log.strip()[-LONGEST_LOG:] or "nothing"
    return ConverterError(
        f"The converter {converter} {how} on {request.name} for {request.target}. It printed:\n{printed}"
    )


def _key(request: Conversion, converter: Converter) -> str:
    parts = (str(converter), request.target, json.dumps(dict(request.flags), sort_keys=True))
    digest = hashlib.sha256("\0".join(parts).encode())
    digest.update(b"\0" + request.tflite)
    return digest.hexdigest()


def _keep(folder: Path, converted: Converted) -> None:
    """The answer is written last: without it, what else is there does not count."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / _RESULT, converted.tflite)
    told = {
        "log": converted.log,
        "kernel_selection": converted.kernel_selection,
        "sha256": hashlib.sha256(converted.tflite).hexdigest(),
    }
    write_file(folder / _ANSWER, json.dumps(told).encode())


def _load(folder: Path, request: Conversion) -> Converted:
    told = json.loads((folder / _ANSWER).read_text())
    tflite = (folder / _RESULT).read_bytes()
    if hashlib.sha256(tflite).hexdigest() != told["sha256"]:
        raise ConverterError(
            f"The cached conversion of {request.name} in '{folder}' is damaged. Delete that folder and try again."
        )
    return Converted(tflite, told["log"], told["kernel_selection"])


def _serve(folder: Path) -> None:
    """The child: convert what the folder asks for, and answer there."""
    if OOM_SCORE.exists():  # where memory runs out, Linux ends this process and not its parent
        OOM_SCORE.write_text("1000")
    asked = json.loads((folder / _REQUEST).read_text())
    try:
        answer = _convert_here(asked, (folder / _MODEL).read_bytes())
    except MemoryError:
        told = {"error": "ran out of memory"}
    except Exception as error:  # whatever the vendor's package raises is an answer
        told = {"error": f"raised {type(error).__name__}: {error}"}
    else:
        (folder / _RESULT).write_bytes(answer)
        told = {}
    (folder / _ANSWER).write_text(json.dumps(told))


def _convert_here(asked: Mapping[str, Any], tflite: bytes) -> bytes:
    converter, library = _load_package(asked["module"])
    if library is not None and not library.isNeutronTarget(asked["target"]):
        known = ", ".join(target.name for target in library.getNeutronTargets())
        raise OptionError(f"'{asked['target']}' is no target of this converter; it has {known}.")
    context = converter.CompilationContext()
    context.targetOpts = converter.getNeutronTarget(asked["target"])
    for name, value in asked["flags"].items():
        if not hasattr(context.compilationOpts, name):
            fields = ", ".join(field for field in dir(context.compilationOpts) if not field.startswith("_"))
            raise OptionError(f"compilationOpts of this converter has no '{name}'; it has {fields}.")
        setattr(context.compilationOpts, name, value)
    return bytes(converter.convertModel(list(tflite), context))


def _load_package(module: str) -> tuple[Any, Any]:
    """The package's converter, and its library of targets where it has one."""
    package = PACKAGE if module == PACKAGE else module
    converter = importlib.import_module(f"{package}.neutron_converter")
    name = f"{package}.neutron_library_utils"
    return converter, importlib.import_module(name) if importlib.util.find_spec(name) else None


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
