"""The memory format of example inputs and of data changes neither the prepared graph nor its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, lower_documented, seeded
from tests.models import Model, conv, image
from tests.passes.test_passes import after, exported, names
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, lower, passes, quantize
from openneutron.accuracy import analyze
from openneutron.targets import TARGETS

SHAPE = (1, 4, 8, 8)
# Returns a tensor with the same values and another memory format.
ORDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "usual": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "part of a wider one": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "one of a stack": lambda x: torch.cat([x, x]).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:1],
}


def _heads(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = F.relu(m.a(x))
    return torch.cat([head(y).permute(0, 2, 3, 1).contiguous().view(1, -1, 2) for head in (m.b, m.c)], 1)


def _shuffle(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    n, c, h, w = y.shape
    return m.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w))


def _windows(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x).permute(0, 2, 3, 1)
    y = m.l(y.view(1, 2, 4, 2, 4, 4).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, 4))
    return y.view(1, 2, 2, 4, 4, 4).permute(0, 1, 3, 2, 4, 5).reshape(1, 8, 8, 4).permute(0, 3, 1, 2)


def _in_channels_last(m: Any, x: torch.Tensor) -> Any:
    return m.b(F.relu(m.a(x.contiguous(memory_format=torch.channels_last))).contiguous())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "heads": lambda: Model(_heads, a=conv(), b=conv(), c=conv(4, 6)),
    "shuffle": lambda: Model(_shuffle, a=conv(), b=conv()),
    "windows": lambda: Model(_windows, a=conv(), l=nn.Linear(4, 4)),
    "in channels-last": lambda: Model(_in_channels_last, a=conv(), b=conv()),
    "flatten": lambda: Model(lambda m, x: m.l(F.relu(m.a(x)).flatten(1)), a=conv(), l=nn.Linear(256, 3)),
}


class TestForgetStrides:
    def test_rule_1_views_become_reshapes(self) -> None:
        module = after(passes.remove_stride_dependence, Model(lambda m, x: m.c(x).view(1, -1), c=conv()))
        assert names(module) == ["conv2d.default", "reshape.default"]

    def test_rule_2_copies_to_another_order_are_removed(self) -> None:
        module = after(passes.remove_stride_dependence, Model(lambda _, x: F.relu(x.permute(0, 2, 3, 1).contiguous())))
        assert passes.remove_identities(module)
        assert names(module) == ["permute.default", "relu.default"]

    @pytest.mark.parametrize(
        "copy",
        [lambda x: x.permute(0, 2, 3, 1).contiguous(), lambda x: x.contiguous(memory_format=torch.channels_last)],
    )
    def test_rule_2_not_a_copy_that_is_an_output(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        module = exported(Model(lambda _, x: copy(F.relu(x))))
        passes.remove_stride_dependence(module)
        assert not passes.remove_identities(module)

    def test_a_graph_in_the_usual_order_stays(self) -> None:
        after(passes.remove_stride_dependence, Model(lambda m, x: m.c(F.relu(x)), c=conv()), changes=False)


@pytest.mark.parametrize("name", MODELS)
def test_the_prepared_graph_is_the_same(name: str) -> None:
    model = seeded(MODELS[name])
    prepared = {
        order: passes.prepare(exported(model, arrange(image())), TARGETS["imxrt700"])
        for order, arrange in ORDERS.items()
    }
    graphs = {order: [(node.op, str(node.target)) for node in module.graph.nodes] for order, module in prepared.items()}
    assert all(graph == graphs["usual"] for graph in graphs.values())
    for module in prepared.values():
        for arrange in ORDERS.values():
            torch.testing.assert_close(module(arrange(image())), model(image()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "example", "given"),
    [
        ("heads", "channels last", "usual"),
        ("heads", "one of a stack", "columns first"),
        ("shuffle", "columns first", "channels last"),
        ("windows", "part of a wider one", "one of a stack"),
    ],
)
def test_both_flows(name: str, example: str, given: str) -> None:
    model, inputs = seeded(MODELS[name]), (ORDERS[example](image()),)
    data = [(ORDERS[given](image(seed=seed)),) for seed in range(16)]
    usual = [(value.contiguous(),) for (value,) in data[:2]]
    lowered = lower_documented(convert(model, inputs, calibration=data), inputs)
    assert (lowered.delegates, lowered.cpu) == (1, [])
    assert signal_to_noise(lowered.run, lambda x: model(x.contiguous()), data[:2]) > 25
    assert signal_to_noise(lowered.run, lowered.run, [data[0], usual[0]]) > 60
    program = lower(quantize(model, inputs, data, recover=None, progress=False))
    assert {row.where for row in program.placement} == {"npu"}
    assert signal_to_noise(program.run, lambda x: model(x.contiguous()), data[:2]) > 25


def test_recovery_and_analysis() -> None:
    model, inputs = seeded(MODELS["heads"]), (ORDERS["one of a stack"](image()),)
    orders = list(ORDERS.values())
    data = [(orders[seed % len(orders)](image(seed=seed)),) for seed in range(20)]
    quantized = quantize(model, inputs, data, recover="auto", progress=False)
    assert signal_to_noise(lower(quantized).run, lambda x: model(x.contiguous()), data[:5]) > 25
    assert analyze(model, quantized, data[:5]).layers


def test_examples_of_three_dimensions_that_are_transposed() -> None:
    model = seeded(
        lambda: Model(lambda m, x: m.l(F.relu(m.c(x)).view(1, -1)), c=nn.Conv1d(3, 4, 3), l=nn.Linear(32, 3))
    )
    data = [(image(1, 10, 3, seed=seed).transpose(1, 2),) for seed in range(8)]
    lowered = lower_documented(convert(model, (data[0][0].contiguous(),), calibration=data), data[0])
    assert (lowered.delegates, lowered.cpu) == (1, [])
    assert signal_to_noise(lowered.run, model, [(value.contiguous(),) for (value,) in data[:2]]) > 25


def test_training() -> None:
    model = seeded(MODELS["heads"])
    module = torch.export.export(model.train(), (ORDERS["channels last"](image()),)).module()
    prepared = prepare_qat_pt2e(module, NeutronQuantizer(is_qat=True))
    for arrange in ORDERS.values():
        prepared(arrange(image()))
    program = lower(convert_pt2e(prepared), (image(),))
    assert {row.where for row in program.placement} == {"npu"}
