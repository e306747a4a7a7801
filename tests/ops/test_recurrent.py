"""Unrolled recurrent networks: stored weights, removed operators, accuracy, and the time to compile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.flow_support import flat
from tests.oracle import Function, everything_on_the_npu, lowered, quantized, samples_like
from torch import nn

from openneutron import CompileOptions, QuantizedModel, quantize
from openneutron.core.fx import is_dequantize, iterate_nodes, output_node
from openneutron.errors import ModelError
from openneutron.ir.graph import Graph
from openneutron.partition.clusters import Constants
from openneutron.partition.compile import lower_partition
from openneutron.partition.placing import place
from openneutron.runtime import HostProgram

STEPS, HIDDEN = 6, 8
NETWORKS = (nn.LSTM, nn.GRU, nn.RNN)
# The number of products of the input, and of the state at each step.
PRODUCTS = {nn.LSTM: 2, nn.GRU: 2, nn.RNN: 1}


def graph_of(model: QuantizedModel) -> Graph:
    """Returns the IR of the only partition."""
    program = torch.export.export(model.module, model.example_inputs)
    (partition,) = place(program, CompileOptions()).partitions
    return lower_partition(Constants(program), partition)


def kinds(graph: Graph) -> list[str]:
    return [op.kind.name for op in graph.ops]


def outputs(layer: nn.Module, values: torch.Tensor) -> Any:
    return layer(values)[0]


def last(layer: nn.Module, values: torch.Tensor) -> Any:
    return flat(layer(values)[1])[0]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
@pytest.mark.parametrize("read", [outputs, last], ids=["outputs", "last state"])
def test_weights_are_stored_once(network: Any, read: Any) -> None:
    graph = graph_of(quantized(Function(read, network(5, HIDDEN, num_layers=2)), ((STEPS, 1, 5),)))
    weights = {id(tensor) for tensor in graph.tensors() if tensor.data is not None and len(tensor.shape) == 2}
    assert len(weights) == 4 * PRODUCTS[network]
    biases = [tensor.data for tensor in graph.tensors() if tensor.data is not None and tensor.dtype == np.int32]
    assert len({bias.tobytes() for bias in biases}) <= 4 * PRODUCTS[network]


def test_the_first_step_has_no_product_of_a_zero_state() -> None:
    """The gates and the candidate of an LSTM and a GRU have products of their own."""
    for network in NETWORKS:
        graph = graph_of(quantized(Function(outputs, network(5, HIDDEN)), ((STEPS, 1, 5),)))
        assert kinds(graph).count("FULLY_CONNECTED") == PRODUCTS[network] * (1 + STEPS - 1)
    given = Function(lambda layer, x, h: layer(x, h)[0], nn.GRU(5, HIDDEN))
    graph = graph_of(quantized(given, ((STEPS, 1, 5), (1, 1, HIDDEN))))
    assert kinds(graph).count("FULLY_CONNECTED") == 2 * (1 + STEPS)


class Streaming(nn.Module):
    """One step of two cells and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.GRUCell(5, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, *others = states
        hidden = self.first(x, hidden)
        others = self.second(hidden, tuple(others))
        return self.head(others[0]), hidden, *others


@torch.no_grad()
def test_streaming() -> None:
    """The input and output of the state have equal qparams, and the state stays close to that of the float model."""
    torch.manual_seed(0)
    model, zero = Streaming().eval(), (torch.zeros(1, HIDDEN),) * 3
    calibration, state = [], zero
    for (x,) in samples_like(((1, 5),), 40, 0, (0.0, 1.0)):
        calibration.append((x, *state))
        _, *following = model(x, *state)
        state = tuple(following)
    converted = quantize(model, calibration[0], calibration)
    program = lowered(converted)
    assert everything_on_the_npu(program)
    *_, going_in = [node for node in converted.module.graph.nodes if node.op == "placeholder"]
    (quantize_node,) = (user for user in going_in.users if user.users)
    *_, going_out = iterate_nodes(output_node(converted.module.graph).args)
    assert is_dequantize(going_out)
    assert quantize_node.args[1:3] == going_out.args[1:3]

    host, found, wanted = HostProgram.from_bytes(program.buffer), zero, zero
    signal = noise = torch.zeros(())
    for (x,) in samples_like(((1, 5),), 40, 1, (0.0, 1.0)):
        y, *got = host.run(x, *found)
        z, *want = model(x, *wanted)
        found, wanted = tuple(got), tuple(want)
        signal, noise = signal + z.square().sum(), noise + (y - z).square().sum()
    assert 10 * torch.log10(signal / noise) >= 20


class Keywords(nn.Module):
    """A keyword spotter with 49 steps of 40 features."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.head = network(40, 64, num_layers=2, batch_first=True), nn.Linear(64, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.network(x)[0])
        return logits


@pytest.mark.parametrize("network", [nn.GRU, nn.LSTM], ids=lambda network: network.__name__)
@torch.no_grad()
def test_int8_has_enough_sqnr(network: Any) -> None:
    torch.manual_seed(0)
    model = Keywords(network).eval()
    converted = quantized(model, ((1, 49, 40),))
    inputs = [x for (x,) in samples_like(((1, 49, 40),), 4, 1, (0.0, 1.0))]
    wanted = torch.cat([model(x) for x in inputs])
    error = torch.cat([converted(x) for x in inputs]) - wanted
    assert 10 * torch.log10(wanted.square().sum() / error.square().sum()) >= 20


def test_packed_sequences_do_not_export() -> None:
    def packed(layer: nn.Module, x: torch.Tensor) -> Any:
        return layer(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2])))[0].data

    with pytest.raises(ModelError, match=r"values of a tensor as a size.*Give the padded sequences"):
        quantized(Function(packed, nn.GRU(5, HIDDEN)), ((3, 2, 5),))


def cells(layer: nn.Module, values: torch.Tensor) -> Any:
    return layer(values)[1][1]


def sums() -> nn.LSTM:
    """Returns an LSTM that sums its inputs, so that cell states grow beyond the range in which tanh changes."""
    network = nn.LSTM(1, 4)
    values = {name: value.detach() for name, value in network.named_parameters()}
    for value in values.values():
        value.zero_()
    values["bias_ih_l0"].view(4, 4)[[0, 1, 3]] = 8.0
    values["weight_ih_l0"][8:12] = torch.tensor([[3.0], [0.05], [0.1], [0.2]])
    return network


@pytest.mark.parametrize("wide", [None, [nn.LSTM]], ids=["one tensor", "two tensors"])
@torch.no_grad()
def test_a_cell_state_that_is_read_keeps_its_range(wide: Any) -> None:
    """Without a reader of the last cell state, the small states keep a fine scale, and large states saturate."""
    data = [(x.abs(),) for (x,) in samples_like(((12, 1, 1),), 16, 0, (0.0, 1.0))]
    model = Function(cells, sums()).eval()
    converted = quantize(model, data[0], data, recover=None, wide=wide)
    wanted, found = (torch.cat([each(x) for (x,) in data]) for each in (model, converted))
    assert wanted.max() > 8
    assert (found - wanted).abs().max() <= 0.05 * wanted.max()
    fine = Function(outputs, sums()).eval()
    converted = quantize(fine, data[0], data, recover=None, wide=wide)
    small = [torch.cat([each(x)[..., 1] for (x,) in data]) for each in (fine, converted)]
    assert (small[1] - small[0]).abs().max() <= 0.06
