"""The names in `operators_not_to_delegate`: which nodes they match, and checks of names that match nothing."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from openneutron.core.fx import op_name, operator_aliases, operator_names
from openneutron.core.messages import near_matches
from openneutron.errors import OptionError
from openneutron.ops import DECOMPOSITIONS, OPERATORS, SPECS

__all__ = ["check_blocked_names", "check_forms", "check_names_in_graph", "names_of"]


def names_of(node: Node) -> set[str]:
    """Returns the names that match `node` in `operators_not_to_delegate`."""
    spec = OPERATORS.get(op_name(node))
    names = (*operator_names(node), *(spec.edge_targets if spec else ()))
    return {node.name} | {alias for name in names for alias in operator_aliases(name)}


def check_blocked_names(names: Iterable[str], program: ExportedProgram) -> None:
    """Raises `OptionError` for a name that is neither a declared operator nor an operator or a node of the program."""
    if names := frozenset(names):
        _check(names, _names_in(program.graph), "this program")


def check_names_in_graph(names: Iterable[str], graph: Graph) -> None:
    """Raises `OptionError` for a name that is no declared operator, and that no node will have after lowering.

    `graph` is the float graph of a model after the passes of the quantizer, with the layers of wide inputs. Conversion
    adds no other operators than quantize and dequantize. Lowering names nodes by their operators, with a number in the
    order of the graph: "conv2d", "conv2d_1". `check_blocked_names` is exact, but needs the lowered graph. Linear in
    nodes.
    """
    if names := frozenset(names):
        _check(names, _names_in(graph) | _names_after_lowering(graph), "this model")


def _check(names: frozenset[str], known: set[str], where: str) -> None:
    for name in sorted(names - known):
        raise OptionError(
            f"operators_not_to_delegate names '{name}', which is neither an operator nor a node of {where}. Give a "
            f"name that the placement lists, or an operator such as aten::silu.{near_matches(name, known)}"
        )


def _names_in(graph: Graph) -> set[str]:
    """Returns the names of all declared operators, and of the calls of a graph and their operators."""
    return set(_declared()).union(*map(names_of, filter(_is_call, graph.nodes)))


def _is_call(node: Node) -> bool:
    return node.op == "call_function"


def _names_after_lowering(graph: Graph) -> set[str]:
    """Returns the names that torch.export gives to the calls of a graph."""
    named, found = Graph(), set()
    for node in graph.nodes:
        if node.op == "placeholder":
            named.placeholder(node.name)
        elif _is_call(node):
            packet = getattr(node.target, "overloadpacket", node.target)
            found.add(named.create_node("call_function", node.target, name=packet.__name__).name)
    return found


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
