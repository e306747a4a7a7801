"""The public names of the package, their docstrings, and the cost of importing it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import openneutron

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(openneutron.__path__, "openneutron.")
    if not module.name.endswith(("_host", "__main__")) and ".dropin" not in module.name  # replaces a part of ExecuTorch
)
DESIGNED = {
    "NeutronQuantizer", "NeutronPartitioner", "NeutronBackend", "NeutronTargetSpec", "generate_neutron_compile_spec",
    "quantize", "lower", "load",
}  # fmt: skip
IMPORT_BUDGET_SECONDS = 0.2


def test_the_public_names_exist() -> None:
    assert set(openneutron.__all__) >= DESIGNED
    assert dir(openneutron) == openneutron.__all__


@pytest.mark.parametrize("name", openneutron.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(openneutron, name)
    assert inspect.getdoc(value)
    assert value.__doc__ is not None
    if inspect.isclass(value):
        methods = inspect.getmembers(value, inspect.isfunction)
        own = [method for key, method in methods if not key.startswith("_") and method.__module__ == value.__module__]
        assert all(inspect.getdoc(method) for method in own)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = openneutron.quantise


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_docstring_and_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert module.__all__ or hasattr(module, "__path__")  # a package may have no names besides its modules
    assert len(set(module.__all__)) == len(module.__all__)
    for offered in module.__all__:
        assert hasattr(module, offered), f"{name}.__all__ has '{offered}'"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_is_light() -> None:
    heavy = ("torch", "executorch", "torchao", "numpy", "ai_edge_litert")
    loaded = run(f"import sys, openneutron; print([name for name in {heavy} if name in sys.modules])")
    assert loaded == "[]"


def test_import_is_fast() -> None:
    code = "import time; start = time.perf_counter(); import openneutron; print(time.perf_counter() - start)"
    assert min(float(run(code)) for _ in range(3)) < IMPORT_BUDGET_SECONDS


def test_running_a_program_imports_no_compiler() -> None:
    compilers = ("executorch.exir", "torchao")
    code = f"import sys, openneutron; openneutron.load; print([name for name in {compilers} if name in sys.modules])"
    assert run(code) == "[]"
