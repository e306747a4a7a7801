"""Lowers a model again with the changes that may make its program fit on a board."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from openneutron.core.messages import first_line
from openneutron.errors import OpenNeutronError
from openneutron.flow import lower
from openneutron.neutron_program import NeutronProgram
from openneutron.quantized_model import QuantizedModel
from openneutron.report.board_parts import CHANNELS_LAST, INT8
from openneutron.report.inspect import inspect_bytes
from openneutron.report.regions import FETCH, BoardFit, Remedy, remedy_of, with_remedies
from openneutron.targets import NeutronTargetSpec

__all__ = ["try_changes"]

OPTIONS = {INT8: {"int8_io": True}, CHANNELS_LAST: {}, FETCH: {"fetch_constants_to_sram": True}}
"""The options of `lower` of the changes that can be tried."""


def try_changes(quantized: QuantizedModel, program: NeutronProgram, options: Mapping[str, Any]) -> BoardFit | None:
    """Returns the verdict on the program on its board. Measures changes by lowering again.

    `options` are the options of `lower` that made the program. If the program does not fit, lowers the model once for
    each change of options or of the layout of inputs, and replaces the computed numbers of the change. Also tries
    channels-last inputs if their saving cannot be computed, and lists them if they save memory. Smaller layers need
    another model, so their numbers remain computed. If lowering fails, the numbers of the change remain computed, and
    a note gives the reason. Returns None for a program without a board.
    """
    if program.board is None:
        return None
    found = inspect_bytes(program.buffer, "the program", program.board).estimate.on_board
    if found is None or found.verdict in ("fits", "unknown"):
        return found
    tried, notes = dict[str, Remedy](), [*found.notes]
    for change in _changes(found, quantized):
        try:
            tried[change] = _try(quantized, program.board, options, change.split(", "))
        except OpenNeutronError as error:
            notes.append(f"The change {change} was not tried, because lowering failed: {first_line(error)}")
    remedies = [tried.pop(one.change, one) for one in found.remedies]
    more = [one for one in tried.values() if one.ram_bytes < found.ram_bytes]
    return replace(with_remedies(found, [*more, *remedies]), notes=tuple(notes))


def _changes(found: BoardFit, quantized: QuantizedModel) -> list[str]:
    """Returns the changes that can be tried: those of the verdict, and channels-last if an input is an NCHW image."""
    changes = [one.change for one in found.remedies if OPTIONS.keys() >= set(one.change.split(", "))]
    is_nchw = any(_channels_last(leaf) is not leaf for leaf in quantized.examples.leaves)
    return [*changes, CHANNELS_LAST] if is_nchw and CHANNELS_LAST not in changes else changes


def _try(quantized: QuantizedModel, board: NeutronTargetSpec, options: Mapping[str, Any], changes: list[str]) -> Remedy:
    if CHANNELS_LAST in changes:
        inputs, named = tree_map(_channels_last, (quantized.example_inputs, dict(quantized.example_kwargs)))
        quantized = replace(quantized, example_inputs=inputs, example_kwargs=named)
    changed = {name: value for change in changes for name, value in OPTIONS[change].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the program is measured only
        program = lower(quantized, target=board, **{**options, **changed})
    found = inspect_bytes(program.buffer, "the program", board).estimate.on_board
    assert found is not None, "the first program has this board, too"
    return remedy_of(", ".join(changes), found, "tried")


def _channels_last(value: Any) -> Any:
    """Returns the same object if it is no image, or an image in channels-last."""
    if (
        not isinstance(value, torch.Tensor)
        or value.dim() != 4
        or value.is_contiguous(memory_format=torch.channels_last)
    ):
        return value
    return value.contiguous(memory_format=torch.channels_last)
