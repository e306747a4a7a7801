"""Recovery of layers that share a weight: unrolled steps, siamese branches, tied layers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow_support import seeded
from tests.models import Model
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.core.evaluation import GraphRun
from openneutron.core.fx import arguments
from openneutron.recovery import correct_biases, give_biases, layerwise, round_weights_by_gptq, shared_layers
from openneutron.recovery.shared_layers import layers_by_weight, plan_look_aheads

Build = Callable[[], nn.Module]
IMAGES = ((1, 4, 8, 8), (1, 4, 8, 8))
SEQUENCE = ((1, 4, 8),)


def looped(m: Any, x: Tensor) -> Any:
    for _ in range(3):
        x = torch.tanh(m.l(x))
    return m.head(x)


def interleaved(m: Any, x: Tensor) -> Any:
    """Two cells, and the second reads the first at each step."""
    first = second = torch.zeros(1, 8)
    for step in x.unbind(1):
        first = torch.tanh(m.a(step) + m.b(first))
        second = torch.tanh(m.c(first) + m.d(second))
    return m.head(second)


def nested(m: Any, x: Tensor) -> Any:
    """The outer layer is read before and after the loop of the inner layer."""
    x = torch.tanh(m.outer(x))
    for _ in range(3):
        x = torch.tanh(m.inner(x))
    return m.head(torch.tanh(m.outer(x)))


def siamese(m: Any, a: Tensor, b: Tensor) -> Any:
    def branch(x: Tensor) -> Any:
        return m.second(F.relu(m.first(x)))

    return m.head((branch(a) - branch(b * 1.5)).mean((2, 3)))


def pyramid(m: Any, a: Tensor, b: Tensor) -> Any:
    """The weight of a head is read with several sizes of images and strides."""
    del b
    levels = [F.relu(m.stem(a))]
    levels.append(F.max_pool2d(levels[0], 2))
    last = F.conv2d(levels[1], m.tower.weight, m.tower.bias, stride=2)
    return torch.cat([F.relu(m.tower(level)).mean((2, 3)) for level in levels] + [last.mean((2, 3))], 1)


def upsampling(m: Any, a: Tensor, b: Tensor) -> Any:
    return torch.cat([m.up(a), m.up(b * 1.5)], 1).mean((2, 3))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.net = kind(8, 12, batch_first=True, **options)
        self.head = nn.Linear(12 * (1 + self.net.bidirectional), 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x)[0].mean(1))  # type: ignore[no-any-return]


def linears(function: Any, *names: str) -> Build:
    return lambda: Model(function, **{name: nn.Linear(8, 8) for name in (*names, "head")})


NETWORKS: dict[str, tuple[Build, tuple[tuple[int, ...], ...], list[int]]] = {
    # the network, the shapes of its inputs, and how many layers read each shared weight
    "linear in a loop": (linears(looped, "l"), ((1, 8),), [3]),
    "interleaved": (linears(interleaved, "a", "b", "c", "d"), SEQUENCE, [3, 3, 3, 3]),  # the first step reads zeros
    "nested": (linears(nested, "outer", "inner"), ((1, 8),), [2, 3]),
    "siamese": (
        lambda: Model(siamese, first=nn.Conv2d(4, 8, 3), second=nn.Conv2d(8, 8, 3, groups=2), head=nn.Linear(8, 6)),
        IMAGES, [2, 2],
    ),
    "pyramid": (
        lambda: Model(pyramid, stem=nn.Conv2d(4, 8, 3, padding=1), tower=nn.Conv2d(8, 8, 3, padding=1)), IMAGES, [3],
    ),
    # gates and candidate have weights of their own
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE, [3, 3]),
    "two layers of lstm": (lambda: Recurrent(nn.LSTM, num_layers=2), SEQUENCE, [3, 3, 3, 3]),
    "bidirectional lstm": (lambda: Recurrent(nn.LSTM, bidirectional=True), ((1, 3, 8),), [2, 2, 2, 2]),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE, [3, 3]),
}  # fmt: skip
ROUNDED = tuple(name for name in NETWORKS if name != "two layers of lstm")
NETWORKS["transposed"] = (lambda: Model(upsampling, up=nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)), IMAGES, [2])


def inputs_of(name: str, count: int, seed: int = 1) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(8, 8, generator=generator)  # correlated features

    def value(shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return noise @ mixed / 2 + 0.5 if shape[-1] == 8 else noise

    return [tuple(map(value, NETWORKS[name][1])) for _ in range(count)]


def quantized(name: str, samples: list[tuple[Tensor, ...]], **options: Any) -> tuple[GraphModule, GraphModule]:
    """Returns the converted module without corrections, and its float graph."""
    model = seeded(NETWORKS[name][0]).eval()
    quantizer = NeutronQuantizer(**{"equalize": False, "correct_bias": False, **options})
    module = quantizer.transform_for_annotation(torch.export.export(model, samples[0]).module())
    give_biases(module)
    reference = copy.deepcopy(module)
    prepared = prepare_pt2e(module, quantizer)
    for sample in samples:
        prepared(*sample)
    return convert_pt2e(prepared), reference


def noise(reference: Any, module: Any, samples: list[tuple[Tensor, ...]]) -> float:
    with torch.no_grad():
        real, found = (torch.cat([run(*sample) for sample in samples]) for run in (reference, module))
    return float((found - real).square().sum() / (real - real.mean(0)).square().sum())


@pytest.mark.parametrize("name", ROUNDED)
def test_pooled_rounding_is_nearer_to_float_than_rounding_to_nearest(name: str) -> None:
    samples = inputs_of(name, 40)
    module, reference = quantized(name, samples, weight_bits=4)
    _, shared = layers_by_weight(module)
    assert [len(layer.uses) for layer in shared] == NETWORKS[name][2]
    kept, rounded = copy.deepcopy(module), copy.deepcopy(module)
    round_weights_by_gptq(rounded, reference, samples)
    correct_biases(kept, reference, samples)
    for layer, before in zip(layers_by_weight(rounded)[1], shared, strict=True):
        assert not torch.equal(layer.first.codes, before.first.codes)
        assert all(torch.equal(use.codes, layer.first.codes) for use in layer.uses)
        assert all(torch.equal(use.scale, layer.first.scale) for use in layer.uses)
    fresh = inputs_of(name, 30, seed=1)[20:] + inputs_of(name, 60)[40:]
    found = noise(reference, rounded, fresh)
    assert found < 0.9 * noise(reference, module, fresh)
    assert found < 1.05 * noise(reference, kept, fresh)


@pytest.mark.parametrize("name", ["siamese", "transposed", "pyramid", "lstm", "gru", "nested"])
@pytest.mark.parametrize("correct", [correct_biases, round_weights_by_gptq])
def test_equal_biases_stay_equal_and_leave_no_mean_shift(name: str, correct: Any) -> None:
    """A recurrent layer has no shift on the float inputs, another layer none on the quantized inputs."""
    samples = inputs_of(name, 8)
    module, reference = quantized(name, samples, weight_bits=4)
    correct(module, reference, samples)
    pools: dict[Any, list[Any]] = {}
    _, shared = layers_by_weight(module)
    recurrent = {use.node for layer in shared if layer.is_recurrent for use in layer.uses}
    assert bool(recurrent) == (name in {"lstm", "gru", "nested"})

    class Measured:
        def __init__(self, layer: shared_layers.SharedLayer) -> None:
            self.inputs = list(layer.uses)

        def add(self, layer: Any, layer_io: Any) -> None:
            inputs = layer_io.real if layer.node in recurrent else layer_io.quantized
            bias = arguments(layer.bias)["scale"]
            for values, wanted in zip(inputs, layer_io.wanted, strict=True):
                found = layer.run(values, layer.real_weight, layer.real_bias)
                pools.setdefault((layer.weight.args[0], bias), []).append((layer, layer.by_output(found - wanted)))

        def apply(self) -> None:
            pass

    layerwise.run_layerwise(reference, module, samples, lambda *_: None, Measured)
    assert pools
    for (_, scale), found in pools.items():
        assert len({layer.bias_bytes for layer, _ in found}) == 1
        assert torch.cat([error for _, error in found]).mean(0).abs().max() < 0.51 * scale


def test_errors_count_relative_to_the_outputs_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer reads smaller values that vary in other directions. Its outputs count as much as the first's."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(2, 3, 8, generator=generator) * torch.tensor([1.0, 0.05]).reshape(2, 1, 1)
    samples = [tuple(torch.randn(2, 4, 3, generator=generator) @ mixed) for _ in range(80)]
    monkeypatch.setitem(NETWORKS, "scaled", (linears(lambda m, a, b: m.l(a) + m.l(b), "l"), ((4, 8), (4, 8)), [2]))
    module, reference = quantized("scaled", samples[:40], weight_bits=3)
    errors = []
    for most in (1.0, 100.0):
        monkeypatch.setattr(sys.modules["openneutron.recovery.gptq_rounding"], "MOST_SHARE", most)
        rounded = copy.deepcopy(module)
        round_weights_by_gptq(rounded, reference, samples[:40])
        (shared,) = layers_by_weight(rounded)[1]
        change = shared.first.real_weight - reference.get_parameter("l.weight")
        with torch.no_grad():
            errors.append([float(torch.cat([(sample[i] @ change.T) for sample in samples[40:]]).var()) for i in (0, 1)])
    assert errors[1][1] < 0.7 * errors[0][1]


def test_a_weight_that_another_operator_reads_is_not_rounded() -> None:
    module, reference = quantized("siamese", inputs_of("siamese", 4), weight_bits=4)
    _, (first, _) = layers_by_weight(module)
    before = first.first.codes.clone()
    with module.graph.inserting_before(first.uses[1].node):
        other = module.graph.call_function(torch.ops.aten.abs.default, (first.uses[1].weight,))
    assert not layers_by_weight(module)[1][0].is_adjustable
    round_weights_by_gptq(module, reference, inputs_of("siamese", 4))
    assert torch.equal(first.first.codes, before)
    module.graph.erase_node(other)
    round_weights_by_gptq(module, reference, inputs_of("siamese", 4))
    assert not torch.equal(first.first.codes, before)


# ---------------------------------------------------------------------------------------------------------------- flows


@pytest.mark.parametrize(
    ("name", "recover"),
    [("siamese", "fast"), ("gru", "fast"), pytest.param("two layers of lstm", "auto", marks=pytest.mark.slow)],
)
def test_recovery_gains_and_adds_no_bytes(name: str, recover: str) -> None:
    model, samples = seeded(NETWORKS[name][0]).eval(), inputs_of(name, 40)
    plain, recovered = (
        quantize(model, samples[0], samples, recover=recipe, weight_bits=4, progress=False)
        for recipe in (None, recover)
    )
    fresh = inputs_of(name, 60)[40:]
    assert noise(model, recovered.module, fresh) < 0.9 * noise(model, plain.module, fresh)
    sizes = [len(lower(each).buffer) for each in (plain, recovered)]
    assert sizes[1] <= sizes[0] + 2048


@pytest.mark.parametrize("recover", ["fast", "auto"])
def test_outputs_that_no_input_reaches(recover: str) -> None:
    """The model returns a buffer and a weight that its layers share."""
    build: Build = lambda: Model(  # noqa: E731
        lambda m, x: (looped(m, x), m.strides, m.l.weight), l=nn.Linear(8, 8), head=nn.Linear(8, 8),
        strides=torch.tensor([8.0, 16.0]),
    )  # fmt: skip
    model, samples = seeded(build), inputs_of("linear in a loop", 8)
    program = lower(quantize(model, samples[0], samples, recover=recover, progress=False))
    values, strides, weight = program.run(*samples[0])
    wanted, *constants = model(*samples[0])
    assert torch.equal(strides, constants[0])
    torch.testing.assert_close(weight, constants[1], atol=float(constants[1].abs().max()) / 100, rtol=0.0)
    torch.testing.assert_close(values, wanted, atol=0.1, rtol=0.0)


# ----------------------------------------------------------------------------------------------------------- look-ahead


def runs_of_nodes(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Returns the number of nodes of both graphs, and how often a node is run in recovery."""
    samples: list[tuple[Tensor, ...]] = [(torch.linspace(-1, i, steps * 8).reshape(1, steps, 8),) for i in (1, 2)]
    module, reference = quantized(name, samples)
    count = 0
    advance = GraphRun.advance

    def counted(run: GraphRun) -> None:
        nonlocal count
        count += isinstance(run, layerwise.SamplesRun)
        advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(GraphRun, "advance", counted)
        round_weights_by_gptq(module, reference, samples)
    return len(module.graph.nodes) + len(reference.graph.nodes), count


@pytest.mark.parametrize(("name", "passes"), [("lstm", 3), ("interleaved", 1 + shared_layers.LOOK_AHEADS)])
def test_look_aheads_run_each_node_a_bounded_number_of_times(
    name: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in (3, 8):
        nodes, runs = runs_of_nodes(name, steps, monkeypatch)
        assert nodes < runs <= passes * nodes


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 100), st.integers(1, 2**29)), max_size=30))
def test_look_aheads_measure_each_layer_once_in_bounded_time_and_memory(drawn: list[tuple[int, int, int]]) -> None:
    drawn = sorted({first: (first, length, size) for first, length, size in drawn}.values())
    spans, sizes = [(first, first + length) for first, length, _ in drawn], [size for *_, size in drawn]
    assert [index for batch in plan_look_aheads(spans, [1] * len(spans)) for index in batch] == list(range(len(spans)))
    batches = plan_look_aheads(spans, [1] * len(spans))
    lengths = [1 + max(spans[i][1] for i in batch) - spans[batch[0]][0] for batch in batches]
    covered = {place for first, last in spans for place in range(first, last + 1)}
    assert sum(lengths) <= shared_layers.LOOK_AHEADS * len(covered)
    for batch in plan_look_aheads(spans, sizes):
        assert sum(sizes[index] for index in batch) <= shared_layers.MEMORY or len(batch) == 1


def test_layers_in_sequence_look_ahead_one_by_one() -> None:
    """Layers after each other, as in stacked recurrent networks, and layers within a longer span."""
    assert plan_look_aheads([(0, 9), (10, 19), (20, 29)], [1, 1, 1]) == [[0], [1], [2]]
    assert plan_look_aheads([(0, 99), (10, 19), (30, 39)], [1, 1, 1]) == [[0], [1], [2]]
    assert plan_look_aheads([(index, 100 + index) for index in range(8)], [1] * 8) == [[0, 1], [2, 3], [4, 5], [6, 7]]
