"""Inlines regions (no_grad, autocast, checkpoint) that torch.export puts into subgraphs."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import attribute
from openneutron.core.evaluation import infer_meta
from openneutron.core.fx import iterate_nodes, op_name, source_of
from openneutron.errors import ModelError
from openneutron.ops.declared import is_op
from openneutron.ops.graph_builder import detach

__all__ = ["inline_regions"]

# Each of these operators calls one graph once; the nodes among its other arguments are the operands.
_REGIONS = frozenset(
    {
        "wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap", "wrap_activation_checkpoint",
        "tag_activation_checkpoint", "hints_wrapper", "invoke_subgraph", "strict_mode",
    }
)  # fmt: skip
_CONTROL_FLOW = frozenset(
    {"cond", "while_loop", "switch", "map_impl", "map", "scan", "associative_scan", "foreach_map"}
)


def inline_regions(module: GraphModule, *, training: bool = False) -> bool:
    """Inlines regions. Rules, linear in nodes:

    1. A region that only sets a mode (no_grad, set_grad_enabled, inference_mode, autocast), or that training recomputes
       (checkpoint), is inlined, and so are the regions within it.
    2. With `training`, the outputs of a region without gradients are detached.
    3. In a region of autocast in a smaller dtype, operators compute in float32, because observers need float32.

    Raises `ModelError` for control flow (cond, while_loop, map, scan) and any other operator that calls a graph.
    """
    waiting = [node for node in module.graph.nodes if _is_higher_order(node)]
    changed, casts = bool(waiting), False
    while waiting:
        node = waiting.pop()
        if op_name(node) not in _REGIONS:
            raise _control_flow_error(node)
        casts |= op_name(node) == "wrap_with_autocast" and bool(node.args[2])
        waiting += _inline_region(module, node, detach=training and _has_no_gradients(node))
    if not changed:
        return False
    module.graph.eliminate_dead_code()
    read = {str(node.target).partition(".")[0] for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, child in list(module.named_children()):
        if isinstance(child, GraphModule) and name not in read:
            delattr(module, name)
    if casts:
        _compute_in_float32(module)
    module.recompile()
    return True


def _is_higher_order(node: Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _has_no_gradients(node: Node) -> bool:
    return op_name(node) == "wrap_with_set_grad_enabled" and not node.args[0]


def _control_flow_error(node: Node) -> ModelError:
    name = op_name(node).removesuffix("_impl")
    if op_name(node) in _CONTROL_FLOW:
        message = (
            f"The control flow of torch.{name} depends on values, and the NPU runs one fixed sequence of operators. "
            "Compute both branches and choose with torch.where, unroll the loop to a fixed number of steps, or export "
            "one program for each branch."
        )
    else:
        message = f"The subgraph of the operator '{name}' cannot be inlined. Write this part with other operators."
    inner = (inside for source in _called_graphs(node) for inside in source.graph.nodes if inside.op == "call_function")
    source = source_of(node) or next(filter(None, map(source_of, inner)), None)
    return ModelError(message, node=node.name, op=op_name(node), source=source)


def _called_graphs(node: Node) -> list[GraphModule]:
    module = node.graph.owning_module
    assert module is not None
    read = (attribute(module, str(value.target)) for value in node.all_input_nodes if value.op == "get_attr")
    return [value for value in read if isinstance(value, GraphModule)]


def _inline_region(module: GraphModule, call: Node, *, detach: bool) -> list[Node]:
    """Replaces `call` by the nodes of the graph that it calls, and returns the regions among them."""
    position, region = _called_region(module, call)
    # hints_wrapper and strict_mode take the operands as one tuple, the others as separate arguments.
    operands = list(iterate_nodes(list(call.args[position + 1 :])))
    copies: dict[Node, Node] = {}
    inner: list[Node] = []
    remaining = iter(operands)
    for node in region.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(remaining)
        elif node.op == "output":
            _replace_call(
                call, [copies[value] if isinstance(value, Node) else value for value in _returned_values(node)], detach
            )
        else:
            with module.graph.inserting_before(call):
                copies[node] = copy = module.graph.node_copy(node, copies.__getitem__)
            if node.op in ("get_attr", "call_module"):
                copy.target = _copy_attribute(module, attribute(region, str(node.target)), str(node.target))
            if _is_higher_order(copy):
                inner.append(copy)
    module.graph.erase_node(call)
    return inner


def _called_region(module: GraphModule, call: Node) -> tuple[int, GraphModule]:
    for position, argument in enumerate(call.args):
        if isinstance(argument, Node) and argument.op == "get_attr":
            value = attribute(module, str(argument.target))
            if isinstance(value, GraphModule):
                return position, value
    raise _control_flow_error(call)


def _returned_values(output: Node) -> list[object]:
    value = output.args[0]
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _copy_attribute(module: GraphModule, value: object, name: str) -> str:
    """Copies an attribute of a region to `module`, and returns its name there."""
    stem = name.replace(".", "_")
    name, count = stem, 0
    while hasattr(module, name):
        if getattr(module, name) is value:
            return name
        count += 1
        name = f"{stem}_{count}"
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)
    return name


def _replace_call(call: Node, results: list[object], detach: bool) -> None:
    if detach:
        results = [_insert_detach(call, value) for value in results]
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise _control_flow_error(call)
        result = results[user.args[1]]  # type: ignore[index]
        assert isinstance(result, Node)
        user.replace_all_uses_with(result)
        call.graph.erase_node(user)


def _insert_detach(call: Node, value: object) -> object:
    if not isinstance(value, Node) or not value.meta["val"].dtype.is_floating_point:
        return value
    with call.graph.inserting_before(call):
        detached = detach(call.graph, value)
    detached.meta = dict(value.meta)
    return detached


def _compute_in_float32(module: GraphModule) -> None:
    """Recomputes the metadata of values that autocast cast to a smaller dtype."""
    for node in list(module.graph.nodes):
        if is_op(node, "assertion"):
            module.graph.erase_node(node)
        elif node.op == "call_function" and "val" in node.meta:
            node.meta["val"] = infer_meta(node)
