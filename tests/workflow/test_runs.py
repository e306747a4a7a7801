"""Runs of a program on files."""

from __future__ import annotations

import json
import math

import torch

from openneutron.data import ClassScore, summarize_outputs
from openneutron.workflow.runs import FileRun


def test_outputs_that_are_not_finite_can_be_written_as_json() -> None:
    outputs = summarize_outputs([torch.tensor([1.0, math.inf, math.nan]), math.inf])
    run = FileRun("x.npy", tuple(outputs), classes=((ClassScore(0, "cat", math.nan),),))
    found = json.loads(json.dumps(run.as_dict(), allow_nan=False))
    assert [output["first"] for output in found["outputs"]] == [[1, None, None], [None]]
    assert found["outputs"][0]["maximum"] is None
    assert found["classes"] == [[{"index": 0, "name": "cat", "score": None}]]
