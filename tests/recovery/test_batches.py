"""Runs of the float graph and of the converted module on several samples at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.oracle import Function
from tests.recovery_models import exported, images, network
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from openneutron import quantize
from openneutron.calibration.bare_graph import SINGLE, Batches
from openneutron.core.fx import is_dequantize
from openneutron.recovery import layerwise, round_weights_by_gptq
from openneutron.recovery.batches import FEWEST_SAMPLES, batches_of, batches_that_run, run_in_batch
from openneutron.recovery.channel_ranges import channel_ranges
from openneutron.recovery.weighted_layers import layers_of

FORMS = [Batches(3), Batches(4, channels_last=True), Batches(16, channels_last=True)]


def flattening() -> nn.Module:
    """Returns a network with literal shapes: views and an expanded constant."""

    def forward(conv: Any, head: Any, scale: Tensor, x: Tensor) -> Tensor:
        split = conv(x).relu().view(1, 2, 4, 8, 8).transpose(1, 2).reshape(1, 8, 64)
        return head(split * scale.expand(1, 8, 64)).flatten(1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    return Function(forward, nn.Conv2d(3, 8, 3, padding=1), nn.Linear(64, 4), torch.rand(1, 1, 64))


@torch.no_grad()
def squared_error(reference: GraphModule, module: GraphModule, samples: list[tuple[Tensor]]) -> float:
    errors = (module(*sample)[0] - reference(*sample)[0] for sample in samples)
    return sum(float(error.square().sum()) for error in errors)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("build", [network, flattening])
def test_batches_give_the_outputs_and_layer_inputs_of_single_samples(
    build: Callable[[], nn.Module], form: Batches
) -> None:
    samples = images(10)
    module = quantize(build().eval(), samples[0], samples, recover=None, progress=False)
    assert module.reference is not None
    runs: list[tuple[list[Any], list[Tensor]]] = []
    for each in (SINGLE, form):
        batches, seen = batches_of(samples, each), list[Tensor]()

        def visit(_: Any, layer_io: Any, seen: Any = seen, batches: Any = batches) -> None:
            seen += layer_io.of_samples(batches).quantized + layer_io.of_samples(batches).wanted

        outputs = layerwise.run_layerwise(module.reference, module.module, samples, visit, form=each)
        of_samples = [
            one for found in outputs for batch, (value,) in zip(batches, found, strict=True)
            for one in batch.samples_in(value)
        ]  # fmt: skip
        runs.append((of_samples, seen))
    (single, inputs), (batched, batched_inputs) = runs
    assert len(single) == len(batched) == 2 * len(samples)
    assert len(inputs) == len(batched_inputs) == 2 * len(samples) * len(list(layers_of(module.module)))
    step = max(float(value.abs().max()) for value in single) / 50  # a value may be rounded to the next code
    torch.testing.assert_close(torch.cat(batched), torch.cat(single), rtol=0, atol=step)


def test_channel_ranges_of_batches_equal_single_samples() -> None:
    module, samples = exported(network()), images(FEWEST_SAMPLES + 3)
    assert batches_that_run(module, samples).size > 1
    few = samples[: FEWEST_SAMPLES - 1]
    parts = [channel_ranges(module, few), channel_ranges(module, samples[len(few) :])]  # one by one
    for node, (low, high) in channel_ranges(module, samples).items():
        torch.testing.assert_close(low, torch.minimum(parts[0][node][0], parts[1][node][0]))
        torch.testing.assert_close(high, torch.maximum(parts[0][node][1], parts[1][node][1]))


@pytest.mark.parametrize(
    ("function", "count"),
    [
        pytest.param(lambda linear, x: linear(x), FEWEST_SAMPLES - 1, id="few samples"),
        pytest.param(lambda linear, x: linear(x - x.mean(0, keepdim=True)), 20, id="a mean over dimension 0"),
        pytest.param(lambda linear, x: linear(x.transpose(0, 1)), 20, id="samples in another dimension"),
    ],
)
def test_models_that_do_not_run_in_batches_run_one_by_one(function: Callable[[Any, Tensor], Any], count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [(torch.randn(1, 4, 8, generator=generator),) for _ in range(count)]
    assert batches_that_run(exported(Function(function, nn.Linear(8, 4)), (1, 4, 8)), samples) == SINGLE


def test_gptq_in_batches_is_as_accurate() -> None:
    samples = images(2 * FEWEST_SAMPLES)
    errors = []
    for used in (samples[: FEWEST_SAMPLES - 1], samples):  # one by one, and in batches
        module = quantize(seeded(network).eval(), samples[0], samples, recover=None, weight_bits=4, progress=False)
        assert module.reference is not None
        found = {}
        for name in ("before", "after"):
            found[name] = squared_error(module.reference, module.module, samples[:8])
            round_weights_by_gptq(module.module, module.reference, used)
        errors.append(found["after"] / found["before"])
    assert errors[1] < 0.8
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("operator", ["view", "reshape", "expand", "_unsafe_view"])
@pytest.mark.parametrize("is_computed", [False, True], ids=["literal", "computed"])
def test_sizes_are_multiplied_by_the_samples_once(operator: str, is_computed: bool) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0)) if is_computed else 1
    call = graph.call_function(getattr(torch.ops.aten, operator).default, (x, [size, 6]))
    graph.output(call)
    batch = torch.arange(24.0).reshape(4, 6)
    values: dict[Node, Any] = {x: batch, **({size: 4} if isinstance(size, Node) else {})}
    module = GraphModule(nn.Module(), graph)
    assert torch.equal(run_in_batch(module, call, values.__getitem__, 4), batch)


@pytest.mark.parametrize("zero_point", [-128, -3, 0, 127])
@pytest.mark.parametrize("overwrites", [False, True])
def test_roundings_equal_torch(zero_point: int, overwrites: bool) -> None:
    module = quantize(network().eval(), images(1)[0], images(2), recover=None, progress=False).module
    node = next(node for node in module.graph.nodes if is_dequantize(node) and isinstance(node.args[0], Node))
    scale = 0.0371
    node.args = (node.args[0], scale, zero_point, -128, 127, torch.int8)
    values = torch.cat([torch.linspace(-9, 9, 4001), (torch.arange(-260, 260) + 0.5) * scale, torch.tensor([1e6])])
    wanted = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, -128, 127)
    (found,) = layerwise.fake_quantized(node, [given := values.clone()], overwrites=overwrites)
    assert torch.equal(found, wanted)
    assert torch.equal(found.signbit(), wanted.signbit())  # 0.0 and -0.0 are equal
    assert torch.equal(given, found if overwrites else values)


def test_the_float_graph_of_a_result_stores_no_second_copy_of_the_weights() -> None:
    """A layer that stays in float reads one tensor in the converted module and in the float graph, and its own copy."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    samples = [(torch.randn(1, 64),) for _ in range(2)]
    found = quantize(model, samples[0], samples, recover=None, progress=False, layers={"2": "float"}, equalize=False)
    assert found.reference is not None
    graphs = ({value.data_ptr() for value in module.state_dict().values() if value.numel() == 64 * 64}
              for module in (found.module, found.reference, model))  # fmt: skip
    converted, reference, own = graphs
    assert converted & reference
    assert not reference & own


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [(["rows", -1], (4, 6)), (["rows", 3, 2], (4, 3, 2)), ([1, -1], (4, 6)), ([-1, 2], (12, 2)),
     ([1, "columns", 3], (4, 2, 3))],
    ids=str,
)
@pytest.mark.parametrize("operator", [torch.ops.aten.view.default, torch.ops.aten.reshape.default], ids=str)
def test_only_literal_sizes_are_multiplied_by_the_samples(operator: Any, sizes: list[Any], shape: Any) -> None:
    graph = Graph()
    value = graph.placeholder("x")
    computed = {
        name: graph.call_function(torch.ops.aten.sym_size.int, (value, dim))
        for dim, name in enumerate(("rows", "columns"))
    }
    node = graph.call_function(operator, (value, [computed.get(size, size) for size in sizes]))
    graph.output(node)
    batch = torch.randn(4, 2, 3)  # four samples of shape [1, 2, 3]
    values = {value: batch, computed["rows"]: 4, computed["columns"]: 2}
    found = run_in_batch(GraphModule(nn.Module(), graph), node, values.__getitem__, 4)
    torch.testing.assert_close(found, batch.reshape(shape))
