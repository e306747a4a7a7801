"""Replaces complex numbers by pairs of real numbers."""

from __future__ import annotations

import torch
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule, Node

from openneutron.core.boundary import error_at
from openneutron.core.constants import constant_of
from openneutron.core.fx import is_state_write, output_node
from openneutron.errors import ModelError
from openneutron.ops.complex_numbers import ComplexRewriting, Pair
from openneutron.ops.complex_rules import complex_rule, computes_complex
from openneutron.ops.decomposition import Rewriting
from openneutron.ops.op_instance import OpInstance
from openneutron.targets import NeutronTarget

__all__ = ["complex_to_real"]


def complex_to_real(module: GraphModule, target: NeutronTarget) -> bool:
    """Rule, linear in nodes: an operator that reads, returns or computes with complex numbers is replaced by operators
    on their real and imaginary parts.

    Raises `ModelError` for an operator without a rule, and for complex inputs and outputs of the model.
    """
    pairs: dict[Node, Pair] = {}
    changed = False
    for node in list(module.graph.nodes):
        if _is_complex(node) or computes_complex(node) or any(source in pairs for source in node.all_input_nodes):
            _rewrite(module, node, target, pairs)
            changed = True
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return changed


def _rewrite(module: GraphModule, node: Node, target: NeutronTarget, pairs: dict[Node, Pair]) -> Pair | Node:
    """Rewrites one operator. Returns the pair of its complex output, or the node that replaces its real output."""
    if node.op in ("placeholder", "output"):
        raise _is_outside(node, pairs)
    if is_state_write(node):
        raise error_at(
            node,
            f"The model writes to the complex buffer '{node.args[0]}', but programs keep real states. Write "
            "torch.view_as_real of the value to a real buffer, and read it with torch.view_as_complex.",
        )
    rewriting = Rewriting(module, OpInstance(node, target))
    if (value := constant_of(module, node)) is not None:
        pairs[node] = Pair(*(rewriting.constant(part.float()) for part in (value.real, value.imag)))
        return pairs[node]
    rule, writing = complex_rule(node), ComplexRewriting(rewriting, pairs)
    written = _rewrite_parts(rewriting, pairs) if rule is None else rule(writing)
    if isinstance(written, Pair) and isinstance(node.meta.get("val"), torch.Tensor) and not _is_complex(node):
        written = writing.node(written.real)
    if isinstance(written, Pair):
        pairs[node] = written
    else:
        node.replace_all_uses_with(written)
    return written


def _rewrite_parts(rewriting: Rewriting, pairs: dict[Node, Pair]) -> Pair | Node:
    """Rewrites an operator that has no rule, if torch decomposes it into operators that have rules."""
    node = rewriting.instance.node
    if not _can_be_decomposed(node):
        raise _has_no_rule(node)
    before = node.prev
    replaced: dict[Node, Pair | Node] = {}
    try:
        written = rewriting.trace(core_aten_decompositions())
    except RuntimeError as error:  # a decomposition of torch for real numbers only
        raise _has_no_rule(node) from error
    while before.next is not node:
        before = before.next
        if _is_complex(before) or any(source in pairs for source in before.all_input_nodes):
            if before.op == "call_function" and complex_rule(before) is None:
                raise _has_no_rule(node)
            replaced[before] = _rewrite(rewriting.module, before, rewriting.instance.target, pairs)
    return replaced.get(written, pairs.get(written, written))


def _can_be_decomposed(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return target in core_aten_decompositions() or target.has_kernel_for_dispatch_key(key)


def _has_no_rule(node: Node) -> ModelError:
    return error_at(
        node,
        "The NPU and ExecuTorch's kernels do not support complex numbers. OpenNeutron computes complex numbers as "
        "pairs of real numbers, but has no rule for this operator. Write it with real numbers.",
    )


def _is_outside(node: Node, pairs: dict[Node, Pair]) -> ModelError:
    """Returns the error for a complex input or output of the model."""
    if node.op == "placeholder":
        return error_at(node, "This input is complex. Programs take real numbers: give view_as_real of it.")
    returned = next(source for source in output_node(node.graph).all_input_nodes if source in pairs)
    return error_at(returned, "This output is complex. Programs return real numbers: return view_as_real of it.")


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()
