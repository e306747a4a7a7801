"""The rules of the passes for operators that move values: where each fires, and where it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.models import Model, bn, conv, image
from tests.oracle import quantized
from tests.passes.test_passes import after, exported, names
from torch import nn
from torch.fx import GraphModule

from openneutron import passes
from openneutron.core.fx import is_quantize, iterate_nodes
from openneutron.targets import TARGETS

TARGET = TARGETS["imxrt700"]
Pass = Callable[[GraphModule], bool]


def prepared(model: nn.Module, *inputs: torch.Tensor) -> list[str]:
    return names(passes.prepare(exported(model, *inputs), TARGET))


class TestRemoveIdentities:
    @pytest.mark.parametrize(
        "identity",
        [
            lambda x: x.to(torch.float32, copy=True), lambda x: x.clone(memory_format=torch.contiguous_format),
            lambda x: x.type_as(torch.ones(1)), torch.ops.aten._to_copy,
        ],
    )  # fmt: skip
    def test_rule_3_copies_that_change_nothing(self, identity: Callable[[torch.Tensor], torch.Tensor]) -> None:
        model = Model(lambda _, x: identity(F.relu(x)))
        module = exported(model)
        passes.eliminate_dead_code(module)
        passes.fold_constants(module)
        assert passes.remove_identities(module)
        assert names(module) == ["relu.default"]

    @pytest.mark.parametrize(
        "copy",
        [
            lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.permute(0, 2, 3, 1).contiguous(),
            lambda x: x.to(torch.int32),
        ],
    )  # fmt: skip
    def test_rule_3_not_if_dtype_or_format_change(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        after(passes.remove_identities, Model(lambda _, x: copy(F.relu(x))), changes=False)

    @pytest.mark.parametrize(
        "identity",
        [
            lambda x: x.view(1, 4, 8, 8), lambda x: x.reshape(x.shape), lambda x: x.flatten(0, 0),
            lambda x: x.squeeze(1), lambda x: x.expand(1, 4, 8, 8), lambda x: x.expand(-1, -1, -1, -1),
            lambda x: x.repeat(1, 1, 1, 1), lambda x: x.tile(1), lambda x: torch.broadcast_to(x, (1, 4, 8, 8)),
            lambda x: x.repeat_interleave(1, 2), lambda x: x[:, 0:4], lambda x: x.narrow(2, 0, 8), lambda x: x[::3],
            lambda x: torch.cat([x], 1), lambda x: x.permute(0, 1, 2, 3), lambda x: x.movedim(1, 1),
            lambda x: x.transpose(2, -2), lambda x: F.pad(x, (0, 0)), lambda x: F.pad(x, (0,) * 4, "replicate"),
            lambda x: F.pixel_shuffle(x, 1), lambda x: F.pixel_unshuffle(x, 1),
        ],
    )  # fmt: skip
    def test_rule_4_nothing_is_moved(self, identity: Callable[[torch.Tensor], torch.Tensor]) -> None:
        model = Model(lambda _, x: identity(F.relu(x)))
        assert names(after(passes.remove_identities, model)) == ["relu.default"]

    @pytest.mark.parametrize(
        "mover",
        [
            lambda x: x.transpose(2, 3), lambda x: F.pad(x, (1, -1)), lambda x: x.roll(1, 2), lambda x: x.flip(3),
            lambda x: F.channel_shuffle(x, 2), lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
            lambda x: torch.roll(x, (0, 1), (2, 3)), lambda x: x.expand(2, 4, 8, 8),
        ],
    )  # fmt: skip
    def test_rule_4_movers_that_keep_only_the_shape_stay(self, mover: Callable[[torch.Tensor], torch.Tensor]) -> None:
        after(passes.remove_identities, Model(lambda _, x: mover(F.relu(x))), changes=False)

    def test_rule_5_reshapes_of_reshapes(self) -> None:
        model = Model(lambda _, x: F.relu(x).flatten(1).view(16, 16).unsqueeze(0))
        assert names(after(passes.remove_identities, model)) == ["relu.default", "reshape.default"]

    def test_rule_5_reshapes_back_to_the_first_shape_are_removed(self) -> None:
        model = Model(lambda _, x: F.relu(x).flatten(1).view(1, 4, 8, 8))
        assert names(after(passes.remove_identities, model)) == ["relu.default"]

    def test_rule_5_reshapes_with_other_readers_stay(self) -> None:
        def function(_: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = F.relu(x).flatten(1)
            return y, y.view(2, 128)

        module = after(passes.remove_identities, Model(function))
        assert names(module) == ["relu.default", "flatten.using_ints", "reshape.default"]

    def test_rule_5_not_if_the_order_in_memory_would_change(self) -> None:
        """The first of two reshapes of a permuted value copies it. Without the copy, later operators would see other
        strides.
        """
        model = Model(lambda _, x: F.relu(x.permute(0, 2, 3, 1).reshape(1, -1).view(1, 8, 8, 4)))
        found = names(after(passes.remove_identities, model, changes=False))
        assert found == ["permute.default", "reshape.default", "view.default", "relu.default"]

    def test_rules_3_to_5_not_if_an_operator_writes(self) -> None:
        def function(_: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x.repeat(1, 1, 1, 1)
            y.view(1, -1).relu_()
            return x, y

        after(passes.remove_identities, Model(function), changes=False)


class TestFoldConstants:
    @pytest.mark.parametrize(
        "constant",
        [
            torch.zeros_like, torch.ones_like, lambda x: torch.full_like(x, 2.0), lambda x: x.new_zeros(4, 1, 1),
            lambda x: x.new_ones(4, 1, 1), lambda x: x.new_full((4, 1, 1), 0.5),
            lambda x: torch.ones_like(x[:, :1]).expand(-1, 4, -1, -1),
        ],
    )  # fmt: skip
    def test_rule_3_functions_of_shapes_are_folded(self, constant: Callable[[torch.Tensor], torch.Tensor]) -> None:
        model = Model(lambda _, x: F.relu(x) + constant(x))
        assert names(after(passes.fold_constants, model)) == ["relu.default", "add.Tensor"]

    def test_rule_3_filled_in_place(self) -> None:
        model = Model(lambda _, x: x + torch.empty_like(x).fill_(3.0))
        module = exported(model)
        passes.functionalize(module)
        assert passes.fold_constants(module)
        assert names(module) == ["add.Tensor"]

    def test_rule_3_not_random_numbers(self) -> None:
        module = exported(Model(lambda _, x: x + torch.rand_like(x)))
        assert not passes.fold_constants(module)


class TestRemoveDeadOperators:
    def test_rule_1_checks(self) -> None:
        model = Model(lambda _, x: F.relu(x).to(torch.int32))
        assert "_assert_tensor_metadata.default" in names(exported(model))
        assert names(after(passes.eliminate_dead_code, model)) == ["relu.default", "to.dtype"]

    def test_rule_2_a_branch(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            y = m.c(x)
            F.max_pool2d(y.abs(), 2).flatten(1)
            result: torch.Tensor = F.relu(y)
            return result

        model = Model(function, c=conv())
        assert names(after(passes.eliminate_dead_code, model)) == ["conv2d.default", "relu.default"]

    def test_rule_2_an_unread_part(self) -> None:
        def function(_: Any, x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, 1)
            second.exp()
            return first

        assert names(after(passes.eliminate_dead_code, Model(function))) == ["chunk.default", "getitem"]
        assert prepared(Model(function)) == ["slice.Tensor"]

    def test_rule_2_dead_writes_in_place_are_removed(self) -> None:
        def function(_: Any, x: torch.Tensor) -> torch.Tensor:
            x.clone().relu_().add_(1.0)
            return x.abs()

        assert prepared(Model(function)) == ["abs.default"]

    def test_rule_2_random_numbers_too(self) -> None:
        def function(_: Any, x: torch.Tensor) -> torch.Tensor:
            torch.rand_like(x)
            return x.abs()

        assert names(after(passes.eliminate_dead_code, Model(function))) == ["abs.default"]

    def test_an_input_that_nobody_reads_stays_an_input(self) -> None:
        model = quantized(Model(lambda _, x, __: x.abs()), ((2, 3), (4, 5)))
        assert model(torch.ones(2, 3), torch.ones(4, 5)).shape == (2, 3)
        assert sum(map(is_quantize, model.module.graph.nodes)) == 2

    def test_operators_that_write_are_not_removed(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            m.k.add_(1.0)
            return x.abs()

        model = Model(function, k=torch.zeros(4))
        assert not passes.eliminate_dead_code(module := exported(model))
        assert "add_.Tensor" in names(module)

    def test_a_dead_reader_does_not_keep_a_batch_norm(self) -> None:
        def function(m: Any, x: torch.Tensor) -> Any:
            y = m.c(x)
            y.abs()
            return m.b(y)

        assert prepared(Model(function, c=conv(), b=bn())) == ["conv2d.default"]


class TestShareResults:
    def test_rule(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([F.relu(m.c(x)) + 1.0, F.relu(m.c(x)) + 2.0], 1)

        found = names(after(passes.eliminate_common_subexpressions, Model(function, c=conv())))
        assert found == ["conv2d.default", "relu.default", "add.Tensor", "add.Tensor", "cat.default"]

    def test_rule_outputs_of_splits(self) -> None:
        model = Model(lambda _, x: x.chunk(2, 1)[0] + x.chunk(2, 1)[0])
        found = names(after(passes.eliminate_common_subexpressions, model))
        assert found == ["chunk.default", "getitem", "getitem", "add.Tensor"]

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: x[:, :1] + x[:, 1:2], lambda x: x.sum(1, False) + x.sum(1, True)[:, 0],
            lambda x: (x + 1) * (x + 1.0), lambda x: torch.dropout(x, 0.5, False) + torch.dropout(x, 0.4, False),
        ],
    )  # fmt: skip
    def test_calls_with_other_arguments_are_not_merged(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        after(passes.eliminate_common_subexpressions, Model(lambda _, x: function(x)), changes=False)

    def test_random_numbers_are_not_merged(self) -> None:
        module = exported(Model(lambda _, x: torch.rand_like(x) + torch.rand_like(x)))
        assert not passes.eliminate_common_subexpressions(module)

    def test_values_with_later_writes_are_not_merged(self) -> None:
        def function(_: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y, z = x.abs(), x.abs()
            y.view(1, -1).relu_()
            return y, z

        after(passes.eliminate_common_subexpressions, Model(function), changes=False)


class TestRemoveExpands:
    @pytest.mark.parametrize(
        "function",
        [
            lambda x, y: x * y.expand(2, 4, 6, 8), lambda x, y: y.expand(-1, -1, 6, 8) + x,
            lambda x, y: torch.maximum(x, torch.broadcast_to(y, (2, 4, 6, 8))),
            lambda x, y: (x - y.expand(2, 4, 6, 8)) * y.expand(2, 4, 6, 8),
        ],
    )  # fmt: skip
    def test_rule(self, function: Callable[..., torch.Tensor]) -> None:
        model = Model(lambda _, x, y: function(x, y))
        found = names(after(passes.remove_expands, model, image(2, 4, 6, 8), image(2, 4, 1, 1)))
        assert not {"expand.default", "broadcast_to.default"} & set(found)

    def test_rule_one_of_two_expands_is_removed(self) -> None:
        model = Model(lambda _, x: x.expand(2, 4, 3, 1) + x.expand(2, 4, 1, 1).expand(2, 4, 3, 1).abs())
        found = names(after(passes.remove_expands, model, image(2, 4, 1, 1)))
        assert found == ["expand.default", "expand.default", "abs.default", "add.Tensor"]

    def test_values_with_other_readers_stay(self) -> None:
        def function(_: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            z = y.expand(2, 4, 6, 8)
            return x + z, z.flatten(1)

        found = names(after(passes.remove_expands, Model(function), image(2, 4, 6, 8), image(2, 4, 1, 1)))
        assert found == ["expand.default", "add.Tensor", "flatten.using_ints"]

    @pytest.mark.parametrize(
        "function",
        [
            lambda x, y: x[:, :, :1] + y.expand(2, 4, 6, 8), lambda _, y: y.expand(2, 4, 6, 8).abs(),
            lambda x, y: torch.cat([x, y.expand(2, 4, 6, 8)], 1), lambda _, y: y.expand(2, 4, 6, 8).mul(y),
        ],
    )  # fmt: skip
    def test_expands_that_the_readers_need_stay(self, function: Callable[..., torch.Tensor]) -> None:
        model = Model(lambda _, x, y: function(x, y))
        after(passes.remove_expands, model, image(2, 4, 6, 8), image(2, 4, 1, 1), changes=False)


def merge(module: GraphModule) -> bool:
    return passes.slices_to_space_to_depth(module, TARGET)


def focus(x: torch.Tensor) -> list[torch.Tensor]:
    return [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]


class TestMergePhases:
    @pytest.mark.parametrize(
        "function",
        [
            lambda x: torch.cat(focus(x), 1), lambda x: torch.cat(focus(x), 0),
            lambda x: torch.cat([x[:, :, i::2, j::4] for i in range(2) for j in range(4)], -3),
            lambda x: torch.cat([x[:, i::2] for i in range(2)], 3),
            lambda x: torch.cat([x[i::1, j::2, :, k::2] for j in range(2) for k in range(2)  for i in (0,)], 2),
            lambda x: torch.concat([x[:, k::2, i::2, j::2] for j in range(2) for k in range(2) for i in range(2)], 0),
        ],
    )  # fmt: skip
    def test_rule(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        found = names(after(merge, Model(lambda _, x: function(x))))
        assert found == ["reshape.default", "permute.default", "reshape.default"]

    def test_rule_a_slice_that_others_read_stays(self) -> None:
        def function(_: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            parts = focus(x)
            return torch.cat(parts, 1), parts[3]

        found = names(after(merge, Model(function)))
        assert found == ["slice.Tensor", "slice.Tensor", "reshape.default", "permute.default", "reshape.default"]

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: torch.cat(focus(x), 2), lambda x: torch.cat(focus(x)[:3], 1),
            lambda x: torch.cat([focus(x)[i] for i in (0, 3, 1, 2)], 1),
            lambda x: torch.cat(focus(x)[:3] + focus(x.abs())[3:], 1),
            lambda x: torch.cat([x[:, :, i:7:2] for i in range(1)] * 2, 1),
            lambda x: torch.cat([x[:, :, ::3], x[:, :, 1::3], x[:, :, 1::3]], 1),
            lambda x: torch.cat([x[:, :, :4], x[:, :, 4:]], 1),
        ],
        ids=["along a split one", "not all", "not in order", "of two values", "part of them", "a rest", "no step"],
    )  # fmt: skip
    def test_slices_that_are_not_space_to_depth_stay(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        after(merge, Model(lambda _, x: function(x)), changes=False)


def move(module: GraphModule) -> bool:
    return passes.move_activations(module, TARGET)


def read_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.cat([m.c(x), m.d(x)], 1)
    return F.relu(y) + y


def inputs_read_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    y, z = m.c(x), m.d(x)
    result: torch.Tensor = F.relu(torch.cat([y, z], 1))[:, :4] + y + z
    return result


class TestNestConcatenations:
    def test_a_dense_block_reads_the_earlier_concatenation(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            features = [x]
            for layer in (m.a, m.b, m.c):
                features.append(layer(torch.cat(features, 1)))
            return torch.cat(features, 1)

        parts = {name: conv(4 * (number + 1), 4) for number, name in enumerate("abc")}
        module = after(passes.nest_concatenations, Model(function, **parts))
        cats = [node for node in module.graph.nodes if node.target is torch.ops.aten.cat.default]
        assert [len(list(iterate_nodes(node.args[0]))) for node in cats] == [1, 2, 2, 2]
        assert [cats[2].args[0][0], cats[3].args[0][0]] == cats[1:3]

    @pytest.mark.parametrize(
        "function",
        [
            lambda m, x: torch.cat([x, m.c(x)], 1).sum() + torch.cat([m.c(x), x, x], 1),
            lambda m, x: torch.cat([x, m.c(x)], 2).sum() + torch.cat([x, m.d(x), x], 1),
            lambda m, x: torch.cat([x], 1).sum() + torch.cat([x, m.c(x)], 1),
            lambda m, x: torch.cat([x, m.c(x), x], 1).sum() + torch.cat([x, m.d(x)], 1),
        ],
        ids=["another order", "another dimension", "of one", "a longer one"],
    )
    def test_must_not_fire(self, function: Callable[..., torch.Tensor]) -> None:
        after(passes.nest_concatenations, Model(function, c=conv(), d=conv()), changes=False)


class TestReadParts:
    @pytest.mark.parametrize(
        "part",
        [
            lambda y: y[:, 4:],
            lambda y: y[:, 5:7],
            lambda y: y[:, -1],
            lambda y: y.narrow(1, 0, 4),
            lambda y: torch.cat([y, y[:, :1]], 1)[:, 4:6],
        ],
        ids=["the last", "within one", "select", "narrow", "of a concatenation of it"],
    )
    def test_a_slice_within_one_part_reads_the_part(self, part: Callable[..., torch.Tensor]) -> None:
        module = after(
            passes.fold_slices_of_concatenations,
            Model(lambda m, x: part(torch.cat([m.c(x), m.d(x)], 1)), c=conv(), d=conv()),
        )
        assert "cat.default" not in names(module)

    @pytest.mark.parametrize(
        "part",
        [lambda y: y[:, 3:5], lambda y: y[:, ::2], lambda y: y[:, :, 2:], lambda y: y[:, :, 1]],
        ids=["two parts", "in steps", "another dimension", "select in another dimension"],
    )
    def test_must_not_fire(self, part: Callable[..., torch.Tensor]) -> None:
        model = Model(lambda m, x: part(torch.cat([m.c(x), m.d(x)], 1)), c=conv(), d=conv())
        after(passes.fold_slices_of_concatenations, model, changes=False)


class TestMoveActivations:
    def test_rule_1(self) -> None:
        model = Model(lambda m, x: F.relu(torch.cat([m.c(x), m.d(x)], 1)), c=conv(), d=conv())
        found = names(after(move, model))
        assert found == ["conv2d.default", "relu.default", "conv2d.default", "relu.default", "cat.default"]

    def test_rule_1_an_activation_may_move_to_several_inputs(self) -> None:
        model = Model(lambda m, x: F.relu6(torch.cat([m.c(x), F.max_pool2d(x, 3, 1, 1)], 1)), c=conv())
        assert names(after(move, model)).count("relu6.default") == 2

    def test_rule_1_through_nested_concatenations(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            return F.relu(torch.cat([torch.cat([m.c(x), m.d(x)], 1), m.e(x)], 1))

        module = after(move, Model(function, c=conv(), d=conv(), e=conv()))
        relus = [node for node in module.graph.nodes if "relu" in node.name]
        assert [str(node.args[0]) for node in relus] == ["conv2d", "conv2d_1", "conv2d_2"]

    def test_rule_2_the_same_activation_on_one_input(self) -> None:
        model = Model(lambda m, x: F.relu(torch.cat([F.relu(m.c(x)), m.d(x)], 1)), c=conv(), d=conv())
        assert names(after(move, model)).count("relu.default") == 2

    def test_rule_2_the_same_activation_on_all_inputs(self) -> None:
        model = Model(lambda m, x: F.relu(torch.cat([F.relu(m.c(x)), F.relu(x)], 1)), c=conv())
        found = names(after(move, model))
        assert found == ["conv2d.default", "relu.default", "relu.default", "cat.default"]

    def test_rule_2_not_by_another_range(self) -> None:
        model = Model(lambda m, x: F.relu(torch.cat([F.relu6(m.c(x)), m.d(x)], 1)), c=conv(), d=conv())
        assert names(after(move, model)).count("relu.default") == 2

    def test_rule_3_not_if_two_inputs_cannot_fuse_the_activation(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            return F.relu(torch.cat([m.c(x), F.max_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1)], 1))

        after(move, Model(function, c=conv()), changes=False)

    @pytest.mark.parametrize(
        "function",
        [
            lambda m, x: torch.sigmoid(torch.cat([m.c(x), m.d(x)], 1)),
            lambda _, x: F.relu(torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)),
            lambda m, x: F.relu(torch.cat([m.c(x), m.d(x)], 1).flatten(1)),
            read_twice,
            inputs_read_twice,
        ],
        ids=["is not fused", "nothing fuses", "not a concatenation", "read elsewhere", "inputs read elsewhere"],
    )
    def test_activations_that_are_not_moved(self, function: Callable[..., torch.Tensor]) -> None:
        after(move, Model(function, c=conv(), d=conv()), changes=False)

    def test_activations_that_the_target_does_not_fuse_stay(self) -> None:
        model = Model(lambda m, x: F.hardtanh(torch.cat([m.c(x), m.d(x)], 1), 0.0, 0.5), c=conv(), d=conv())
        after(move, model, changes=False)


def test_prepare_applies_all_passes_together() -> None:
    """Each pass runs on the output of those before it: expands of constants, identities of decompositions, equal
    results.
    """

    def function(m: Any, x: torch.Tensor) -> Any:
        ones: Any = torch.ones_like(x[:, :1]).expand_as(x)
        first, second = torch.broadcast_tensors(m.c(x), ones)  # type: ignore[no-untyped-call]
        return F.relu(torch.cat([first.contiguous(), m.b(m.d(x)), m.c(x)], 1)) * 2.0 + second.sum()

    model = Model(function, c=conv(), d=conv(), b=bn())
    assert prepared(model) == [
        "conv2d.default", "relu.default", "conv2d.default", "relu.default", "cat.default", "mul.Tensor", "add.Tensor"
    ]  # fmt: skip
