"""Names that a model does not have are refused as soon as its graph is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import openneutron
from openneutron import flow
from openneutron.errors import OptionError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.cells = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.cells(self.body(x).mean(3).permute(0, 2, 1))[0].flatten(1)


IMAGE = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize(
    ("option", "value", "name", "near"),
    [
        ("operators_not_to_delegate", ["conv2d_99"], "conv2d_99", "conv2d_1"),
        ("operators_not_to_delegate", ["aten::conv2d", "conv2d_2"], "conv2d_2", "conv2d_1"),
        ("operators_not_to_delegate", ["conv3d_1"], "conv3d_1", "conv2d_1"),
        ("operators_not_to_delegate", ["relu_1"], "relu_1", "relu"),
        ("operators_not_to_delegate", [None], "takes operator or node names, not None", ""),
        ("operators_not_to_delegate", ["conv2d", 3], "takes operator or node names, not 3", ""),
        ("operators_not_to_delegate", [b"conv2d"], "takes operator or node names, not b'conv2d'", ""),
        ("layers", {"conv2d_99": "float"}, "conv2d_99", ""),
        ("layers", {3: "float"}, "layers", ""),
        ("wide", [None], "A key of wide is", ""),
        ("wide", [3], "A key of wide is", ""),
        ("layers", {"body.3": "float"}, "body.3", "body.2"),
        ("layers", {"bdy": "float"}, "bdy", "body"),
        ("wide", ["cell"], "cell", "cells"),
    ],
)
def test_a_name_that_the_model_lacks_is_refused_before_calibration(
    option: str, value: Any, name: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrates(*_: object) -> None:
        raise AssertionError("calibration began")

    monkeypatch.setattr(flow, "quantize_by_recipe", calibrates)
    with pytest.raises(OptionError, match=name) as error:
        openneutron.build(net(), IMAGE, [IMAGE], **{option: value})
    assert near in str(error.value).partition("ear matches")[2]


@pytest.mark.parametrize("names", [["conv2d_1"], ["aten.lstm"], ["aten::relu", "conv2d"], ["mean"]])
def test_names_of_nodes_reach_the_lowering(names: list[str]) -> None:
    built = openneutron.build(net(), IMAGE, [IMAGE], operators_not_to_delegate=names, recover=None, analyze=False)
    reasons = " ".join(row.reason or "" for row in built.program.placement)
    assert all(f"'{name}' is in operators_not_to_delegate" in reasons for name in names)
