"""Runs scripts written for the public names of `executorch.backends.nxp` on OpenNeutron.

Import this module before the script's own imports, or run `python -m openneutron.dropin script.py [ARGUMENT ...]`. The
documented names of ExecuTorch's NXP backend are then imported from OpenNeutron. That backend and the vendor's SDK need
not be installed. The import of a name that OpenNeutron does not provide raises ImportError.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from openneutron.errors import OptionError

__all__ = ["install", "main"]

REPLACED = "executorch.backends.nxp"

# For each documented module: its names, and the module of OpenNeutron that defines each name.
_PROVIDED: dict[str, dict[str, str]] = {
    "": {},
    ".backend": {},
    ".backend.custom_delegation_options": {"CustomDelegationOptions": "openneutron.dropin.options"},
    ".backend.neutron_target_spec": {"NeutronTargetSpec": "openneutron.targets"},
    ".edge_passes": {},
    ".edge_passes.neutron_edge_pass": {"NeutronEdgePass": "openneutron.dropin.edge_passes"},
    ".edge_passes.neutron_edge_pass_manager": {"NeutronEdgePassManager": "openneutron.dropin.edge_passes"},
    ".edge_passes.remove_additional_quantize_dequantize_nodes_pass": {
        "RemoveAdditionalQDQClustersPass": "openneutron.dropin.edge_passes",
    },
    ".edge_passes.remove_io_quant_ops_pass": {"RemoveIOQuantOpsPass": "openneutron.dropin.edge_passes"},
    ".neutron_partitioner": {"NeutronPartitioner": "openneutron.partition.partitioner"},
    ".nxp_backend": {
        "NeutronBackend": "openneutron.partition.backend",
        "NeutronCompileSpecBuilder": "openneutron.dropin.options",
        "core_aten_ops_exception_list": "openneutron.dropin.options",
        "generate_neutron_compile_spec": "openneutron.compile_spec",
    },
    ".quantizer": {},
    ".quantizer.neutron_quantizer": {
        "NeutronQuantizer": "openneutron.documented_flow",
        "NeutronTargetSpec": "openneutron.targets",
    },
    ".quantizer.utils": {"calibrate_and_quantize": "openneutron.dropin.quantization"},
    ".tests": {},
    ".tests.calibration_dataset": {
        "CalibrationDataset": "openneutron.dropin.datasets",
        "RandomCalibrationDataset": "openneutron.dropin.datasets",
    },
}

# ExecuTorch's package imports Model Explorer, by the misspelled name of a module that newer versions do not have. The
# package is replaced unless that module is installed.
_ADAPTER = "pytorch_exported_program_adater_impl.py"
_VISUALIZATION: dict[str, dict[str, str]] = {
    "executorch.devtools.visualization": {},
    "executorch.devtools.visualization.visualization_utils": {
        "visualize_with_clusters": "openneutron.dropin.visualization",
    },
}


def _homes(fullname: str) -> dict[str, str] | None:
    """Returns the names of a replaced module, each with the module that defines it; None for any other module."""
    if fullname in _VISUALIZATION:
        return None if _has_model_explorer() else _VISUALIZATION[fullname]
    if fullname != REPLACED and not fullname.startswith(f"{REPLACED}."):
        return None
    if fullname.removeprefix(REPLACED) not in _PROVIDED:
        raise ModuleNotFoundError(
            f"'{fullname}' is not provided by openneutron.dropin, which replaces '{REPLACED}'. Provided: "
            f"{', '.join(REPLACED + name for name in _PROVIDED)}.",
            name=fullname,
        )
    return _PROVIDED[fullname.removeprefix(REPLACED)]


def _has_model_explorer() -> bool:
    """Whether the installed Model Explorer has the version that ExecuTorch's package imports. Does not import it."""
    found = importlib.util.find_spec("model_explorer")
    folders = [] if found is None else found.submodule_search_locations or []
    return any((Path(folder) / _ADAPTER).is_file() for folder in folders)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the replaced modules. Names are imported on first use, so that an import of a module is fast."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        return None if _homes(fullname) is None else importlib.util.spec_from_loader(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        homes = _homes(module.__name__) or {}

        def lookup(name: str) -> Any:
            if name not in homes:
                raise AttributeError(f"openneutron.dropin provides no '{name}' in '{module.__name__}'")
            return getattr(importlib.import_module(homes[name]), name)

        document = f"OpenNeutron in place of {module.__name__}."
        module.__dict__.update(__getattr__=lookup, __all__=list(homes), __doc__=document)


def install() -> None:
    """Replaces ExecuTorch's NXP backend by OpenNeutron. A second call does nothing.

    Raises `OptionError` if that backend is already imported. ExecuTorch finds backends by name, and the classes of both
    have the same names.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    loaded = [name for name in sys.modules if name == REPLACED or name.startswith(f"{REPLACED}.")]
    if loaded:
        raise OptionError(
            f"'{loaded[0]}' is already imported, so OpenNeutron cannot replace it. Import openneutron.dropin before "
            "the first import of that backend."
        )
    sys.meta_path.insert(0, _Finder())


def main(arguments: Sequence[str]) -> None:
    """Runs a script with OpenNeutron instead of ExecuTorch's NXP backend."""
    if not arguments:
        raise SystemExit("usage: python -m openneutron.dropin SCRIPT [ARGUMENT ...]")
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(f"openneutron.dropin: no such script: {script}")
    sys.argv = list(arguments)
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


install()
