"""The rules of every pass: where each fires, where it must not, and that the function does not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow_support import flat, seeded
from tests.models import Model, bn, bn1, conv, image
from torch import nn
from torch.fx import GraphModule

from openneutron import passes
from openneutron.core.fx import op_name
from openneutron.errors import InputError, ModelError
from openneutron.passes.functionalize import writes_memory
from openneutron.targets import TARGETS

FOLDING_TOLERANCE = 1e-4


def exported(model: nn.Module, *inputs: torch.Tensor) -> GraphModule:
    module: GraphModule = torch.export.export(model.eval(), inputs or (image(),)).module()
    return module


def names(module: GraphModule) -> list[str]:
    return [op_name(node).removeprefix("aten.") for node in module.graph.nodes if node.op == "call_function"]


@torch.no_grad()
def after(
    run: Callable[[GraphModule], bool], model: nn.Module, *inputs: torch.Tensor, changes: bool = True
) -> GraphModule:
    """Returns the graph after a pass, and checks that the pass reports a change and keeps the function."""
    inputs = inputs or (image(),)
    expected = flat(model.eval()(*(value.clone() for value in inputs)))
    module = exported(model, *inputs)
    before = names(module)
    assert run(module) == changes
    assert changes or names(module) == before
    module.graph.lint()
    module.recompile()
    for got, want in zip(flat(module(*(value.clone() for value in inputs))), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=FOLDING_TOLERANCE, atol=FOLDING_TOLERANCE)
    return module


class TestFunctionalize:
    def test_rule_1_writes_to_a_value_of_its_own(self) -> None:
        module = after(passes.functionalize, Model(lambda m, x: m.c(x).relu_(), c=conv()))
        assert names(module) == ["conv2d.default", "relu.default"]

    def test_rule_1_later_readers_read_the_result(self) -> None:
        def function(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = m.c(x)
            before = y * 2
            y.relu_()
            return before, y, y + 1

        module = after(passes.functionalize, Model(function, c=conv()))
        assert not any(map(writes_memory, module.graph.nodes))

    def test_rule_1_several_writes_in_sequence(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            y = m.c(x)
            y.relu_()
            y += x
            result: torch.Tensor = y.abs_().flatten(1)
            return result

        module = after(passes.functionalize, Model(function, c=conv()))
        assert not any(map(writes_memory, module.graph.nodes))

    @pytest.mark.parametrize(
        ("function", "becomes"),
        [
            (lambda x: (x + 1).pow_(2), "pow.Tensor_Scalar"),
            (lambda x: x.abs().pow_(x), "pow.Tensor_Tensor"),
            (lambda x: (x + 1).floor_divide_(x), "floor_divide.default"),
            (lambda x: (x + 1).div_(2, rounding_mode="floor"), "div.Tensor_mode"),
            (lambda x: F.dropout(x + 1, training=False, inplace=True), "dropout.default"),
        ],
    )
    def test_rule_1_for_every_overload(
        self, function: Callable[[torch.Tensor], torch.Tensor], becomes: str
    ) -> None:
        assert names(after(passes.functionalize, Model(lambda _, x: function(x))))[-1] == becomes

    def test_rule_1_views_made_of_the_result(self) -> None:
        model = Model(lambda m, x: m.d(F.relu(m.c(x), inplace=True)).flatten(1), c=conv(), d=nn.Dropout())
        assert "relu.default" in names(after(passes.functionalize, model))

    def test_rule_1_a_view_that_nothing_reads_any_more(self) -> None:
        def function(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = m.c(x)
            total = y.view(1, -1).sum(1)
            return total, y.relu_()

        assert "relu.default" in names(after(passes.functionalize, Model(function, c=conv())))

    @pytest.mark.parametrize(
        "view",
        [
            lambda y: y.view(1, -1), lambda y: y.flatten(1), lambda y: y[:, 0], lambda y: y.transpose(1, 2),
            lambda y: y.diagonal(dim1=2, dim2=3), lambda y: y.chunk(2, 1)[0], lambda y: y.expand(2, 4, 8, 8),
            lambda y: F.dropout(y, training=False), lambda y: y.unfold(3, 2, 2), lambda y: y.permute(0, 2, 3, 1)[:, 0],
        ],
    )  # fmt: skip
    def test_rule_2_a_view_is_read_later(self, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            y = m.c(x)
            seen = view(y)
            y.relu_()
            return seen

        module = after(passes.functionalize, Model(function, c=conv()))
        assert not any(map(writes_memory, module.graph.nodes))

    @pytest.mark.parametrize(
        "write",
        [
            lambda y: y.view(1, -1).relu_(), lambda y: y[:, :2].fill_(0.5), lambda y: y[:, 1].copy_(y[:, 2]),
            lambda y: y.transpose(1, 2)[:, 0].zero_(), lambda y: y.permute(0, 2, 3, 1)[..., ::2].mul_(2),
            lambda y: y.narrow(1, -2, 2).add_(1), lambda y: y.unsqueeze(0).squeeze(0)[0, 0].neg_(),
            lambda y: y.chunk(2, 1)[1].zero_(), lambda y: y.unbind(2)[3].zero_(), lambda y: y[0, 1, 2, 3].fill_(3.0),
            lambda y: y[:, 3].copy_(torch.ones(1, 1, 8, dtype=torch.float64)),
            lambda y: y.__setitem__((slice(None), 3), torch.ones(1, 1, 1, 8)), lambda y: y.contiguous().relu_(),
        ],
    )  # fmt: skip
    def test_rule_2_a_view_is_written_and_its_base_read_later(self, write: Callable[[torch.Tensor], object]) -> None:
        def function(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y: torch.Tensor = m.c(x)
            seen = y[:, 1:]
            write(y)
            return y, seen * 2

        module = after(passes.functionalize, Model(function, c=conv()))
        assert not any(map(writes_memory, module.graph.nodes))

    @pytest.mark.parametrize(
        "write",
        [
            lambda x, _: x[:, 0].fill_(0.0), lambda x, _: x.to(torch.float32)[:, 0].fill_(0.0),
            lambda _, y: y.unfold(3, 2, 1).zero_(), lambda _, y: y.as_strided((2, 2), (1, 1)).zero_(),
        ],
    )  # fmt: skip
    def test_rule_3_not_for_parts_or_irreversible_views_of_an_input(self, write: Callable[..., object]) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = m.c(x)
            write(x, y)
            return y + x

        module = exported(Model(function, c=conv()))
        passes.functionalize(module)
        assert any(map(writes_memory, module.graph.nodes))

    def test_rule_3_an_input_whose_view_is_read_later(self) -> None:
        def function(_: Any, x: torch.Tensor) -> torch.Tensor:
            seen = x[:, 0]
            x.relu_()
            return seen

        after(passes.functionalize, Model(function), changes=False)

    def test_rule_3_a_buffer(self) -> None:
        model = Model(lambda m, x: x + m.k.add_(1), k=torch.zeros(4, 1, 1))
        module = exported(model)
        assert not passes.functionalize(module)
        assert "add_.Tensor" in names(module)

    def test_writes_in_place_that_remain_are_refused(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            x[:, 0] = 0
            y: torch.Tensor = m.c(x)
            return y

        with pytest.raises(ModelError, match=r"writes in place.*Write the result to a new tensor") as error:
            passes.prepare(exported(Model(function, c=conv())), TARGETS["imxrt700"])
        assert error.value.source is not None


class TestFoldConstants:
    def test_operators_on_constants_become_constants(self) -> None:
        model = Model(lambda m, x: x + torch.relu(m.k * 2), k=torch.randn(4, 1, 1))
        assert names(after(passes.fold_constants, model)) == ["add.Tensor"]

    def test_operators_on_inputs_stay(self) -> None:
        model = Model(lambda m, x: (x * 2) + m.k, k=torch.randn(4, 1, 1))
        assert names(after(passes.fold_constants, model, changes=False)) == ["mul.Tensor", "add.Tensor"]

    def test_random_numbers_stay(self) -> None:
        module = exported(Model(lambda m, x: x + torch.bernoulli(m.k), k=torch.full((4, 1, 1), 0.5)))
        assert not passes.fold_constants(module)
        assert "bernoulli.default" in names(module)

    def test_parameters_stay_while_training(self) -> None:
        model = Model(lambda m, x: x + torch.relu(m.c.bias * 2).sum() + m.k.relu(), c=conv(), k=torch.randn(4, 1, 1))
        module = exported(model)
        assert passes.fold_constants(module, training=True)
        assert names(module) == ["mul.Tensor", "relu.default", "sum.default", "add.Tensor", "add.Tensor"]

    def test_statistics_stay_while_training(self) -> None:
        model = Model(lambda m, x: m.b(x) + m.b.running_mean.sum(), b=bn())
        module: GraphModule = torch.export.export(model.train(), (image(),)).module()
        assert not passes.fold_constants(module, training=True)

    def test_writes_stay(self) -> None:
        module = exported(Model(lambda m, x: x + m.k.add_(1), k=torch.zeros(4, 1, 1)))
        assert not passes.fold_constants(module)

    @pytest.mark.parametrize(
        ("compute", "constants"),
        [
            (lambda m: torch.cat([m.k[:2], m.other[2:]]), 1),
            (lambda m: torch.cat([m.k[:2], m.other[2:]]).relu() * 2, 1),
            (lambda m: torch.cat(m.k.chunk(2)[::-1]), 1),
            (lambda m: torch.zeros_like(m.k), 2),  # states that start with zeros
        ],
    )
    def test_equal_calls_become_one_constant(self, compute: Callable[[Any], torch.Tensor], constants: int) -> None:
        k, other = torch.randn(4, 1, 1), torch.ones(4, 1, 1)
        model = Model(lambda m, x: (x + compute(m)) * compute(m), k=k, other=other)
        assert len(constants_after_folding(model)) == constants

    @pytest.mark.parametrize(
        "other", [lambda m: m.other * 2, lambda m: m.k * 2.0, lambda m: m.k + m.other], ids=["operand", "type", "op"]
    )
    def test_other_calls_become_constants_of_their_own(self, other: Callable[[Any], torch.Tensor]) -> None:
        model = Model(lambda m, x: (x + m.k * 2) * other(m), k=torch.ones(4, 1, 1), other=torch.ones(4, 1, 1))
        assert len(constants_after_folding(model)) == 2

    def test_equal_calls_on_a_state_stay(self) -> None:
        """The buffer `state` has the values of `k`, but the model writes to it between the two calls."""

        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            first = x + (m.state * 2) * (m.k * 2)
            m.state.add_(1)
            second: torch.Tensor = first + m.state * 2
            return second

        module = exported(Model(function, state=torch.ones(4, 1, 1), k=torch.ones(4, 1, 1)))
        passes.hold_states(module)
        passes.functionalize(module)
        assert passes.fold_constants(module)
        assert names(module).count("mul.Tensor") == 3

    def test_equal_calls_on_parameters_stay_while_training(self) -> None:
        module = exported(Model(lambda m, x: (x + m.c.bias.sum()) * m.c.bias.sum(), c=conv()))
        assert not passes.fold_constants(module, training=True)


def constants_after_folding(model: nn.Module) -> set[str]:
    """Returns the names of the constants that the graph reads after `fold_constants`."""
    return {str(node.target) for node in after(passes.fold_constants, model).graph.nodes if node.op == "get_attr"}


class TestRemoveIdentities:
    def test_rule_1_dropout(self) -> None:
        model = Model(lambda m, x: F.relu(m.d(x)), d=nn.Dropout())
        assert names(after(passes.remove_identities, model)) == ["relu.default"]

    def test_rule_1_not_in_train_mode(self) -> None:
        module: GraphModule = torch.export.export(nn.Sequential(nn.Dropout(), nn.ReLU()).train(), (image(),)).module()
        assert not passes.remove_identities(module)

    def test_rule_2_aliases(self) -> None:
        model = Model(lambda _, x: F.relu(x.detach()))
        assert names(after(passes.remove_identities, model)) == ["relu.default"]

    def test_rule_2_not_detach_while_training(self) -> None:
        module = exported(Model(lambda _, x: F.relu(x.detach())))
        assert not passes.remove_identities(module, training=True)

    def test_rule_3_copies(self) -> None:
        model = Model(lambda _, x: F.relu(x.clone()).contiguous())
        assert names(after(passes.remove_identities, model)) == ["relu.default"]

    def test_rule_3_not_if_the_memory_format_changes(self) -> None:
        model = Model(lambda _, x: F.relu(x.contiguous(memory_format=torch.channels_last)))
        assert "contiguous.default" in names(after(passes.remove_identities, model, changes=False))

    def test_rule_3_not_if_an_operator_writes(self) -> None:
        def function(_: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x.clone()
            y.view(1, -1).relu_()
            return x, y

        assert "clone.default" in names(after(passes.remove_identities, Model(function), changes=False))


def read_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.c(x)
    result: torch.Tensor = m.b(y) + y
    return result


class TestFoldBatchNorm:
    @pytest.mark.parametrize(
        ("build", "inputs"),
        [
            (lambda: nn.Sequential(conv(), bn()), image()),
            (lambda: nn.Sequential(conv(bias=False), bn()), image()),
            (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding="same", groups=2), bn(8)), image()),
            (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), bn1(8)), image(2, 4, 9)),
            (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), bn(6)), image()),
            (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), bn(6)), image()),
            (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=4), bn()), image()),
            (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3), bn1(6)), image(2, 4, 9)),
            (lambda: nn.Sequential(nn.Linear(6, 8), bn1(8)), image(3, 6)),
            (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False)), image()),
        ],
    )
    def test_rule_1_into_weight_and_bias(self, build: Callable[[], nn.Module], inputs: torch.Tensor) -> None:
        module = after(passes.fold_batch_norm, seeded(build), inputs)
        assert len(names(module)) == 1

    def test_rule_1_other_readers_keep_a_shared_weight(self) -> None:
        model = seeded(lambda: Model(lambda m, x: m.b(m.c(F.relu(m.a(m.c(x))))) + m.c(x), c=conv(), a=bn(), b=bn()))
        assert "mul.Tensor" not in names(after(passes.fold_batch_norm, model))

    @pytest.mark.parametrize(
        ("build", "inputs", "convolution"),
        [
            (lambda: Model(read_twice, c=conv(), b=bn()), image(), "conv2d.default"),
            (lambda: nn.Sequential(bn(), conv()), image(), "conv2d.default"),
            (lambda: nn.Sequential(nn.Linear(5, 8), bn1(6)), image(2, 6, 5), "conv1d.default"),
            (lambda: nn.Sequential(nn.ReLU(), bn1(6)), image(3, 6), "conv1d.default"),
            (lambda: Model(lambda m, x: m.b(F.conv2d(x, x.abs())), b=bn(1)), image(), "conv2d.default"),
            (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm3d(3)), image(2, 3, 4, 4, 4), "conv3d.default"),
        ],
    )
    def test_rule_2_as_depthwise_convolution(
        self, build: Callable[[], nn.Module], inputs: torch.Tensor, convolution: str
    ) -> None:
        module = after(passes.fold_batch_norm, seeded(build), inputs)
        assert "batch_norm.default" not in names(module)
        found = [node for node in module.graph.nodes if op_name(node) == f"aten.{convolution}"]
        assert [node for node in found if node.args[6:] == (node.meta["val"].shape[1],)]

    def test_rule_3_as_arithmetic(self) -> None:
        statistics = {"mean": torch.ones(3), "variance": torch.ones(3)}
        model = Model(lambda m, x: F.batch_norm(F.relu(x), m.mean, m.variance), **statistics)
        found = names(after(passes.fold_batch_norm, model, image(2, 3, 2, 2, 2, 2)))
        assert found == ["relu.default", "mul.Tensor", "add.Tensor"]

    def test_new_constants_are_trainable_in_training(self) -> None:
        model = seeded(lambda: Model(lambda m, x: m.b(m.c(m.a(x))), a=bn(), c=conv(bias=False), b=bn()))
        module = after(lambda module: passes.fold_batch_norm(module, training=True), model)
        read = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
        parameters = dict(module.named_parameters())
        assert all(name in parameters and parameters[name].requires_grad for name in read)
        assert len(read) == 4

    def test_not_in_train_mode(self) -> None:
        module: GraphModule = torch.export.export(nn.Sequential(conv(), bn()).train(), (image(),)).module()
        assert not passes.fold_batch_norm(module)
        assert "batch_norm.default" in names(module)

    def test_nothing_to_fold(self) -> None:
        after(passes.fold_batch_norm, nn.Sequential(conv(), nn.ReLU()), changes=False)

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_any_small_graph_keeps_its_function(self, data: st.DataObject) -> None:
        """Convolutions and batch norms share weights and norms from a small set, on any values."""
        steps = data.draw(
            st.lists(st.tuples(st.sampled_from(["conv", "norm", "relu", "add"]), st.integers(0, 3), st.integers(0, 3)),
                     min_size=1, max_size=8)
        )  # fmt: skip

        def function(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values = [x]
            for kind, first, second in steps:
                value, other = (values[-1 - index % len(values)] for index in (first, second))
                part = m.get_submodule(f"{kind}{second % 2}") if kind in ("conv", "norm") else F.relu
                values.append(value + other if kind == "add" else part(value))
            return tuple(values[1:])

        model = seeded(lambda: Model(function, conv0=conv(), conv1=conv(bias=False), norm0=bn(), norm1=bn()))
        module = exported(model)
        passes.fold_batch_norm(module)
        assert "batch_norm.default" not in names(module)
        for got, want in zip(module(image()), model(image()), strict=True):
            assert (got - want).abs().max() <= FOLDING_TOLERANCE * want.abs().max().clamp(min=1)


class TestRemoveBatchCounts:
    def test_batch_counts_are_removed(self) -> None:
        module: GraphModule = torch.export.export(nn.Sequential(conv(), bn()).train(), (image(),)).module()
        assert passes.remove_batch_counts(module)
        assert not any(map(writes_memory, module.graph.nodes))

    def test_other_sums_stay(self) -> None:
        model = Model(lambda m, x: x + m.k.add_(1), k=torch.zeros(4, 1, 1))
        module = exported(model)
        assert not passes.remove_batch_counts(module)


class TestNameBadInputs:
    def test_shape_and_dtype(self) -> None:
        module = after(passes.add_input_guards, Model(lambda m, x: m.c(x), c=conv()))
        for bad in (image(1, 4, 9, 9), image().double()):
            with pytest.raises(InputError, match="the model was exported for"):
                module(bad)

    def test_a_second_run_adds_no_guards(self) -> None:
        module = after(passes.add_input_guards, Model(lambda m, x: m.c(x), c=conv()))
        assert not passes.add_input_guards(module)

    def test_graphs_without_a_check_get_no_check(self) -> None:
        module: GraphModule = torch.export.export(conv().eval(), (image(),)).module(check_guards=False)
        assert not passes.add_input_guards(module)

    def test_the_check_survives_another_export(self) -> None:
        module = after(passes.add_input_guards, Model(lambda m, x: m.c(x), c=conv()))
        for strict in (False, True):
            again = torch.export.export(module, (image(),), strict=strict)
            torch.testing.assert_close(again.module()(image()), module(image()))
        with pytest.raises(InputError, match="the model was exported for"):
            torch.export.export(module, (image(1, 4, 9, 9),))


def test_a_second_prepare_does_nothing() -> None:
    module = exported(seeded(lambda: nn.Sequential(conv(), bn(), nn.ReLU(inplace=True), nn.Dropout())))
    passes.prepare(module, TARGETS["imxrt700"])
    assert names(module) == ["conv2d.default", "relu.default"]
    code = module.code
    assert passes.prepare(module, TARGETS["imxrt700"]).code == code
