"""Outputs of integers and booleans are compared by the share of equal values, not by an SQNR."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.page.summaries import small_summary
from torch import Tensor, nn

from openneutron import lower, quantize, validate
from openneutron.accuracy.validate import _failures, differences_from
from openneutron.page.content import ValidationRow
from openneutron.page.headings import validation_heading

INDICES = torch.tensor([3, 0, 2, 1])


def row_of(found: Tensor, wanted: Tensor) -> Any:
    (difference,) = differences_from("float", [None], ["y"])
    difference.add(found, wanted)
    return difference.row()


@pytest.mark.parametrize(
    ("found", "wanted", "equal"),
    [
        (INDICES, INDICES, 1.0),
        (INDICES, torch.tensor([3, 0, 2, 0]), 0.75),
        (INDICES > 1, torch.tensor([True, True, True, True]), 0.5),
        (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 1.0),
        (INDICES.float(), INDICES.float() + 1, None),
    ],
)
def test_share_of_equal_values(found: Tensor, wanted: Tensor, equal: float | None) -> None:
    assert row_of(found, wanted).equal == equal


def test_no_limit_of_the_sqnr_holds_for_integers() -> None:
    integers = row_of(INDICES, INDICES.flip(0))
    floats = row_of(INDICES.float(), INDICES.flip(0).float())
    assert list(_failures([integers], None, 20.0, None)) == []
    assert len(list(_failures([floats], None, 20.0, None))) == 1


class Scores(nn.Module):
    """Returns scores and the indices of the two largest."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        scores = self.layer(x)
        return scores, torch.topk(scores, 2).indices


def test_validate_reports_the_share() -> None:
    torch.manual_seed(0)
    model, samples = Scores().eval(), [(torch.randn(1, 8),) for _ in range(8)]
    quantized = quantize(model, samples[0], samples, recover=None, progress=False)
    found = validate(lower(quantized), model, samples, quantized=quantized)
    by_name = {(one.name, one.reference): one for one in found.outputs}
    assert by_name["output0", "float"].equal is None
    share = by_name["output1", "float"].equal
    assert share is not None
    assert 0.5 <= share <= 1
    assert by_name["output1", "int8"].equal == 1
    assert "output1 against int8: equal" in str(found)


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ((0.5, 1.0), "At least 50.0 % of the values of each output of the .pte equal those of the float model"),
        ((1.0,), "The outputs of the .pte equal those of the float model."),
    ],
)
def test_heading_of_a_report_without_outputs_of_floats(shares: tuple[float, ...], text: str) -> None:
    rows = tuple(ValidationRow("y", None, None, 1.0 - share, None, "float", 4, share) for share in shares)
    assert validation_heading(replace(small_summary(), validation=rows, failures=())).startswith(text)
