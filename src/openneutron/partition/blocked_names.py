"""The names in `operators_not_to_delegate`: which nodes they match, and checks of names that match nothing."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.core.fx import op_name, operator_aliases, operator_names
from openneutron.core.messages import near_matches
from openneutron.errors import OptionError
from openneutron.ops import DECOMPOSITIONS, OPERATORS, SPECS

__all__ = ["check_blocked_names", "check_forms", "names_of"]


def names_of(node: Node) -> set[str]:
    """Returns the names that match `node` in `operators_not_to_delegate`."""
    spec = OPERATORS.get(op_name(node))
    names = (*operator_names(node), *(spec.edge_targets if spec else ()))
    return {node.name} | {alias for name in names for alias in operator_aliases(name)}


def check_blocked_names(names: Iterable[str], program: ExportedProgram) -> None:
    """Raises `OptionError` for a name that is neither a declared operator nor an operator or a node of the program."""
    names = frozenset(names)
    if not names:
        return
    known = set(_declared())
    for node in program.graph.nodes:
        if node.op == "call_function":
            known |= names_of(node)
    for name in sorted(names - known):
        raise OptionError(
            f"operators_not_to_delegate names '{name}', which is neither an operator nor a node of this program."
            f"{near_matches(name, known)}"
        )


def check_forms(names: Iterable[str]) -> None:
    """Raises `OptionError` for a name that no program can have, so that it is reported before a model is quantized.

    A name with a namespace must be an operator that torch or OpenNeutron has. Another name must begin with the name of
    an operator, as names of nodes do: "conv2d_1", "mul_tensor". `check_blocked_names` is exact, but needs the lowered
    graph.
    """
    for name in names:
        if name in _declared() or _is_operator(name) or _is_node(name):
            continue
        raise OptionError(
            f"operators_not_to_delegate names '{name}', which is neither an operator nor the name of a node. Give an "
            "operator such as aten::silu, or use keep_float for a module."
            f"{near_matches(name, _declared())}"
        )


@cache
def _declared() -> frozenset[str]:
    """Returns all spellings of the operators that OpenNeutron has."""
    operators = [name for spec in SPECS for name in (*spec.targets, *spec.edge_targets)]
    return frozenset(alias for name in (*operators, *DECOMPOSITIONS) for alias in operator_aliases(name))


def _registered() -> list[str]:
    """Returns the operators that torch and loaded libraries have registered, such as "aten::add.Tensor"."""
    names: list[str] = torch._C._dispatch_get_all_op_names()
    return names


def _is_operator(name: str) -> bool:
    """Whether `name` is a spelling of a registered operator, or of one in a library that may be loaded later."""
    spelled = name.replace("::", ".", 1)
    namespace, dot, rest = spelled.partition(".")
    if not dot or not rest:
        return False
    registered = [one.replace("::", ".", 1) for one in _registered()]
    if namespace != "aten":
        declared = {one.partition(".")[0] for one in _declared()}
        return namespace in declared.union(one.partition(".")[0] for one in registered)
    base = rest.removesuffix(".default")
    return any(one in (f"aten.{base}", f"aten.{rest}") or one.startswith(f"aten.{base}.") for one in registered)


def _is_node(name: str) -> bool:
    """Whether `name` begins with the name of a registered operator, or is that of an element of a tuple."""
    if not name.isidentifier():
        return False
    bases = {one.partition("::")[2].partition(".")[0].lstrip("_") for one in _registered()} | {"getitem"}
    parts = name.lstrip("_").split("_")
    return any("_".join(parts[:count]) in bases for count in range(1, len(parts) + 1))
