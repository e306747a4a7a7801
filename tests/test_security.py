"""Statements of SECURITY.md: code in files runs only if the user permits it, and no child process uses a shell."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
SHELLS = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}
UNPICKLERS = {"load", "loads", "Unpickler"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MAY_UNPICKLE = {
    "openneutron/accuracy/evaluate.py": "models and metric that the parent process pickled",
    "openneutron/calibration/run.py": "a graph that the parent process pickled",
    "openneutron/dropin/datasets.py": "calibration files of ExecuTorch's examples, named by the user's script",
}
MAY_LOAD_ALL = {"openneutron/dropin/datasets.py": "the same calibration files"}


@cache
def calls_of(file: Path) -> tuple[tuple[str, str, ast.Call], ...]:
    """Returns the object and the name of each called function, and the call."""
    found: list[tuple[str, str, ast.Call]] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            found.append(("", node.func.id, node))
        elif isinstance(node.func, ast.Attribute):
            found.append((ast.unparse(node.func.value), node.func.attr, node))
    return tuple(found)


def named(file: Path) -> str:
    return file.relative_to(ROOT / "src").as_posix()


def all_calls() -> Iterator[tuple[Path, str, str, ast.Call]]:
    for file in SOURCES:
        for owner, name, call in calls_of(file):
            yield file, owner, name, call


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((one.value for one in call.keywords if one.arg == name), None)


def test_no_text_is_run_as_code() -> None:
    wrong = [f"{named(file)}: {name}" for file, owner, name, _ in all_calls() if not owner and name in RUNS_CODE]
    assert not wrong


def test_files_are_unpickled_only_in_the_places_of_security_md() -> None:
    places = {named(file) for file, owner, name, _ in all_calls() if owner in PICKLES and name in UNPICKLERS}
    assert places == set(MAY_UNPICKLE)


def test_no_child_gets_a_shell() -> None:
    for file, owner, name, call in all_calls():
        assert not (owner in ("os", "subprocess", "asyncio") and name in SHELLS), named(file)
        shell = keyword(call, "shell")
        assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False), named(file)


def test_numpy_reads_no_objects() -> None:
    loads = [(file, call) for file, owner, name, call in all_calls() if owner in ("np", "numpy") and name == "load"]
    assert loads
    for file, call in loads:
        allow = keyword(call, "allow_pickle")
        assert isinstance(allow, ast.Constant), named(file)
        assert allow.value is False, named(file)


def test_torch_loads_weights_only() -> None:
    """`unsafe` of the user decides in model/weights.py."""
    for file, owner, name, call in all_calls():
        if owner != "torch" or name != "load" or named(file) in MAY_LOAD_ALL:
            continue
        given = keyword(call, "weights_only")
        assert given is not None, named(file)
        assert ast.unparse(given) in ("True", "not unsafe"), named(file)


def test_no_archive_is_extracted() -> None:
    wrong = [named(file) for file, _, name, _ in all_calls() if name in ("extractall", "extract", "unpack_archive")]
    assert [name for name in wrong if not name.startswith("openneutron/cli/")] == []


TEXTS = sorted(
    path
    for pattern in (
        "README.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/**/*.py", "examples/**/*.md", "benchmarks/**/*.py",
    )
    for path in ROOT.glob(pattern)
)  # fmt: skip


@pytest.mark.parametrize("what", ["documents and examples"])
def test_documents_and_examples_load_weights_only(what: str) -> None:
    assert len(TEXTS) > 20, what
    for path in TEXTS:
        for found in re.finditer(r"\btorch\.load\(([^\n]*)", path.read_text()):
            assert "weights_only=True" in found[1], f"{path.relative_to(ROOT)}: {found[0]}"


def test_security_md_names_the_places() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    for name in ("openneutron.dropin", "--unsafe", "weights_only=True", "allow_pickle=False", "pip-audit"):
        assert name in text
