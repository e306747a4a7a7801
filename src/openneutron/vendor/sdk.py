"""Finds the installed converters of the vendor and runs them in child processes. No other module imports them.

The converter prints its messages, and terminates the process on an error. It therefore runs in a child process
(`python -m openneutron.vendor.sdk FOLDER`), which reads a request from a folder and writes the answer there. The names
and interfaces of the vendor's packages are those of eiq_neutron_sdk 3.x and of the flavoured packages
neutron_converter_SDK_YY_MM.
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
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openneutron.core.files import created_folder, remove_folder, write_file
from openneutron.core.json_values import parsed_json
from openneutron.core.messages import as_sentence
from openneutron.errors import ConverterError, FormatError, OpenNeutronError, OptionError, OutputError
from openneutron.formats.kernel_selection import kernel_selection_in, kernel_selection_text

__all__ = [
    "Conversion", "Converted", "Converter", "ConverterWarning", "choose_converter", "convert", "convert_all",
    "converter_for", "default_cache", "installed", "merge_kernel_selections",
]  # fmt: skip

PACKAGE = "eiq_neutron_sdk"
FLAVOR_PREFIX = "neutron_converter_"
WHERE_IT_IS = (
    f"NXP publishes {PACKAGE}, and {FLAVOR_PREFIX}SDK_YY_MM for earlier releases, in a package index of its own (eIQ "
    'PyPI); the page "NXP eIQ Neutron Backend" of ExecuTorch\'s documentation has the command for pip.'
)
TIME_LIMIT_SECONDS = 600.0
CACHE_VARIABLE = "OPENNEUTRON_CACHE"
LONGEST_LOG = 4000  # characters of the converter's output in an error; the cause is at the end of the output
# ExecuTorch's own backend sets these flags for every model.
DEFAULT_FLAGS: Mapping[str, Any] = {
    "minNumOpsPerGraph": 1,
    "excludeGraphPasses": "HoistSliceAboveTranspose,MergeTranspose",
}
KERNEL_SELECTION = "_kernel_selection.c"

OOM_SCORE = Path("/proc/self/oom_score_adj")

_REQUEST, _MODEL, _RESULT, _ANSWER = "request.json", "model.tflite", "converted.tflite", "answer.json"
_MERGED = "merged.c"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class ConverterWarning(UserWarning):
    """No installed converter has the requested flavour, so payloads are portable; or a converter's log is unknown."""


@dataclass(frozen=True)
class Converter:
    """An installed converter."""

    module: str
    """Name of the Python package."""
    version: str
    """Version of the distribution; "unknown" if the distribution has no metadata."""

    @property
    def flavor(self) -> str:
        """Its value of `neutron_converter_flavor`: "SDK_25_06", or the version of eiq-neutron-sdk."""
        return self.version if self.module == PACKAGE else self.module.removeprefix(FLAVOR_PREFIX)

    def __str__(self) -> str:
        return f"{self.module} {self.version}"


@dataclass(frozen=True)
class Conversion:
    """A request to the converter: a TFLite model, a target, and fields of the converter's `compilationOpts`."""

    tflite: bytes
    target: str
    flags: Mapping[str, Any]
    name: str = "the model"
    """Name of the model in errors."""


@dataclass(frozen=True)
class Converted:
    """The results of the converter."""

    tflite: bytes
    log: str
    """The converter's output."""
    kernel_selection: str | None
    """C source of the kernel selection; None without `dumpKernelSelectionCode`."""


def installed() -> tuple[Converter, ...]:
    """Returns the converters that this Python can import, the newer package first. Imports none of them."""
    modules = pkgutil.iter_modules([folder for folder in sys.path if _may_hold_a_converter(folder)])
    names = [name for _, name, _ in modules if name == PACKAGE or name.startswith(FLAVOR_PREFIX)]
    flavored = sorted((name for name in names if name != PACKAGE), reverse=True)
    return tuple(Converter(name, _package_version(name)) for name in [PACKAGE] * (PACKAGE in names) + flavored)


def _may_hold_a_converter(folder: str) -> bool:
    """Whether an entry of `folder` has the name of a converter. `pkgutil` reads all packages there, which takes longer.

    Returns True if `folder` is not a folder, such as a zip file.
    """
    try:
        return any(name.startswith((PACKAGE, FLAVOR_PREFIX)) for name in os.listdir(folder or os.curdir))
    except OSError:
        return True


def _package_version(module: str) -> str:
    candidates = importlib.metadata.packages_distributions().get(module, [])
    return importlib.metadata.version(candidates[0]) if candidates else "unknown"


def choose_converter(flavor: str | None, found: Sequence[Converter] | None = None) -> Converter:
    """Returns the installed converter for `neutron_converter_flavor`. Without a flavour, this is eiq_neutron_sdk.

    Raises `ConverterError` if it is not installed. The message lists the installed converters.
    """
    found = installed() if found is None else found
    wanted = {PACKAGE} if flavor is None else {flavor}
    for converter in found:
        if wanted & {converter.flavor, converter.module}:
            return converter
    there = ", ".join(map(str, found)) or "none"
    missing = f"for neutron_converter_flavor='{flavor}'" if flavor else f"named {PACKAGE}, which runs without a flavour"
    raise ConverterError(
        f"This Python has no converter {missing} (installed: {there}). Microcode must match the firmware's SDK "
        f"release, so no other converter is used. {WHERE_IT_IS} A portable program needs no converter: save it, and "
        "run `openneutron compile` on a machine that has the converter."
    )


def converter_for(payload: str, flavor: str | None) -> Converter | None:
    """Returns the converter for the option `payload`; None for portable payloads.

    "portable" returns None. "device" raises `ConverterError` if no matching converter is installed. "auto" returns None
    in that case, with a `ConverterWarning` if converters of other flavours are installed.
    """
    if payload == "portable":
        return None
    found = installed()
    try:
        return choose_converter(flavor, found)
    except ConverterError as error:
        if payload == "device":
            raise
        if found:
            warnings.warn(f"The payloads stay portable. {error}", ConverterWarning, stacklevel=4)
        return None


def merge_kernel_selections(
    sources: Sequence[str], converter: Converter, *, time_limit: float = TIME_LIMIT_SECONDS
) -> str | None:
    """Merges C sources of kernel selections into one; returns None for no sources.

    The vendor's package merges sources that differ. Raises `ConverterError` if that fails.
    """
    different = list(dict.fromkeys(sources))
    if len(different) < 2:
        return different[0] if different else None
    what = f"the kernel selections of {len(different)} payloads"
    with _work_folder(what, converter) as work:
        names = [f"{number}{KERNEL_SELECTION}" for number in range(len(different))]
        for name, source in zip(names, different, strict=True):
            (work / name).write_text(source)
        (work / _REQUEST).write_text(json.dumps({"module": converter.module, "merge": names}))
        log = _run_child(work, what, converter, time_limit)
        _check_answer(work, what, converter, log)
        merged = _selection_in(work / _MERGED, what, converter, log)
        if merged is None:
            raise _converter_error(what, converter, "merged nothing", log)
        return merged


def convert(
    request: Conversion, converter: Converter, *, time_limit: float = TIME_LIMIT_SECONDS, cache: Path | None = None
) -> Converted:
    """Runs the converter on one model in a child process, or returns an earlier result from `cache`.

    `time_limit` is in seconds. Raises `ConverterError` with the converter's output if the converter crashes, exceeds
    the time limit, runs out of memory, or returns nothing.
    """
    kept = None if cache is None else cache / _cache_key(request, converter)
    earlier = None if kept is None else _read_cache(kept)
    if earlier is not None:
        return earlier
    what = f"{request.name} for {request.target}"
    with _work_folder(what, converter) as work:
        (work / _MODEL).write_bytes(request.tflite)
        asked = {"module": converter.module, "target": request.target, "flags": dict(request.flags)}
        (work / _REQUEST).write_text(json.dumps(asked))
        log = _run_child(work, what, converter, time_limit)
        _check_answer(work, what, converter, log)
        converted = _read_answer(work, what, converter, log)
    if kept is not None:
        _write_cache(kept, converted)
    return converted


def convert_all(
    requests: Sequence[Conversion],
    converter: Converter,
    *,
    time_limit: float = TIME_LIMIT_SECONDS,
    cache: Path | None = None,
) -> tuple[Converted, ...]:
    """Runs `convert` on each model, in parallel on all processors. Raises the first error after all runs ended."""
    with ThreadPoolExecutor(max_workers=max(1, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(convert, request, converter, time_limit=time_limit, cache=cache) for request in requests]
    return tuple(future.result() for future in futures)


def default_cache() -> Path | None:
    """Returns the folder of earlier results: `OPENNEUTRON_CACHE` if set, else a folder in the user's cache folder.

    Returns None if `OPENNEUTRON_CACHE` is empty.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    with contextlib.suppress(RuntimeError):  # a user without a home folder has no cache
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openneutron"
    return None


@contextmanager
def _work_folder(what: str, converter: Converter) -> Iterator[Path]:
    """Provides a temporary folder for the files of a child process, and removes it.

    Raises `ConverterError` if the system fails in the block: no space on the disk, too many open files or processes.
    """
    try:
        folder = tempfile.mkdtemp(prefix="openneutron-")
        try:
            yield Path(folder)
        finally:
            remove_folder(folder)
    except OpenNeutronError:
        raise
    except OSError as error:
        raise ConverterError(
            f"The converter {converter} cannot run on {what}: {error.strerror or error}. Its files are in "
            f"'{tempfile.gettempdir()}'; the environment variable TMPDIR names another folder. Free space there, or "
            "close files and processes."
        ) from error


def _run_child(work: Path, what: str, converter: Converter, time_limit: float) -> str:
    """Runs the child process and returns its output. Raises `ConverterError` if the process fails."""
    with (work / "log").open("w+b") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "openneutron.vendor.sdk", str(work)],
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
            _kill_process_group(child)
        log.seek(0)
        printed = log.read().decode(errors="backslashreplace")
    if code is None:
        raise _converter_error(what, converter, f"did not end within {time_limit:g} s", printed)
    if code < 0:
        memory = ", possibly because it used too much memory" if code == -signal.SIGKILL else ""
        raise _converter_error(what, converter, f"was ended by signal {-code}{memory}", printed)
    if code:
        raise _converter_error(what, converter, f"ended with exit code {code}", printed)
    return printed


def _kill_process_group(child: subprocess.Popen[bytes]) -> None:
    """Ends the child process and the processes that it started. These form a session of their own."""
    if not hasattr(os, "killpg"):  # Windows
        child.kill()
    else:
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _check_answer(work: Path, what: str, converter: Converter, log: str) -> None:
    answer = work / _ANSWER
    if not answer.exists():
        raise _converter_error(what, converter, "ended without an answer", log)
    told = json.loads(answer.read_text())
    if "error" in told:
        raise _converter_error(what, converter, told["error"], log)


def _read_answer(work: Path, what: str, converter: Converter, log: str) -> Converted:
    result = work / _RESULT
    if not result.exists() or not result.stat().st_size:
        raise _converter_error(what, converter, "returned no model", log)
    return Converted(result.read_bytes(), log, _selection_in(work / KERNEL_SELECTION, what, converter, log))


def _selection_in(path: Path, what: str, converter: Converter, log: str) -> str | None:
    """Returns the kernel selection in a file that the converter wrote; None if there is none."""
    try:
        return kernel_selection_in(path)
    except FormatError as error:
        raise _converter_error(what, converter, f"wrote a wrong kernel selection ({error})", log) from error


def _converter_error(what: str, converter: Converter, how: str, log: str) -> ConverterError:
    printed = log.strip()[-LONGEST_LOG:] or "nothing"
    return ConverterError(f"The converter {converter} {how} on {what}. It printed:\n{printed}")


def _cache_key(request: Conversion, converter: Converter) -> str:
    parts = (str(converter), request.target, json.dumps(dict(request.flags), sort_keys=True))
    digest = hashlib.sha256("\0".join(parts).encode())
    digest.update(b"\0" + request.tflite)
    return digest.hexdigest()


def _write_cache(folder: Path, converted: Converted) -> None:
    """Writes a result to the cache. Warns if that fails, because the result is complete without the cache.

    The name of the model's file is its hash, and the answer file, which comes last, names it. So a reader never sees
    the model of one process with the answer of another, and an entry without an answer file is not complete.
    """
    digest = hashlib.sha256(converted.tflite).hexdigest()
    told = {"log": converted.log, "kernel_selection": converted.kernel_selection, "sha256": digest}
    try:
        with created_folder(folder):
            write_file(folder / _cached_model(digest), converted.tflite)
            write_file(folder / _ANSWER, json.dumps(told).encode())
    except OutputError as error:
        warnings.warn(
            f"The result of the converter is not kept in the cache: {as_sentence(error)} Set {CACHE_VARIABLE} "
            "to another folder for the cache, or to an empty text to use none.",
            ConverterWarning,
            stacklevel=2,
        )


def _cached_model(digest: str) -> str:
    """Returns the name of a file in an entry. Raises `ValueError` for a text that is not a hash, such as a path."""
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"'{digest}' is not a hash of SHA-256. Delete the entry of the cache.")
    return f"{digest}.tflite"


def _read_cache(folder: Path) -> Converted | None:
    """Returns the result in an entry of the cache; None if there is no entry.

    If the entry is damaged or cannot be read, warns and returns None. The caller then runs the converter again.
    """
    try:
        told = parsed_json((folder / _ANSWER).read_bytes())
        if told["kernel_selection"] is not None:
            kernel_selection_text(told["kernel_selection"])
        tflite = (folder / _cached_model(told["sha256"])).read_bytes()
        converted = Converted(tflite, told["log"], told["kernel_selection"])
        if hashlib.sha256(tflite).hexdigest() == told["sha256"]:
            return converted
        reason = "it is damaged"
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError, FormatError):
        reason = "it is damaged"
    warnings.warn(
        f"The cached result of the converter in '{folder}' cannot be read: {reason}. The converter runs again. "
        f"Set {CACHE_VARIABLE} to another folder for the cache, or to an empty text to use none.",
        ConverterWarning,
        stacklevel=3,
    )
    return None


def _serve_request(folder: Path) -> None:
    """Runs in the child process: serves the request in `folder` and writes the answer there."""
    with contextlib.suppress(OSError):  # if memory runs out, Linux ends this process instead of its parent
        OOM_SCORE.write_text("1000")
    asked = json.loads((folder / _REQUEST).read_text())
    try:
        if "merge" in asked:
            _merge_here(asked)
        else:
            (folder / _RESULT).write_bytes(_convert_here(asked, (folder / _MODEL).read_bytes()))
    except MemoryError:
        told = {"error": "ran out of memory"}
    except Exception as error:  # the parent reports any error of the vendor's package
        told = {"error": f"raised {type(error).__name__}: {error}"}
    else:
        told = {}
    (folder / _ANSWER).write_text(json.dumps(told))


def _convert_here(asked: Mapping[str, Any], tflite: bytes) -> bytes:
    converter, library = _load_package(asked["module"])
    if library is not None and not library.isNeutronTarget(asked["target"]):
        known = ", ".join(target.name for target in library.getNeutronTargets())
        raise OptionError(f"This converter has no target '{asked['target']}'; its targets are {known}.")
    context = converter.CompilationContext()
    context.targetOpts = converter.getNeutronTarget(asked["target"])
    for name, value in asked["flags"].items():
        if not hasattr(context.compilationOpts, name):
            fields = ", ".join(field for field in dir(context.compilationOpts) if not field.startswith("_"))
            raise OptionError(f"compilationOpts of this converter has no field '{name}'; its fields are {fields}.")
        setattr(context.compilationOpts, name, value)
    return bytes(converter.convertModel(list(tflite), context))


def _merge_here(asked: Mapping[str, Any]) -> None:
    """Merges the files of a request, which lie in the current folder."""
    package = importlib.import_module(asked["module"])
    if not hasattr(package, "merge_kernel_selection_files"):
        raise ConverterError(
            "this package has no merge_kernel_selection_files. Compile without dump_kernel_selection_code, or with a "
            f"newer {PACKAGE}"
        )
    package.merge_kernel_selection_files(asked["merge"], _MERGED)


def _load_package(module: str) -> tuple[Any, Any]:
    """Imports the package's converter and library of targets. Returns None for the library if the package has none."""
    converter = importlib.import_module(f"{module}.neutron_converter")
    name = f"{module}.neutron_library_utils"
    return converter, importlib.import_module(name) if importlib.util.find_spec(name) else None


if __name__ == "__main__":
    _serve_request(Path(sys.argv[1]))
