"""Notes on the values of an input that consists of two int8 tensors (see `recovery.wide_inputs`)."""

from __future__ import annotations

from torch.fx import Node

from openneutron.core.fx import note, note_of
from openneutron.ir.graph import QParams

__all__ = [
    "coarse_input", "given_qparams", "is_refined_sum", "note_coarse", "note_qparams", "note_refined_sum",
    "note_scaled_input", "scaled_input",
]  # fmt: skip

_QPARAMS, _REFINED_SUM = "openneutron.given_qparams", "openneutron.refined_sum"
_COARSE, _SCALED = "openneutron.coarse_input", "openneutron.scaled_input"


def note_qparams(node: Node, qparams: QParams) -> None:
    """Notes on a float value the scale and the zero point that it gets in int8."""
    note(node, _QPARAMS, [qparams.scale[0], qparams.zero_point[0]])


def given_qparams(node: Node) -> QParams | None:
    """Returns the qparams that are noted on a value; None without a note."""
    found = note_of(node, _QPARAMS)
    return None if found is None else QParams((found[0],), (found[1],))


def note_coarse(node: Node, name: str) -> None:
    """Notes on the coarse tensor of an input the name of the input."""
    note(node, _COARSE, name)


def coarse_input(node: Node) -> str | None:
    """Returns the name of the input whose coarse tensor `node` is; None for another node."""
    name: str | None = note_of(node, _COARSE)
    return name


def note_scaled_input(node: Node, name: str) -> None:
    """Notes on the product of an input and the factors of its channels the name of the input."""
    note(node, _SCALED, name)


def scaled_input(node: Node) -> str | None:
    """Returns the name of the input whose product with its factors `node` is; None for another node."""
    name: str | None = note_of(node, _SCALED)
    return name


def note_refined_sum(node: Node) -> None:
    """Notes on a sum that its second operand is much smaller than the first one, which it refines."""
    note(node, _REFINED_SUM, True)


def is_refined_sum(node: Node) -> bool:
    """Returns whether `node` adds a small correction, its second operand, to the first one."""
    return bool(note_of(node, _REFINED_SUM))
