"""Checks that delegates of the NPU write their outputs to writable memory."""

from __future__ import annotations

from openneutron.errors import FormatError
from openneutron.formats.payload import argument_count
from openneutron.formats.pte import Method

__all__ = ["BACKEND", "check_delegate_outputs"]

BACKEND = "NeutronBackend"


def check_delegate_outputs(method: Method, what: str) -> None:
    """Checks the arguments of each delegate of the NPU: its outputs are tensors, and none of them is a constant.

    A constant lies in the program, which is in flash on a board and read-only on a host, so that the delegate would end
    the process or hang. The payload's header says which arguments are outputs. Raises `FormatError` that names the
    delegate, and PayloadError for a payload without header.
    """
    for number, call in enumerate(method.delegates):
        if call.backend != BACKEND:
            continue
        for position, value in enumerate(call.numbers[argument_count(call.payload) :]):
            slot = method.slots[value]
            if slot.kind != "tensor":
                raise FormatError(f"{what}: output {position} of delegate {number} is not a tensor.")
            if slot.is_external or (slot.has_data and not slot.is_planned):
                raise FormatError(
                    f"{what}: output {position} of delegate {number} is a constant of the program, which the delegate "
                    "cannot write to. Lower the model again."
                )
