"""Evaluates torch.fx graphs: one node, one value with everything that it depends on, or all nodes in order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from functools import lru_cache
from typing import Any, Self

import torch
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node, map_arg

from openneutron.core.constants import attribute
from openneutron.core.fx import is_state_write, output_node

__all__ = [
    "GraphRun", "compute_from", "evaluate_call", "evaluate_operator", "infer_meta", "last_uses", "run_node", "value_of",
]  # fmt: skip

_NUMBERS = (bool, int, float)


def evaluate_call(node: Node, value_of: Callable[[Node], Any]) -> Any:
    """Runs the call `node` on the values of its input nodes, which `value_of` returns. Returns the result."""
    assert callable(node.target)
    return evaluate_operator(node.target, node, value_of)


def evaluate_operator(operator: Callable[..., Any], node: Node, value_of: Callable[[Node], Any]) -> Any:
    """Runs `operator` with the arguments of the call `node`, as `evaluate_call` runs the operator of the node."""
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    return operator(*args, **kwargs)


def infer_meta(node: Node) -> Any:
    """Runs the call `node` on the metadata of its input nodes: fake tensors or example values.

    A pointwise operator of one contiguous fake tensor is not run: the result has the shape of the tensor. The
    inference of torch takes much longer, because it runs the decompositions of some of these operators.
    """
    operand = _only_operand_of_pointwise(node)
    if operand is None:
        return evaluate_call(node, lambda read: read.meta["val"])
    values: tuple[Any, ...] = (*node.args[1:], *node.kwargs.values())
    return torch.empty_like(operand, dtype=_dtype_of_pointwise(node.target, operand.dtype, tuple(node.kwargs), *values))


def _only_operand_of_pointwise(node: Node) -> FakeTensor | None:
    """Returns the only tensor that the pointwise operator `node` reads; None for other operators and arguments."""
    operator = node.target
    if not isinstance(operator, torch._ops.OpOverload) or torch.Tag.pointwise not in operator.tags:
        return None
    if operator._schema.is_mutable or len(operator._schema.returns) != 1 or not node.args:
        return None
    others = (*node.args[1:], *node.kwargs.values())
    if not isinstance(node.args[0], Node) or not all(value is None or type(value) in _NUMBERS for value in others):
        return None
    value = node.args[0].meta["val"]
    return value if isinstance(value, FakeTensor) and value.constant is None and value.is_contiguous() else None


@lru_cache(maxsize=1024, typed=True)  # 2 and 2.0 may result in different dtypes
def _dtype_of_pointwise(
    operator: Any, dtype: torch.dtype, names: tuple[str, ...], *values: float | None
) -> torch.dtype:
    """Returns the dtype of the result of a pointwise `operator` on a tensor of `dtype`.

    `values` are its other arguments; the last of them have `names`.
    """
    first = len(values) - len(names)
    options = dict(zip(names, values[first:], strict=True))
    result: torch.Tensor = operator(torch.empty(1, dtype=dtype, device="meta"), *values[:first], **options)
    return result.dtype


def run_node(module: GraphModule, node: Node, value_of: Callable[[Node], Any]) -> Any:
    """Computes the value of a node of any kind except placeholders. `value_of` returns the values of its operands."""
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    if node.op == "call_function":
        return evaluate_call(node, value_of)
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    return args[0] if node.op == "output" else module.get_submodule(str(node.target))(*args, **kwargs)


@torch.no_grad()
def compute_from(known: MutableMapping[Node, Any], module: GraphModule, node: Node) -> Any:
    """Computes `node` from constants and from the values in `known`, and adds each value that it computes to `known`.

    Computes only the nodes on which `node` depends.
    """
    waiting = [node]
    while waiting:
        top = waiting[-1]
        missing = [source for source in top.all_input_nodes if source not in known]
        if missing and top not in known:
            waiting += missing
            continue
        if top not in known:
            known[top] = run_node(module, top, known.__getitem__)
        waiting.pop()
    return known[node]


def value_of(module: GraphModule, node: Node) -> torch.Tensor:
    """Returns the value of a constant, or of a node computed from constants alone."""
    value = compute_from({}, module, node)
    assert isinstance(value, torch.Tensor)
    return value.detach()


def last_uses(graph: Graph) -> dict[Node, list[Node]]:
    """Returns, for each node, the operands that no later node reads."""
    found: dict[Node, list[Node]] = {}
    read: set[Node] = set()
    for node in reversed(graph.nodes):
        for value in node.all_input_nodes:
            if value not in read:
                read.add(value)
                found.setdefault(node, []).append(value)
    return found


class GraphRun:
    """Runs the nodes of a graph module in order. A subclass may override `compute` and `operand`.

    1. A node in `given` has the given value, and is not computed.
    2. Writes of states are skipped, so runs do not change the buffers of the module.
    3. A value is dropped after its last reader has run, unless `keeps_values` is True. The operands of the current node
       remain until the next `advance`.
    4. With `only_dependents`, the run skips nodes that depend on no node in `given`. Their values are computed again
       for each operator that reads them, so the constants of the module may change during the run.

    `torch.fx.Interpreter` cannot replace this class, because it runs a graph as a whole. Recovery runs two graphs side
    by side, one `advance` at a time.
    """

    def __init__(
        self,
        module: GraphModule,
        given: Mapping[Node, Any],
        *,
        keeps_values: bool = False,
        only_dependents: bool = False,
    ) -> None:
        self.module = module
        self.values: dict[Node, Any] = dict(given)
        self.only_dependents = only_dependents
        self.current: Node | None = None
        self.coming = next(iter(module.graph.nodes))
        self._last_uses = {} if keeps_values else last_uses(module.graph)

    @torch.no_grad()
    def advance(self) -> None:
        """Computes the next node. Drops the values whose last reader was the previous node."""
        for value in self._last_uses.get(self.current, ()) if self.current else ():
            self.values.pop(value, None)
        node = self.current = self.coming
        self.coming = node.next
        if node not in self.values and not is_state_write(node) and self._is_needed(node):
            self.values[node] = self.compute(node)

    def fork(self) -> Self:
        """Returns a copy of this run with the values computed so far. The two runs advance independently."""
        forked = copy.copy(self)
        forked.values = dict(self.values)
        return forked

    def run(self) -> Any:
        """Computes the remaining nodes, and returns the value of the output node."""
        output = output_node(self.module.graph)
        self.run_until(output)
        return self.values[output]

    def run_until(self, node: Node) -> None:
        """Computes all nodes up to `node`, and keeps the operands of `node`."""
        while self.current is not node:
            self.advance()

    def compute(self, node: Node) -> Any:
        """Returns the value of `node`."""
        return run_node(self.module, node, self.operand)

    def operand(self, node: Node) -> Any:
        """Returns the value of an operand of the current node."""
        return self.values[node] if node in self.values else value_of(self.module, node)

    def _is_needed(self, node: Node) -> bool:
        depends = not self.values.keys().isdisjoint(node.all_input_nodes)
        return depends or node.op == "output" or not self.only_dependents
