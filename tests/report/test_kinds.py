"""Operators of TFLite files whose kind is unknown."""

from __future__ import annotations

import pytest

from openneutron.errors import FormatError
from openneutron.formats.tflite.read import FileTensor, Operator, Subgraph
from openneutron.ir.kinds import KINDS
from openneutron.report.tflite_ops import as_ops, npu_operators

ENDS = tuple(FileTensor(index, f"tensor{index}", "INT8", (1, 8), None, None) for index in range(3))
KNOWN = Operator("RELU", False, ENDS[:1], ENDS[1:2], {})
UNKNOWN = Operator("CUMSUM", False, ENDS[1:2], ENDS[2:], {}, at=64)


def test_an_operator_of_an_unknown_kind_is_left_to_the_cpu() -> None:
    assert UNKNOWN.name not in KINDS
    assert npu_operators(Subgraph("", ENDS, ENDS[:1], ENDS[2:], (KNOWN, UNKNOWN))) == (KNOWN,)


def test_an_unknown_kind_has_no_cost() -> None:
    assert as_ops([KNOWN])[0].kind is KINDS["RELU"]
    with pytest.raises(FormatError, match=r"byte 64 .* the cost of the operator CUMSUM is unknown"):
        as_ops([KNOWN, UNKNOWN])
