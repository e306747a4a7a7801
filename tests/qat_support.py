"""The documented flow of quantization-aware training, as functions."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from tests.flow_support import flat
from tests.models import image
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

from openneutron import NeutronQuantizer
from openneutron.core.fx import op_name

BATCH = 6


def exported(model: nn.Module, shape: tuple[int, ...] = (4, 8, 8), *, strict: bool = False) -> GraphModule:
    """Exports the model in train mode, with a dynamic batch size."""
    example = image(BATCH, *shape)
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    shapes[example] = {0: torch.export.Dim.AUTO}
    module: GraphModule = torch.export.export(model.train(), (example,), dynamic_shapes=shapes, strict=strict).module()
    return module


def prepared(model: nn.Module, shape: tuple[int, ...] = (4, 8, 8), **options: Any) -> GraphModule:
    """Returns the prepared model in train mode."""
    quantizer = NeutronQuantizer(is_qat=True, **options)
    module: GraphModule = prepare_qat_pt2e(exported(model, shape), quantizer)
    return module


def train(module: Any, shape: tuple[int, ...] = (4, 8, 8), steps: int = 4) -> Any:
    """Runs a few training steps with an arbitrary loss."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for step in range(steps):
        outputs = flat(module(image(BATCH, *shape, seed=step)))
        loss = sum((output * image(*output.shape, seed=99)).mean() for output in outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module


def operators(module: GraphModule) -> Counter[str]:
    """Counts the operators, without those that compute sizes."""
    calls = (node for node in module.graph.nodes if node.op == "call_function")
    names = Counter(op_name(node) for node in calls if node.target is not operator.getitem)
    return Counter({name: count for name, count in names.items() if name != "aten.sym_size.int"})
