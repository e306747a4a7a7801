"""Static analysis that finds values of a graph that are never negative."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from openneutron.core.fx import arguments, is_dequantize, is_quantize
from openneutron.ops.declared import facts_of
from openneutron.ops.facts import never_negative
from openneutron.ops.op_instance import OpInstance

__all__ = ["is_never_negative"]

# The depth limit of the search, which bounds its time. An operator with n operands reduces the depth by n.
_DEPTH = 16


def is_never_negative(instance: OpInstance, value: object, depth: int = _DEPTH) -> bool:
    """Whether `value`, a node or a number, is never negative.

    The observed range of a quantized value is no evidence, because decompositions are chosen before quantization.
    """
    while isinstance(value, Node) and is_dequantize(value) and is_quantize(quantized := value.all_input_nodes[0]):
        value = quantized.args[0]
    if not isinstance(value, Node):
        return isinstance(value, (int, float)) and value >= 0
    if (constant := instance.constant_of(value)) is not None:
        return bool((constant >= 0).all())
    facts = facts_of(value)
    if facts.sign is never_negative:
        return True
    if depth == 0 or value.op != "call_function":
        return False
    ends = list(_operands(value))
    operands = [is_never_negative(instance, end, max(0, depth - len(ends))) for end in ends]
    if facts.movement is not None:
        return all(operands)
    return facts.sign is not None and facts.sign(value, operands)


def _operands(node: Node) -> Iterator[object]:
    """Returns the operands of `node`. Leaves out the operand `other` of a movement, because the movement reads only its
    shape.
    """
    args = arguments(node)
    names = ("self",) if facts_of(node).movement is not None else ("self", "other", "mat2")
    yield from (args[name] for name in names if name in args)
    yield from args.get("tensors", ())
