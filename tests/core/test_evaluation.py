"""Tests of the evaluation of graphs: `openneutron.core.evaluation`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node

from openneutron.core.boundary import typed_errors
from openneutron.core.evaluation import GraphRun, compute_from, evaluate_call, infer_meta, last_uses, value_of
from openneutron.core.fx import placeholders
from openneutron.errors import ModelError
from openneutron.passes.functionalize import functionalize
from openneutron.passes.hold_states import hold_states


class Net(nn.Module):
    """A product of the input, and a sum with a value that is computed from a buffer alone."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x * 2) + self.offset.exp()


INPUT = torch.tensor([-1.0, 3.0])


def exported(model: nn.Module, *inputs: Tensor) -> GraphModule:
    return torch.export.export(model.eval(), inputs).module()


def graph_of_net() -> GraphModule:
    module = exported(Net(), INPUT)
    for node in [node for node in module.graph.nodes if node.op == "call_module"]:
        module.graph.erase_node(node)  # the guards, which return nothing
    return module


def node_named(module: GraphModule, prefix: str) -> Node:
    found: Node = next(node for node in module.graph.nodes if node.name.startswith(prefix))
    return found


def run_of(module: GraphModule, **options: Any) -> GraphRun:
    return GraphRun(module, dict.fromkeys(placeholders(module.graph), INPUT), **options)


def test_a_run_returns_the_outputs_of_the_module() -> None:
    module = graph_of_net()
    (output,) = run_of(module).run()
    assert torch.equal(output, module(INPUT))


def test_values_are_dropped_after_their_last_reader() -> None:
    module = graph_of_net()
    run = run_of(module)
    mul, relu = node_named(module, "mul"), node_named(module, "relu")
    run.run_until(relu)
    assert mul in run.values
    run.advance()
    assert mul not in run.values
    run.run()
    assert len(run.values) == 2  # the output node and its operand
    assert sorted(node for nodes in last_uses(module.graph).values() for node in nodes) == sorted(
        node for node in module.graph.nodes if node.users
    )


def test_values_can_be_kept() -> None:
    module = graph_of_net()
    run = run_of(module, keeps_values=True)
    run.run()
    assert run.values.keys() == set(module.graph.nodes)


def test_values_of_constants_are_read_when_they_are_needed() -> None:
    module = graph_of_net()
    run = run_of(module, keeps_values=True, only_dependents=True)
    run.run_until(node_named(module, "exp"))
    assert node_named(module, "exp") not in run.values
    module.get_buffer("offset").zero_()
    (output,) = run.run()
    assert torch.equal(output, torch.relu(INPUT * 2) + 1)


def test_a_value_is_computed_from_known_values() -> None:
    module = graph_of_net()
    relu = node_named(module, "relu")
    known = {node_named(module, "mul"): torch.tensor([-5.0, 5.0])}
    assert torch.equal(compute_from(known, module, relu), torch.tensor([0.0, 5.0]))
    assert relu in known
    assert not any(node.op == "placeholder" for node in known)


def test_the_depth_of_a_constant_is_not_limited() -> None:
    graph = torch.fx.Graph()
    node = graph.get_attr("start")
    for _ in range(5000):
        node = graph.call_function(torch.ops.aten.add.Tensor, (node, 1))
    graph.output(node)
    root = nn.Module()
    root.register_buffer("start", torch.zeros(1))
    assert value_of(GraphModule(root, graph), node).item() == 5000


class Counter(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(x)
        return self.count * 2


def test_states_are_not_written() -> None:
    module = exported(Counter(), INPUT)
    hold_states(module)
    functionalize(module)
    run = run_of(module)
    (output,) = run.run()
    assert torch.equal(output, INPUT * 2)
    assert torch.equal(module.get_buffer("count"), torch.zeros(2))


def test_an_error_names_the_node() -> None:
    module = graph_of_net()
    run = GraphRun(module, dict.fromkeys(placeholders(module.graph), torch.zeros(3)))
    with pytest.raises(ModelError, match="node 'add'"), typed_errors("Running the model"):
        run.run()


aten = torch.ops.aten


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("operator", "dtype", "args", "kwargs"),
    [
        (aten.relu.default, torch.float32, (), {}),
        (aten.hardtanh.default, torch.float32, (0.0, 6.0), {}),
        (aten.gt.Scalar, torch.float32, (1,), {}),
        (aten.isnan.default, torch.float32, (), {}),
        (aten.exp.default, torch.int64, (), {}),
        (aten.mul.Scalar, torch.int64, (2,), {}),
        (aten.mul.Scalar, torch.int64, (2.0,), {}),
        (aten.add.Scalar, torch.bool, (True,), {}),
        (aten.add.Scalar, torch.bool, (1,), {}),
        (aten.clamp.default, torch.float32, (None, 1.0), {}),
        (aten.gelu.default, torch.float32, (), {"approximate": "tanh"}),
        (aten.div.Tensor_mode, torch.float32, (2.0,), {"rounding_mode": "floor"}),
        (aten.relu_.default, torch.float32, (), {}),
        (aten.amax.default, torch.float32, ([1],), {}),
    ],
)
def test_the_inferred_value_is_that_of_the_operator(
    operator: Any, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any], layout: torch.memory_format
) -> None:
    with FakeTensorMode():
        operand = torch.ones(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=layout)
    graph = torch.fx.Graph()
    source = graph.placeholder("x")
    source.meta["val"] = operand
    node = graph.call_function(operator, (source, *args), kwargs)
    expected, found = evaluate_call(node, {source: operand}.__getitem__), infer_meta(node)
    assert isinstance(found, FakeTensor)
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_a_value_that_is_no_fake_tensor_is_computed() -> None:
    graph = torch.fx.Graph()
    source = graph.placeholder("x")
    source.meta["val"] = INPUT
    node = graph.call_function(aten.relu.default, (source,))
    assert torch.equal(infer_meta(node), torch.relu(INPUT))
