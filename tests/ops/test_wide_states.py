"""Cell states that consist of two int8 tensors: the function, the accuracy, and the selection by the option `wide`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, flat, lower_documented
from tests.oracle import Function, everything_on_the_npu, samples_like
from torch import nn

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.errors import OptionError
from openneutron.training.recurrent_layers import FEWEST_SAMPLES

STEPS, INPUTS, HIDDEN = 24, 6, 16
# A bias with which a gate is almost 1.
ALWAYS_OPEN = 5.0


def lstm(**options: Any) -> nn.LSTM:
    """Returns an LSTM that sums its inputs: the first cell state up to 20, the others up to about 2."""
    network = nn.LSTM(INPUTS, HIDDEN, batch_first=True, **options)
    for name, parameter in network.named_parameters():
        value = parameter.detach()
        if name.startswith("bias"):
            value.zero_()
        if name.startswith("bias_ih"):
            value.view(4, HIDDEN)[[0, 1, 3]] = ALWAYS_OPEN
        elif name.startswith("weight_ih"):
            candidate = slice(2 * HIDDEN, 3 * HIDDEN)
            value.mul_(0.1)[candidate] = 0.1 * torch.randn(HIDDEN, value.shape[1])
            value[2 * HIDDEN] = 4.0
        elif name.startswith("weight_hh"):
            value.mul_(0.1)
    return network


def everything(layer: nn.Module, values: torch.Tensor, *states: torch.Tensor) -> list[torch.Tensor]:
    return flat(layer(values, states) if states else layer(values))


def outputs(layer: nn.Module, values: torch.Tensor) -> Any:
    return layer(values)[0]


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[tuple[int, ...], ...]]]] = {
    "one layer": lambda: (Function(outputs, lstm()), ((1, STEPS, INPUTS),)),
    "two layers": lambda: (Function(outputs, lstm(num_layers=2)), ((1, STEPS, INPUTS),)),
    "both directions": lambda: (Function(outputs, lstm(bidirectional=True)), ((1, STEPS, INPUTS),)),
    "projected": lambda: (Function(outputs, lstm(proj_size=4)), ((1, STEPS, INPUTS),)),
    "last state": lambda: (Function(everything, lstm()), ((1, STEPS, INPUTS),)),
    "given state": lambda: (
        Function(everything, lstm()),
        ((1, STEPS, INPUTS), (1, 1, HIDDEN), (1, 1, HIDDEN)),
    ),
    "one step": lambda: (Function(outputs, lstm()), ((1, 1, INPUTS),)),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_float_graph_keeps_the_function(name: str) -> None:
    torch.manual_seed(0)
    model, shapes = MODELS[name]()
    model.eval()
    quantizer = NeutronQuantizer(wide=[nn.LSTM])
    inputs = samples_like(shapes, 1, 1, (-3.0, 3.0))[0]
    graph = quantizer.transform_for_annotation(torch.export.export(model, tuple(inputs)).module())
    for wanted, found in zip(flat(model(*inputs)), flat(graph(*inputs)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


Inputs = list[tuple[torch.Tensor, ...]]
DATA = samples_like(((1, STEPS, INPUTS),), 32, 0, (0.2, 0.5))
CALIBRATION, TESTS = DATA[:24], DATA[24:]


def stack(layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return Function(outputs, lstm(num_layers=layers)).eval()


# With one scale for all rows, the large weights of the first candidate would cost more than its large state.
ROWS: dict[str, Any] = {"weight_granularity": "per_channel"}
GAIN = 1.5  # decibels


@pytest.mark.parametrize(("recover", "gain"), [(None, GAIN), ("fast", 0.5), ("auto", 0.5)])
def test_two_tensors_hold_large_states(recover: str | None, gain: float) -> None:
    # Fewer samples than training needs: "auto" would train both models, and this test compares forms of states.
    model, samples = stack(), CALIBRATION[: FEWEST_SAMPLES - 1]
    narrow = quantize(model, samples[0], samples, recover=recover, **ROWS)
    wide = quantize(model, samples[0], samples, recover=recover, wide=[nn.LSTM], **ROWS)
    assert signal_to_noise(wide, model, TESTS) >= signal_to_noise(narrow, model, TESTS) + gain
    program = lower(wide)
    assert everything_on_the_npu(program)
    assert signal_to_noise(program.run, wide, TESTS) >= 30


def test_the_documented_flow_takes_the_option() -> None:
    model = stack()
    narrow, wide = (
        convert(model, CALIBRATION[0], calibration=CALIBRATION, quantizer=NeutronQuantizer(wide=keys, **ROWS))
        for keys in (None, ["aten.lstm.input"])
    )
    assert signal_to_noise(wide, model, TESTS) >= signal_to_noise(narrow, model, TESTS) + GAIN
    lowered = lower_documented(wide, CALIBRATION[0])
    assert (lowered.delegates, lowered.cpu) == (1, [])


class Pair(nn.Module):
    """Two LSTMs, of which a test selects one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = lstm(), nn.LSTM(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x)[0])[0]


KEYS: dict[str, tuple[Any, int]] = {
    "none": ((), 0),
    "module": (("second",), 1),
    "pattern": (("fi*",), 1),
    "type": ((nn.LSTM,), 2),
    "operator": (("aten::lstm.input",), 2),
    "several": (("first", "second"), 2),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_select_layers(name: str) -> None:
    keys, layers = KEYS[name]
    exported = torch.export.export(Pair().eval(), CALIBRATION[0]).module()
    graph = NeutronQuantizer(wide=keys).transform_for_annotation(exported)
    clamps = [node for node in graph.graph.nodes if node.target is torch.ops.aten.hardtanh.default]
    assert len(clamps) == layers * (3 * (STEPS - 2) + 2 if name else 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("first", "wide is a list of names"),
        (3, "wide is a list of names"),
        ([3], "A key of wide is"),
        (["thrid"], r"wide\['thrid'\] matches no module"),
        (["*.head"], r"wide\['\*.head'\] matches no lstm"),
        ([nn.Linear], "matches no lstm"),
    ],
)
def test_refused_keys(keys: Any, message: str) -> None:
    model = nn.Sequential()
    model.third, model.head = lstm(), nn.Linear(HIDDEN, 2)
    function = Function(lambda layers, x: layers.head(layers.third(x)[0]), model).eval()
    with pytest.raises(OptionError, match=message):
        quantize(function, CALIBRATION[0], CALIBRATION, wide=keys)


def test_wide_states_are_trained_quantized() -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

    model = stack().train()
    exported = torch.export.export(model, CALIBRATION[0]).module()
    prepared = prepare_qat_pt2e(exported, NeutronQuantizer(is_qat=True, wide=[nn.LSTM]))
    for sample in CALIBRATION:
        prepared(*sample)
    converted = convert_pt2e(prepared)
    assert signal_to_noise(converted, model.eval(), TESTS) >= 10


def test_a_cell_returns_its_state_in_one_tensor() -> None:
    model = Function(everything, nn.LSTMCell(INPUTS, HIDDEN)).eval()
    states = (torch.zeros(1, HIDDEN), torch.ones(1, HIDDEN))
    with pytest.raises(OptionError, match="matches no lstm"):
        quantize(model, (torch.zeros(1, INPUTS), *states), [(torch.ones(1, INPUTS), *states)], wide=[nn.LSTMCell])
