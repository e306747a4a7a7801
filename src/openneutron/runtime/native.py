"""Loads the native module `_host`, which runs delegates on this machine. Everything else works without it.

Importing `_host` registers the delegate with ExecuTorch's runtime. The module is built from `csrc/`. The build omits it
if there is no C++ compiler, or if the environment variable OPENNEUTRON_NATIVE is 0.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from pathlib import Path
from types import ModuleType

import executorch
from executorch.extension.pybindings import _C  # noqa: F401  loads libexecutorch, which `_host` is linked to

from openneutron.errors import NativeModuleError

__all__ = ["is_installed", "native_module"]

_NAME = "openneutron.runtime._host"
_NEEDED = "Running a .pte on this machine needs OpenNeutron's native module"
_BUILD = "run 'OPENNEUTRON_NATIVE=1 pip install --force-reinstall --no-deps .' in the folder of OpenNeutron's sources"
_KERNELS = "libexecutorch_kernels_quantized.*"
"""A library of ExecuTorch that `_host` is linked to. Importing `_C` does not load it."""


def native_module() -> ModuleType:
    """Imports and returns the module `_host`, which registers the delegate.

    Raises `NativeModuleError` if it is not installed, or if the system's loader cannot load it.
    """
    found = _import_module()
    if isinstance(found, str):
        raise NativeModuleError(found)
    return found


def is_installed() -> bool:
    """Whether the native module is installed and can be loaded."""
    return isinstance(_import_module(), ModuleType)


@functools.cache
def _import_module() -> ModuleType | str:
    """Returns the module, or the reason why it cannot be imported. Cached, because Python does not repeat an import."""
    try:
        _load_kernels()
        return importlib.import_module(_NAME)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == _NAME:
            return (
                f"{_NEEDED}, which this installation lacks: it was built without a C++20 compiler, or with "
                f"OPENNEUTRON_NATIVE=0. Install a wheel for your platform, or install a C++20 compiler and {_BUILD}."
            )
        return (
            f"{_NEEDED}, which cannot be loaded: {error}. Install the executorch that it was built with, or {_BUILD}."
        )


def _load_kernels() -> None:
    """Loads the kernel library by its path, so that `_host` finds it in the process.

    Otherwise, `_host` finds the library only if executorch is in the same site-packages.
    """
    for folder in executorch.__path__:
        for library in Path(folder, "lib").glob(_KERNELS):
            ctypes.CDLL(os.fspath(library))
