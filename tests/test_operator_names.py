"""Only `ops/` contains names of ATen operators. Passes look up declarations."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from openneutron.ops import DECOMPOSED, HANDLED, OPERATORS, SPECS
from openneutron.ops.declared import FACTS, NAMES, Declaration, register
from openneutron.ops.facts import Facts
from openneutron.ops.spec import HandledOperator

SOURCES = Path(__file__).parents[1] / "src" / "openneutron"

ALLOWED = {
    # A clone reads a state, and a copy_ writes it. `core/` and `model/`, which name them, are below `ops/`.
    "core/fx.py": {"clone": 1, "copy_": 1, "detach_": 1},
    "model/state.py": {"clone": 1, "copy_": 1},
    # The operator whose decomposition of torch is not traced. A model calls it as batch_norm.
    "model/norm_inference.py": {"_native_batch_norm_legit_no_training": 1},
    # A constant that scripts for ExecuTorch's NXP backend import.
    "dropin/options.py": {"prelu": 1},
    # Kernels of ExecuTorch that write another argument than their last one. `formats/` reads files without the
    # declarations.
    "formats/kernel_calls.py": {"copy": 1, "copy_": 1},
    # Completes a name that the user gave without a namespace.
    "partition/blocked_names.py": {"?": 3},
    # Kernels of ExecuTorch that read indices. `runtime/` runs programs without the declarations.
    "runtime/index_faults.py": {
        "embedding": 1, "gather": 1, "index": 1, "index_put": 1, "index_select": 1, "scatter": 2, "scatter_add": 1,
    },
}
_NAME = re.compile(r"aten(?:\.|::)([A-Za-z_]\w*)?")


def operator_names(source: str) -> Iterator[str]:
    """Returns the ATen operators that Python code names: "aten.add.Tensor", f"aten.{name}", torch.ops.aten.add,
    aten.add.

    "?" stands for a name that an f-string composes. Docstrings are ignored.
    """
    tree = ast.parse(source)
    documented = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_aten(node.value):
            yield node.attr
        elif isinstance(node, ast.JoinedStr):
            starts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            yield from ("?" for start in starts if re.fullmatch(r"aten\.", str(start)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            found = _NAME.match(node.value)
            if found and found[1]:
                yield found[1]


def _is_aten(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "aten") or (
        isinstance(node, ast.Attribute) and node.attr == "aten"
    )


def names_outside_ops() -> dict[str, dict[str, int]]:
    found = {}
    for file in sorted(SOURCES.rglob("*.py")):
        path = file.relative_to(SOURCES).as_posix()
        names = Counter(operator_names(file.read_text())) if not path.startswith("ops/") else Counter[str]()
        if names:
            found[path] = dict(names)
    return found


def test_operators_are_named_in_their_declarations_only() -> None:
    assert names_outside_ops() == ALLOWED


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("torch.ops.aten.add.Tensor", ["add"]),
        ("aten = torch.ops.aten\naten.mul.Tensor", ["mul"]),
        ("edge.edge.aten.cat.default", ["cat"]),
        ('op_name(node) == "aten.relu.default"', ["relu"]),
        ('name.startswith("aten.conv")', ["conv"]),
        ('name = "aten::conv2d"', ["conv2d"]),
        ('{f"aten.{name}.default" for name in ("dropout", "alpha_dropout")}', ["?"]),
        ('"""Like aten.add.Tensor."""', []),
        ('node.target.namespace == "aten"', []),
        ('name.removeprefix("aten.")', []),
    ],
)
def test_names_are_found(code: str, expected: list[str]) -> None:
    assert list(operator_names(code)) == expected


def test_names_that_passes_ask_for_are_declared() -> None:
    """`is_op` raises `KeyError` for an unknown name when it is called. This test finds such names statically."""
    asked = set()
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("is_op", "overload_of")
            ):
                asked |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    assert {"mul", "batch_norm"} <= asked
    assert asked <= NAMES.keys()


def test_each_operator_is_declared_for_the_npu_once() -> None:
    targets = [target for spec in SPECS for target in spec.targets]
    assert len(targets) == len(set(targets)) == len(OPERATORS)


def test_facts_of_an_operator_are_stated_once() -> None:
    twice = HandledOperator("another relu", ("aten.relu.default",), Facts(computes_masks=True))
    with pytest.raises(ValueError, match=r"aten\.relu\.default.*'another relu'"):
        register([twice])
    NAMES.pop("another relu")
    declarations: tuple[Declaration, ...] = (*SPECS, *DECOMPOSED, *HANDLED)
    assert {id(facts) for facts in FACTS.values()} <= {id(declared.facts) for declared in declarations}


def test_operators_that_move_values_declare_how() -> None:
    """Exceptions are "to", which may change the dtype, and "dropout", which changes values in train mode."""
    movers = {spec.name for spec in SPECS if spec.moves_values}
    stated = {spec.name for spec in SPECS if spec.facts.movement is not None}
    assert movers - stated == {"to", "dropout"}
    assert stated <= movers


def test_layers_state_their_kind() -> None:
    """An operator with a constant weight and a bias is a layer."""
    weighted = {spec.name for spec in SPECS if spec.weight is not None and spec.name != "prelu"}
    assert weighted == {spec.name for spec in SPECS if spec.facts.layer is not None}
    assert {facts.layer.output_dim for spec in SPECS if (facts := spec.facts).layer} == {0, 1}
    for spec in SPECS:
        if spec.weight_axis is not None:
            assert spec.facts.layer is not None
            assert spec.weight_axis == spec.facts.layer.output_dim
