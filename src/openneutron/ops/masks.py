"""Decompositions of masks, which replace some values or hide them from a softmax.

A constant mask becomes a minimum with a constant tensor: `NEUTRAL` for values that are kept, `HIDDEN` for minus
infinity. A mask that fills in a larger number also needs a maximum. Observers ignore `NEUTRAL` and `HIDDEN`, so the
quantization range covers the visible values only, and both numbers saturate. `HIDDEN` becomes the lowest code;
`quantizer.observers.MaskedObserver` chooses a range in which a softmax returns zero for that code.

A bool mask that is computed at run time becomes the same minimum. The CPU selects one of the two constants for each
element of the mask, in float, and quantizes the result.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from openneutron.core.constants import constant_of, constant_value
from openneutron.core.fx import arguments, note, note_of, shape_of
from openneutron.ops.comparisons import selects_by_comparison, where_by_comparison
from openneutron.ops.declared import is_op, is_view
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts
from openneutron.ops.graph_builder import Builder
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = [
    "DECOMPOSED", "HIDDEN", "HIDDEN_AT_RUN_TIME", "HIDDEN_FROM_SOFTMAX", "HIDDEN_SUM", "MASK_REASON", "NEUTRAL",
    "add_and_hide", "fill", "fill_at_run_time", "hide_unless", "hides_at_run_time", "hides_from_softmax",
    "is_mask_computation", "limit_scores", "mark_mask_computation", "only_softmax_reads", "saturates",
]  # fmt: skip

aten = torch.ops.aten

# Larger in magnitude than activations of networks. A division by a scale does not overflow float32.
HIDDEN = -1e9
NEUTRAL = 1e12

# Scores of a row differ by less than 1e4. Before a softmax, adding this number therefore acts as minus infinity.
HIDDEN_FROM_SOFTMAX = -1e4

# Numbers up to this one act as minus infinity in masks that are computed at run time, and in constant masks with larger
# numbers in the same row. Models use -100, -999, -1e4 and the lowest float16.
HIDDEN_AT_RUN_TIME = -100.0

# Visible scores are higher than this. Scores to which -1e4 was added are lower.
HIDDEN_SUM = -5e3

# Operators that combine two masks: an add, or the minimum into which a mask was decomposed.
_JOINS = ("add", "minimum")
_MASKS = ("add", "masked_fill", "minimum", "clamp")
# The search for the softmax after a mask passes through at most this many views and other masks.
_DEPTH = 4

_MADE_FOR_A_MASK = "openneutron.made_for_a_mask"
MASK_REASON = (
    "It computes an attention mask from the model's inputs. The CPU computes masks in float, and then quantizes them."
)


def saturates(values: torch.Tensor) -> torch.Tensor:
    """Returns a bool tensor: whether a value of a mask or of a masked tensor is at least 1e9 (-`HIDDEN`) in magnitude.

    Such a value stands for minus infinity, or for no limit.
    """
    return values.abs() >= -HIDDEN


def add_and_hide(rewriting: Rewriting, value: Node, numbers: torch.Tensor, hidden: torch.Tensor) -> Node:
    """Computes torch.where(hidden, `HIDDEN`, value + numbers)."""
    if bool(numbers.any()):
        value = rewriting.call(aten.add.Tensor, value, rewriting.constant(numbers))
    return _fill_by_clamping(rewriting, value, hidden, HIDDEN) if bool(hidden.any()) else value


def limit_scores(builder: Builder, scores: Node) -> Node:
    """Computes clamp(scores, `HIDDEN`), because softmax returns NaN for a row of minus infinity."""
    return builder.call(aten.clamp.default, scores, HIDDEN)


def fill(rewriting: Rewriting, value: Node, where: torch.Tensor, number: float) -> Node:
    """Computes torch.where(where, number, value). A number that acts as minus infinity becomes `HIDDEN`."""
    hides = number <= (HIDDEN_AT_RUN_TIME if only_softmax_reads(rewriting.instance.node) else HIDDEN)
    return _fill_by_clamping(rewriting, value, where, HIDDEN if hides else number)


def hides_from_softmax(numbers: torch.Tensor) -> torch.Tensor:
    """Returns which numbers of a constant mask hide their score, if the mask is added to the scores of a softmax.

    -100 hides a score only if another number of the row is larger by 100 or more, because a number that is added to a
    whole row does not change the softmax.
    """
    hidden = numbers <= HIDDEN_FROM_SOFTMAX
    if numbers.dim() == 0:
        return hidden
    below_others = numbers <= numbers.amax(-1, keepdim=True) + HIDDEN_AT_RUN_TIME
    return hidden | (below_others & (numbers <= HIDDEN_AT_RUN_TIME))


def mark_mask_computation(node: Node) -> None:
    """Marks `node` as the computation of a mask from the model's inputs. The CPU computes it in float."""
    note(node, _MADE_FOR_A_MASK, True)


def is_mask_computation(node: Node) -> bool:
    """Whether `mark_mask_computation` marked `node`."""
    return bool(note_of(node, _MADE_FOR_A_MASK))


def fill_at_run_time(rewriting: Rewriting, value: Node, mask: Node, number: float, *, where: bool = True) -> Node:
    """Computes torch.where(mask == where, number, value) for a `mask` that is computed at run time.

    `number` must be 0 or act as minus infinity in a softmax.
    """
    if number == 0:
        return rewriting.call(
            aten.mul.Tensor, value, _select_on_cpu(rewriting, mask, *((0.0, 1.0) if where else (1.0, 0.0)))
        )
    bounds = (HIDDEN, NEUTRAL) if where else (NEUTRAL, HIDDEN)
    return rewriting.call(aten.minimum.default, value, _select_on_cpu(rewriting, mask, *bounds))


def hide_unless(rewriting: Rewriting, value: Node, mask: Node) -> Node:
    """Computes torch.where(mask, value, `HIDDEN`) for a `mask` that is computed at run time."""
    return fill_at_run_time(rewriting, value, mask, HIDDEN, where=False)


def _select_on_cpu(rewriting: Rewriting, mask: Node, chosen: float, other: float) -> Node:
    """Adds torch.where(mask, chosen, other), which the CPU computes in float."""
    numbers = (rewriting.constant(torch.tensor(number)) for number in (chosen, other))
    made = rewriting.call(aten.where.self, mask, *numbers)
    mark_mask_computation(made)
    return made


def hides_at_run_time(instance: OpInstance, value: str, mask: str, number: float | None) -> bool:
    """Whether `fill_at_run_time` can compute this instance. `value` and `mask` are names of arguments.

    Requires that both are computed, that `mask` is bool, that `value` is float32 in the shape of the output, and that
    `number` is 0 or acts as minus infinity.
    """
    filled, choice = instance.args[value], instance.args[mask]
    if not isinstance(filled, Node) or not isinstance(choice, Node) or number is None:
        return False
    if instance.is_constant(filled) or instance.is_constant(choice) or choice.meta["val"].dtype is not torch.bool:
        return False
    is_whole = shape_of(filled) == instance.shape and filled.meta["val"].dtype is torch.float32
    lowest = HIDDEN_AT_RUN_TIME if only_softmax_reads(instance.node) else HIDDEN
    return is_whole and (number == 0 or number <= lowest)


def only_softmax_reads(node: Node, depth: int = _DEPTH) -> bool:
    """Whether only softmaxes read `node`, directly or through views and masks."""
    return all(
        is_op(reader, "softmax")
        or (depth > 0 and (is_view(reader) or is_op(reader, *_MASKS)) and only_softmax_reads(reader, depth - 1))
        for reader in node.users
    )


def _fill_by_clamping(rewriting: Rewriting, value: Node, where: torch.Tensor, number: float) -> Node:
    """Computes torch.where(where, number, value) by a minimum and a maximum with constants.

    Leaves out the maximum if `number` is at most `HIDDEN`, and the minimum if `number` is at least `NEUTRAL`.
    """
    if number < NEUTRAL:
        upper = torch.full(where.shape, NEUTRAL).masked_fill(where, max(number, HIDDEN))
        value = rewriting.call(aten.minimum.default, value, rewriting.constant(upper))
    if number > HIDDEN:
        lower = torch.full(where.shape, -NEUTRAL).masked_fill(where, min(number, NEUTRAL))
        value = rewriting.call(aten.maximum.default, value, rewriting.constant(lower))
    return value


def _hidden_numbers(instance: OpInstance, numbers: torch.Tensor) -> torch.Tensor:
    """Returns which numbers of an added mask act as minus infinity: those of `hides_from_softmax` if only softmaxes
    read the sum, else those of at most `HIDDEN`.
    """
    return hides_from_softmax(numbers) if only_softmax_reads(instance.node) else numbers <= HIDDEN


@constraint
def has_a_constant_mask(instance: OpInstance) -> bool:
    """The value is a constant. The mask is a constant too, or comparisons of computed values compute it, or the value
    is 0 or hides scores from a softmax (at most {HIDDEN_AT_RUN_TIME:g}).
    """
    return instance.reads_constants("mask", "value") or _has_comparison_mask(instance) or _hides_computed(instance)


def _has_comparison_mask(instance: OpInstance) -> bool:
    return instance.number("value") is not None and selects_by_comparison(instance, "mask", "value")


def _hides_computed(instance: OpInstance) -> bool:
    return hides_at_run_time(instance, "self", "mask", instance.number("value"))


def _masked_fill(rewriting: Rewriting) -> Node:
    mask, number = rewriting.value_of("mask"), rewriting.instance.number("value")
    assert number is not None  # has_a_constant_mask holds
    if _has_comparison_mask(rewriting.instance):
        return where_by_comparison(rewriting, rewriting.args["mask"], number, rewriting.args["self"])
    if mask is None:
        return fill_at_run_time(rewriting, rewriting.args["self"], rewriting.args["mask"], number)
    return fill(rewriting, rewriting.args["self"], mask, number)


def _match_masked_sum(instance: OpInstance) -> tuple[Node, torch.Tensor] | None:
    """Returns (value, mask) of a sum value + mask if `mask` is a constant that hides some but not all values."""
    for name, other in (("self", "other"), ("other", "self")):
        mask = instance.constant(name)
        if mask is None or instance.args["alpha"] != 1:
            continue
        hidden = _hidden_numbers(instance, mask)
        # A constant that would hide all values is not a mask: it is part of arithmetic that computes a mask.
        if bool(hidden.any()) and not bool(hidden.all()):
            return instance.args[other], mask
    return None


def _integer_operand(instance: OpInstance) -> str | None:
    """Returns the name of a computed operand without a floating-point dtype; None if there is none."""
    for name in ("self", "other"):
        operand = instance.args[name]
        if (
            isinstance(operand, Node)
            and not operand.meta["val"].is_floating_point()
            and not instance.is_constant(operand)
        ):
            return name
    return None


def _match_joined_masks(instance: OpInstance) -> tuple[Node, Node, Node] | None:
    """Returns (scores, mask, join) of a sum scores + mask that only softmaxes read; else None.

    `join` is the operator that combines two smaller masks. `mask` is its output, or a view of its output that keeps the
    last two dimensions.
    """
    if instance.args["alpha"] != 1 or not only_softmax_reads(instance.node):
        return None
    for name, other in (("self", "other"), ("other", "self")):
        scores, mask = instance.args[other], instance.args[name]
        if not isinstance(mask, Node) or not isinstance(scores, Node) or shape_of(scores) != instance.shape:
            continue
        join = mask.args[0] if is_view(mask) and shape_of(mask)[-2:] == instance.shape[-2:] else mask
        if not isinstance(join, Node) or not is_op(join, *_JOINS) or arguments(join).get("alpha", 1) != 1:
            continue
        parts = join.all_input_nodes
        if len(parts) == 2 and all(_can_regroup(part, join, mask) for part in parts):
            return scores, mask, join
    return None


def _can_regroup(part: Node, join: Node, mask: Node) -> bool:
    """Whether `part` may be added to the scores by itself.

    `join` combines two masks, one of which is `part`; `mask` is `join` or a view of it. `part` must have fewer values
    than `join`, unless it is a constant bias that `join` adds, and must broadcast to `mask`.
    """
    shape, joined = shape_of(part), shape_of(join)
    constant = constant_value(part) if is_op(join, "add") else None
    is_bias = constant is not None and not _hides_scores(constant)
    if not 0 < math.prod(shape) < math.prod(joined) + is_bias:
        return False
    leading = (1,) * (len(joined) - len(shape)) + shape[:-2] if len(shape) >= 2 else ()
    is_view = len(joined) >= 2 and joined[-2:] == shape_of(mask)[-2:]
    return join is mask or (is_view and (leading == joined[:-2] or math.prod(leading) == 1))


def _reshape_to_broadcast(rewriting: Rewriting, part: Node, join: Node, mask: Node) -> Node:
    """Reshapes `part`, an operand of `join`, so that it broadcasts to `mask`, a view of `join`."""
    shape = shape_of(part)
    if join is mask or math.prod(shape[:-2]) == 1:
        wanted = shape if join is mask else shape[-2:]
    else:
        wanted = (*shape_of(mask)[:-2], *shape[-2:])
    if wanted == shape:
        return part
    constant = constant_of(rewriting.module, part)
    if constant is not None:
        return rewriting.constant(constant.reshape(wanted))
    return rewriting.call(aten.reshape.default, part, list(wanted))


def _add_each_mask(rewriting: Rewriting, scores: Node, mask: Node, join: Node) -> Node:
    """Joins the scores with each part of a mask: first with the part that hides nothing, such as a position bias, and
    a computed part before a constant part that hides scores.

    A bias that is added to a masked sum would move the lowest code, which hidden scores have.
    """
    is_add = is_op(join, "add")

    def place(part: Node) -> int:
        constant = constant_of(rewriting.module, part)
        return 1 if constant is None else 0 if is_add and not _hides_scores(constant) else 2

    for part in sorted(join.all_input_nodes, key=place):
        target = aten.add.Tensor if is_add or constant_of(rewriting.module, part) is None else aten.minimum.default
        scores = rewriting.call(target, scores, _reshape_to_broadcast(rewriting, part, join, mask))
    return scores


def _hides_scores(constant: torch.Tensor) -> bool:
    """Returns whether a constant that is added to scores contains a number that hides scores from a softmax."""
    return bool((constant <= HIDDEN_AT_RUN_TIME).any())


def _match_bias_after_mask(instance: OpInstance) -> tuple[Node, Node, Node] | None:
    """Returns (scores, mask, bias) of a sum (scores + mask) + bias that only softmaxes read; else None.

    `bias` is a constant that hides nothing. `mask` is computed, and has fewer values than the scores.
    """
    if instance.args["alpha"] != 1 or not only_softmax_reads(instance.node):
        return None
    for name, other in (("self", "other"), ("other", "self")):
        bias, inner = instance.args[name], instance.args[other]
        if not isinstance(bias, Node) or not isinstance(inner, Node) or not is_op(inner, "add"):
            continue
        constant, operands = instance.constant(name), inner.all_input_nodes
        if constant is None or _hides_scores(constant) or len(inner.users) > 1 or arguments(inner)["alpha"] != 1:
            continue
        masks = [operand for operand in operands if shape_of(operand) != instance.shape]
        if len(operands) == 2 and len(masks) == 1 and not instance.is_constant(masks[0]):
            return next(operand for operand in operands if operand is not masks[0]), masks[0], bias
    return None


def _adds_a_mask(instance: OpInstance) -> bool:
    searches = (_match_masked_sum, _integer_operand, _match_joined_masks, _match_bias_after_mask)
    return any(found(instance) is not None for found in searches)


def _masked_sum(rewriting: Rewriting) -> Node:
    integers = _integer_operand(rewriting.instance)
    if integers is not None:
        args = rewriting.args
        operands = {**args, integers: rewriting.call(aten.to.dtype, args[integers], torch.float32)}
        return rewriting.call(aten.add.Tensor, operands["self"], operands["other"], alpha=args["alpha"])
    joined = _match_joined_masks(rewriting.instance)
    if joined is not None:
        return _add_each_mask(rewriting, *joined)
    found = _match_masked_sum(rewriting.instance)
    if found is None:
        reordered = _match_bias_after_mask(rewriting.instance)
        assert reordered is not None  # _adds_a_mask holds
        scores, mask, bias = reordered
        return rewriting.call(aten.add.Tensor, rewriting.call(aten.add.Tensor, scores, bias), mask)
    value, numbers = found
    hidden = _hidden_numbers(rewriting.instance, numbers)
    return add_and_hide(rewriting, value, numbers.masked_fill(hidden, 0.0), hidden)


DECOMPOSED = (
    Decomposition(
        name="masked_fill",
        targets=("aten.masked_fill.Scalar", "aten.masked_fill.Tensor"),
        rewrite=_masked_fill,
        facts=Facts(computes_masks=True),
        becomes="minimum and maximum with constants; only minimum for minus infinity; mul for 0 with a computed mask",
        constraints=(has_a_constant_mask,),
    ),
    Decomposition(
        name="sum with a mask",
        targets=("aten.add.Tensor",),
        rewrite=_masked_sum,
        applies=_adds_a_mask,
        becomes="minimum with a constant, and add for a mask with values other than 0; integers become floats first",
        notes=f"A mask is a constant with minus infinity; before a softmax, also one with numbers of at most "
        f"{HIDDEN_AT_RUN_TIME:g}.",
    ),
)
