"""Fuses patterns of operators that spell out an activation or a norm into the single operator (pattern fusion)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from openneutron.core.constants import number_of
from openneutron.core.fx import arguments, finish_rewrite
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.decomposition import Rewriting
from openneutron.ops.functions import is_quotient
from openneutron.ops.graph_builder import gelu, hardsigmoid, hardswish, mul, relu, relu6, rsqrt
from openneutron.ops.norms import DimNormGroups, standardize
from openneutron.ops.op_instance import OpInstance
from openneutron.targets import NeutronTarget

__all__ = ["fuse_patterns"]

# Tolerance of numbers in patterns: models contain rounded numbers.
_RELATIVE_TOLERANCE = 1e-4
# The depth to which the factors of a product are searched.
_DEPTH = 4


@dataclass(frozen=True)
class _Product:
    """number * factors[0] * factors[1] ..."""

    number: float
    factors: tuple[Node, ...]


def fuse_patterns(
    module: GraphModule, target: NeutronTarget, keeps_float: Callable[[Node], bool] = lambda _: False
) -> bool:
    """Fuses patterns. Linear in nodes. Results differ only by the rounding of the numbers in the model. Rules:

    1. relu6(x + 3) / 6 and clamp(x / 6 + 1 / 2, 0, 1) become hardsigmoid(x).
    2. x * relu6(x + 3) / 6 and x * hardsigmoid(x) become hardswish(x).
    3. x / 2 * (1 + erf(x / sqrt(2))) becomes gelu(x), and so does the form with tanh.
    4. x / sqrt(y) becomes x * rsqrt(y), and 1 / sqrt(y) becomes rsqrt(y).
    5. x * rsqrt(mean(x * x) + eps) becomes the two divisions that layer_norm is decomposed into (see `standardize`).
       The second of these divisions has the same form, and is not changed.
    6. clamp from 0 to infinity becomes relu, and clamp from 0 to 6 becomes relu6, because other passes match relu and
       relu6.

    Rules 1 and 2 accept clamp and hardtanh from 0 to 6 as relu6. Factors may have any order, and a division by a number
    may be written as a product. A pattern is not fused if other operators read its inner values, or if `keeps_float` is
    true for its last operator.
    """
    changed = False
    for node in reversed(list(module.graph.nodes)):
        if node.op != "call_function" or not node.users or keeps_float(node):
            continue
        rewriting = Rewriting(module, OpInstance(node, target))
        replacement = _match_pattern(rewriting, node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            module.graph.erase_node(node)
            changed = True
    return finish_rewrite(module, changed=changed)


def _match_pattern(rewriting: Rewriting, node: Node) -> Node | None:
    if is_op(node, "mul") or is_quotient(node):
        return (
            _match_activation(rewriting, _factorize(node))
            or _match_division_by_sqrt(rewriting, node)
            or _match_rms_norm(rewriting, node)
        )
    if is_op(node, "reciprocal") and (radicand := _match_sqrt(node.args[0])) is not None:
        return rsqrt(rewriting, radicand)
    return _match_clamp(rewriting, node) if is_op(node, "clamp", "hardtanh") else None


def _match_clamp(rewriting: Rewriting, node: Node) -> Node | None:
    """Applies rules 1 and 6."""
    limits, source = facts_of(node).clamp_range(node), node.args[0]
    assert isinstance(source, Node)
    if limits == (0, 1) and (value := _match_sixth_plus_half(source)) is not None:
        return hardsigmoid(rewriting, value)
    if limits == (0, math.inf):
        return relu(rewriting, source)
    return relu6(rewriting, source) if limits == (0, 6) else None


def _is_close(number: float | None, expected: float) -> bool:
    return number is not None and math.isclose(number, expected, rel_tol=_RELATIVE_TOLERANCE)


def _if_read_once(value: object) -> Node | None:
    """Returns `value` if it is a node that has one reader."""
    return value if isinstance(value, Node) and value.op == "call_function" and len(value.users) == 1 else None


def _factorize(node: Node, depth: int = _DEPTH) -> _Product:
    """Returns all factors of `node`. Factors that are products or quotients without other readers are split further."""
    divides = is_quotient(node)
    if depth == 0 or not (divides or is_op(node, "mul")):
        return _Product(1.0, (node,))
    args = arguments(node)
    divisor = number_of(args["other"]) if divides else None
    if divides and not divisor:
        return _Product(1.0, (node,))
    number = 1.0 / divisor if divisor else 1.0
    factors: list[Node] = []
    for operand in [args["self"]] if divisor else [args["self"], args["other"]]:
        value = number_of(operand)
        if value is not None:
            number *= value
        elif (inner := _if_read_once(operand)) is not None:
            product = _factorize(inner, depth - 1)
            number *= product.number
            factors += product.factors
        else:
            factors.append(operand)
    return _Product(number, tuple(factors))


def _match_plus(value: object, number: float) -> Node | None:
    """Returns x if `value` is x + number."""
    node = _if_read_once(value)
    if node is None or not is_op(node, "add"):
        return None
    args = arguments(node)
    if args["alpha"] != 1:
        return None
    for operand, other in ((args["self"], args["other"]), (args["other"], args["self"])):
        if isinstance(operand, Node) and _is_close(number_of(other), number):
            return operand
    return None


def _match_shifted_relu6(value: object) -> Node | None:
    """Returns x if `value` is relu6(x + 3)."""
    node = _if_read_once(value)
    if node is None:
        return None
    return _match_plus(node.args[0], 3.0) if facts_of(node).clamp_range(node) == (0, 6) else None


def _match_sixth_plus_half(value: object) -> Node | None:
    """Returns x if `value` is x / 6 + 1 / 2."""
    sixth = _if_read_once(_match_plus(value, 0.5))
    if sixth is None:
        return None
    product = _factorize(sixth)
    return product.factors[0] if len(product.factors) == 1 and _is_close(product.number, 1 / 6) else None


def _match_activation(rewriting: Rewriting, product: _Product) -> Node | None:
    """Applies rules 1 to 3."""
    if len(product.factors) == 1 and _is_close(product.number, 1 / 6):
        value = _match_shifted_relu6(product.factors[0])
        return None if value is None else hardsigmoid(rewriting, value)
    if len(product.factors) != 2:
        return None
    for value, gate in (product.factors, product.factors[::-1]):
        if _is_close(product.number, 1 / 6) and _match_shifted_relu6(gate) is value:
            return hardswish(rewriting, value)
        if product.number == 1 and is_op(gate, "hardsigmoid") and gate.args[0] is value:
            return hardswish(rewriting, value)
        if _is_close(product.number, 0.5) and (approximate := _match_gelu_factor(_match_plus(gate, 1.0), value)):
            return gelu(rewriting, value, approximate)
    return None


def _match_gelu_factor(node: Node | None, value: Node) -> str | None:
    """Returns gelu's `approximate` if `node` is erf(value / sqrt(2)) or its form with tanh, else None."""
    if node is None or not is_op(node, "erf", "tanh"):
        return None
    inner = _if_read_once(node.args[0])
    product = _Product(1.0, ()) if inner is None else _factorize(inner)
    if is_op(node, "erf"):
        return "none" if product.factors == (value,) and _is_close(product.number, math.sqrt(0.5)) else None
    is_tanh = len(product.factors) == 1 and _is_close(product.number, math.sqrt(2 / math.pi))
    return "tanh" if is_tanh and _is_gelu_polynomial(product.factors[0], value) else None


def _is_gelu_polynomial(node: Node, value: Node) -> bool:
    """Returns whether `node` is value + 0.044715 * value ** 3."""
    if not is_op(node, "add") or arguments(node)["alpha"] != 1:
        return False
    operands = [node.args[0], node.args[1]]
    cube = _if_read_once(operands[1] if operands[0] is value else operands[0])
    if value not in operands or cube is None:
        return False
    product = _factorize(cube)
    return _is_close(product.number, 0.044715) and (
        product.factors == (value,) * 3 or _is_power(product.factors, value, 3)
    )


def _is_power(factors: Sequence[Node], value: object, exponent: float) -> bool:
    """Returns whether the only factor is value ** exponent."""
    if len(factors) != 1 or not is_op(factors[0], "pow"):
        return False
    args = arguments(factors[0])
    return bool(args["self"] is value and args["exponent"] == exponent)


def _match_sqrt(value: object) -> Node | None:
    """Returns y if `value` is sqrt(y)."""
    if not isinstance(value, Node):
        return None
    is_root = is_op(value, "sqrt") or (is_op(value, "pow") and value.args[1] == 0.5)
    inner = value.args[0] if is_root else None
    return inner if isinstance(inner, Node) else None


def _match_division_by_sqrt(rewriting: Rewriting, node: Node) -> Node | None:
    """Rule 4."""
    args = arguments(node)
    radicand = _match_sqrt(args["other"]) if is_quotient(node) else None
    if radicand is None:
        return None
    product = mul(rewriting, args["self"], rsqrt(rewriting, radicand))
    return _match_rms_norm(rewriting, product) or product


def _match_rms_norm(rewriting: Rewriting, node: Node) -> Node | None:
    """Rule 5."""
    args = arguments(node)
    for value, root in ((args["self"], args["other"]), (args["other"], args["self"])):
        if not isinstance(value, Node) or not isinstance(root, Node) or not is_op(root, "rsqrt"):
            continue
        variance = root.args[0]
        if isinstance(variance, Node) and is_op(variance, "add") and (eps := number_of(variance.args[1])):
            dims = _mean_square_dims(variance.args[0], value)
            if dims is not None and eps > 0 and not _is_first_division(value):
                return standardize(DimNormGroups(rewriting, dims), value, eps)
    return None


def _is_first_division(node: Node) -> bool:
    """Returns whether `node` is the result of the first division in `standardize`: a value times a squared rsqrt."""
    if not is_op(node, "mul"):
        return False
    squares = (factor.args for factor in node.args if isinstance(factor, Node) and len(factor.args) == 2)
    return any(root is other and is_op(root, "rsqrt") for root, other in squares)


def _mean_square_dims(mean: object, value: Node) -> list[int] | None:
    """Returns the dimensions over which `mean` is the mean of value * value, with keepdim, or None."""
    if not isinstance(mean, Node) or not is_op(mean, "mean") or "dim" not in arguments(mean):
        return None
    args = arguments(mean)
    square = args["self"]
    is_square = (is_op(square, "mul") and square.args == (value, value)) or (
        is_op(square, "square") and square.args[0] is value
    )
    is_square = is_square or _is_power([square], value, 2)
    return list(args["dim"]) if is_square and args["keepdim"] and args["dim"] else None
