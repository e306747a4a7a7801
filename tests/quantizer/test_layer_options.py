"""The `layers` option: the meaning of keys, their priority, and models with float layers."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import convert, lower_documented, seeded, worst_lsb
from tests.models import trained
from torch import nn
from torch.fx import GraphModule, Node

from openneutron import NeutronQuantizer, QuantizedModel, lower, quantize
from openneutron.core.fx import is_dequantize, is_quantize, modules_of, op_name
from openneutron.errors import OptionError
from openneutron.quantizer import UnquantizedWarning
from openneutron.quantizer.layer_options import Key, Layers

IMAGE = (1, 4, 8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.act(self.norm(self.conv(x))) + x
        return result


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(Block(), nn.ReLU(), Block())
        self.reduce = nn.Conv2d(4, 4, 1)
        self.head = nn.ModuleDict({"drop": nn.Dropout(), "linear": nn.Linear(4, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.reduce(self.features(x))).mean((2, 3))
        return F.softmax(self.head["linear"](self.head["drop"](x)), 1)


def label(value: object) -> str | None:
    """Returns a name for a test that is equal in each process."""
    return None if isinstance(value, set) or " at 0x" in str(value) else str(value)


def image(seed: int = 0) -> torch.Tensor:
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(seed))


def exported(strict: bool) -> GraphModule:
    """Returns the graph that the quantizer annotates, with nodes named after the operators of the model."""
    module = torch.export.export(seeded(Net), (image(),), strict=strict).module()
    assert isinstance(module, GraphModule)
    return module


def settings(layers: dict[Key, str], strict: bool) -> dict[str, str]:
    """Returns how each operator of the model is quantized."""
    chosen = Layers(layers, "per_tensor")
    nodes = [node for node in exported(strict).graph.nodes if node.op == "call_function"]
    return {node.name: "float" if chosen.leave_in_float(node) else chosen.granularity(node) for node in nodes}


BLOCK = {"conv2d", "silu_", "add", "batch_norm"}
SECOND_BLOCK = {"conv2d_1", "silu__1", "add_1", "batch_norm_1"}
EVERYTHING = {*BLOCK, *SECOND_BLOCK, "relu", "conv2d_2", "relu_1", "mean", "dropout", "linear", "softmax"}


class TestKeys:
    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize(
        ("key", "expected"),
        [
            ("features.0", BLOCK),
            ("features.0.conv", {"conv2d"}),
            ("features", {*BLOCK, *SECOND_BLOCK, "relu"}),
            ("head", {"linear", "dropout"}),
            ("", EVERYTHING),
            ("features.[02]", BLOCK | SECOND_BLOCK),
            ("*.act", {"silu_", "silu__1"}),
            ("head.?inear", {"linear"}),
            (nn.Conv2d, {"conv2d", "conv2d_1", "conv2d_2"}),
            (Block, BLOCK | SECOND_BLOCK),
            (Net, EVERYTHING),
            ("aten.softmax.int", {"softmax"}),
            ("aten::conv2d", {"conv2d", "conv2d_1", "conv2d_2"}),
            ("aten.relu", {"relu", "relu_1"}),
        ],
        ids=label,
    )
    def test_float(self, key: Key, expected: set[str], strict: bool) -> None:
        found = settings({key: "float"}, strict)
        assert set(found) == EVERYTHING
        assert {name for name, setting in found.items() if setting == "float"} == expected

    @pytest.mark.parametrize(
        ("layers", "decides"),
        [
            ({"aten.conv2d.default": "per_channel", "features.0.conv": "float"}, "per_channel"),
            ({"aten::conv2d": "float", "aten.conv2d.default": "per_channel"}, "per_channel"),
            ({"features.0": "per_channel", "features.0.*": "float"}, "per_channel"),
            ({"features.*": "per_channel", nn.Conv2d: "float"}, "per_channel"),
            ({"features.0.conv": "per_channel", "features.0": "float"}, "per_channel"),
            ({"features.0": "float", "features.0.conv": "per_channel"}, "per_channel"),
            ({"features.0.*": "per_channel", "features.*0": "float"}, "per_channel"),
            ({"*.conv": "float", "features.*": "per_channel"}, "per_channel"),
            ({"features.*": "per_channel", "*.conv": "float"}, "float"),
            ({Block: "float", nn.Conv2d: "per_channel"}, "per_channel"),
            ({nn.Sequential: "per_channel", Net: "float"}, "per_channel"),
            ({"": "per_channel", nn.Linear: "float"}, "per_channel"),
            ({"head": "per_channel"}, "per_tensor"),
        ],
        ids=label,
    )
    def test_the_most_specific_key_decides(self, layers: dict[Key, str], decides: str) -> None:
        assert settings(layers, strict=False)["conv2d"] == decides


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.layers = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        x = self.layers[1:](self.layers[0](x))
        x = self.blocks[-1](self.blocks[0](x))
        return F.relu(x)


@pytest.mark.parametrize("strict", [False, True])
def test_module_names_equal_the_model(strict: bool) -> None:
    module = torch.export.export(Sliced().eval(), (image(),), strict=strict).module()
    assert isinstance(module, GraphModule)
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    names = [modules_of(node)[-1][0] for node in nodes]
    assert names == ["blocks.0", "blocks.1", "layers.0", "layers.1", "layers.2", "blocks.0", "blocks.2", ""]
    assert set(names) <= {name for name, _ in Sliced().named_modules()}
    assert modules_of(nodes[0])[-1][1] == "torch.nn.modules.conv.Conv2d"


def test_a_node_without_metadata_is_in_no_module() -> None:
    assert modules_of(torch.fx.Graph().placeholder("x")) == ()


def quantized(layers: dict[Key, str], model: nn.Module | None = None, **options: Any) -> QuantizedModel:
    """Quantizes a model. A layer that the user keeps in float causes no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnquantizedWarning)
        return quantize(model or seeded(Net), (image(),), [image(), image(1)], layers=layers, **options)


def float_operators(module: GraphModule) -> set[str]:
    """Returns the operators without a quantize or dequantize next to them."""

    def is_float(node: Node) -> bool:
        around = [*node.all_input_nodes, *node.users]
        return node.op == "call_function" and not any(is_dequantize(other) or is_quantize(other) for other in around)

    return {op_name(node) for node in module.graph.nodes if is_float(node)}


class TestFloat:
    @pytest.mark.parametrize(
        ("layers", "left"),
        [
            ({"features.0": "float"}, {"features.0", "features.0.conv", "features.0.act"}),
            ({nn.Linear: "float"}, {"head.linear"}),
            ({"features.2.act": "float", "head": "float"}, {"features.2.act", "head.linear"}),
            ({"aten.mean.dim": "float", "reduce": "float"}, {"", "reduce"}),
            ({"": "float", "reduce": "per_tensor"}, {"", "features.0", "features.0.conv", "features.0.act",
             "features.1", "features.2", "features.2.conv", "features.2.act", "head.linear"}),
        ],
        ids=label,
    )  # fmt: skip
    def test_neighbors_are_quantized_and_the_program_follows(self, layers: dict[Key, str], left: set[str]) -> None:
        model = quantized(layers)
        program = lower(model)
        on_the_cpu = [row for row in program.placement if row.where == "cpu"]
        assert {row.module for row in on_the_cpu} == left
        assert all(re.fullmatch(r"layers\[.*\] leaves it in float\.", row.reason or "") for row in on_the_cpu)
        assert worst_lsb(model.module, program.run, [(image(),), (image(2),)]) <= 1
        torch.testing.assert_close(model(image()), seeded(Net)(image()), atol=0.02, rtol=0)

    @pytest.mark.parametrize("strict", [False, True])
    def test_the_documented_flow_does_the_same(self, strict: bool) -> None:
        layers: dict[Key, str] = {"features.0": "float", "reduce": "per_channel"}
        short = quantized(layers, batch_size=1)
        documented = convert(
            seeded(Net), (image(),), quantizer=NeutronQuantizer(layers=layers), strict=strict,
            calibration=[(image(),), (image(1),)],
        )  # fmt: skip
        assert torch.equal(documented(image()), short(image()))
        lowered = lower_documented(documented, (image(),), strict=strict)
        assert lowered.delegates == 1
        assert set(lowered.cpu) == {"aten.convolution.default", "aten.sigmoid.default", "aten.mul.Tensor",
                                    "aten.add.Tensor"}  # fmt: skip
        assert worst_lsb(documented, lowered.run, [(image(),)]) <= 1

    def test_a_reason_names_the_key(self) -> None:
        rows = lower(quantized({"head.*": "float", nn.ReLU: "float"})).placement
        reasons = {row.op: row.reason for row in rows if row.where == "cpu"}
        assert reasons == {
            "aten.linear.default": "layers['head.*'] leaves it in float.",
            "aten.relu.default": "layers[torch.nn.modules.activation.ReLU] leaves it in float.",
        }

    def test_operators_kept_in_float_are_not_decomposed(self) -> None:
        assert "aten.silu.default" not in {op_name(node) for node in quantized({}).module.graph.nodes}
        module = quantized({"features.0.act": "float"}).module
        assert [op_name(node) for node in module.graph.nodes].count("aten.silu.default") == 1
        assert [op_name(node) for node in module.graph.nodes].count("aten.sigmoid.default") == 1

    def test_an_operator_is_named_as_the_model_has_it(self) -> None:
        for name in ("aten.silu_.default", "aten::silu_", "aten.silu.default", "aten.silu"):
            rows = lower(quantized({name: "float"})).placement
            assert [row.module for row in rows if row.where == "cpu"] == ["features.0.act", "features.2.act"]

    def test_an_unfolded_batch_norm_keeps_its_name(self) -> None:
        model = seeded(lambda: nn.Sequential(trained(nn.BatchNorm2d(4)), nn.ReLU(), nn.Conv2d(4, 4, 1)))
        for layers in ({"aten.batch_norm.default": "float"}, {"0": "float"}, {nn.BatchNorm2d: "float"}):
            rows = lower(quantized(layers, model)).placement  # type: ignore[arg-type]
            assert [row.op for row in rows if row.where == "cpu"] == ["aten.convolution.default"]

    @pytest.mark.parametrize(
        ("function", "name", "left"),
        [
            (lambda m, x: m.c(x) * 2, "aten.mul.Tensor", ["aten.mul.Tensor"]),
            (lambda m, x: m.c(x) + 1 + 2, "aten.add.Tensor", ["aten.add.Tensor"] * 2),
            (lambda m, x: F.relu(torch.cat([m.c(x), m.d(x)], 1)), "aten.relu.default", ["aten.relu.default"]),
            (lambda m, x: m.a(m.c(x)) + torch.tanh(m.c(x)), "a", ["aten.tanh.default"]),
            (lambda m, x: m.c(x) * F.relu6(m.c(x) + 3) / 6, "aten.div.Tensor", ["aten.div.Tensor"]),
        ],
        ids=["product", "sums", "after a concatenation", "the same twice", "the end of a hardswish"],
    )
    def test_operators_kept_in_float_are_not_merged(self, function: Any, name: str, left: list[str]) -> None:
        class Merged(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.c, self.d, self.a = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Tanh()

            def forward(self, x: torch.Tensor) -> Any:
                return function(self, x)

        model = quantized({name: "float"}, seeded(Merged))
        program = lower(model)
        assert [row.op for row in program.placement if row.where == "cpu"] == left
        assert worst_lsb(model.module, program.run, [(image(),)]) <= 1.01

    def test_an_activation_is_not_fused_into_a_quantized_value(self) -> None:
        model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)))
        chosen = quantized({"1": "float"}, model)
        rows = lower(chosen).placement
        assert [row.where for row in rows] == ["npu", "cpu", "npu"]

    def test_all_outputs_of_an_operator_stay_in_float(self) -> None:
        class Halves(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(4, 4, 1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                first, second = torch.split(self.conv(x), 2, 1)
                return first * second

        model = quantized({"aten.split.Tensor": "float"}, seeded(Halves))
        program = lower(model)
        reasons = [row.reason for row in program.placement if row.where == "cpu"]
        assert reasons == ["layers['aten.split.Tensor'] leaves it in float."]
        assert worst_lsb(model.module, program.run, [(image(),)]) <= 1

    def test_the_empty_key_leaves_the_whole_model_in_float(self) -> None:
        model = quantized({"": "float"})
        assert torch.equal(model(image()), seeded(Net)(image()))
        assert "aten.conv2d.default" in float_operators(model.module)


def granularities(module: GraphModule) -> dict[str, str]:
    """Returns how the weight of each convolution and linear is quantized, by the node's name."""
    found = {}
    for node in module.graph.nodes:
        if op_name(node).startswith(("aten.conv", "aten.linear")):
            weight = op_name(node.args[1])
            found[node.name] = re.sub(r".*dequantize_(per_\w+)\.default", r"\1", weight)
    return found


class TestGranularity:
    def test_by_name_and_type(self) -> None:
        per_channel = {"conv2d": "per_channel", "conv2d_1": "per_tensor", "conv2d_2": "per_tensor",
                       "linear": "per_tensor"}  # fmt: skip
        assert granularities(quantized({nn.Linear: "per_channel"}).module) == {
            **dict.fromkeys(per_channel, "per_tensor"), "linear": "per_channel"
        }  # fmt: skip
        assert granularities(quantized({"features.0": "per_channel"}).module) == per_channel
        all_but = quantized({"reduce": "per_tensor"}, weight_granularity="per_channel")
        assert granularities(all_but.module) == {**per_channel, "conv2d_1": "per_channel", "linear": "per_channel"}
        convolutions = quantized({"aten.linear.default": "per_tensor"}, weight_granularity="per_channel")
        assert granularities(convolutions.module) == {
            **dict.fromkeys(per_channel, "per_channel"),
            "linear": "per_tensor",
        }
        assert granularities(quantized({nn.Conv2d: "per_channel"}).module)["conv2d_2"] == "per_channel"
        for model in (all_but, quantized({"features.2.conv": "per_channel", "features.0": "float"})):
            assert worst_lsb(model.module, lower(model).run, [(image(),)]) <= 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.b(F.relu(self.a(x)))
        return result


class TestSharedWeights:
    @pytest.mark.parametrize(
        "layers", [{"a": "float"}, {"b": "float"}, {nn.Conv2d: "per_channel"}, {"*": "per_channel"}], ids=label
    )
    def test_readers_of_a_shared_weight_take_equal_options_or_one_float(self, layers: dict[Key, str]) -> None:
        model = quantized(layers, seeded(Tied))
        assert worst_lsb(model.module, lower(model).run, [(image(),)]) <= 1

    @pytest.mark.parametrize("name", ["a", "b"])
    def test_two_granularities_are_refused(self, name: str) -> None:
        with pytest.raises(OptionError, match="share a weight that would be per channel for one") as error:
            quantized({name: "per_channel"}, seeded(Tied))
        assert error.value.node == "conv2d_1"


class TestErrors:
    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (["head"], "layers maps names and module types"),
            ("head", "layers maps names and module types"),
            ({"head": "int8"}, r"layers\['head'\] is one of 'per_tensor', 'per_channel', 'float', not 'int8'"),
            ({nn.Linear: None}, r"layers\[Linear\] is one of"),
            ({3: "float"}, "a module's name or type, or an operator's name, not 3"),
            ({torch.relu: "float"}, "a module's name or type"),
            ({torch.Tensor: "float"}, "a module's name or type"),
            ({nn.ReLU(): "float"}, r"not ReLU\(\)\. Give its name, or its type"),
            ({"aten.prelu.default": "per_channel"}, "Only the weights of these .*can have one scale .*: addmm, convol"),
            ({"aten::add": "per_channel"}, "Only the weights of these operators can have one scale for each"),
        ],
        ids=label,
    )
    def test_without_a_model(self, layers: Any, message: str) -> None:
        with pytest.raises(OptionError, match=message):
            NeutronQuantizer(layers=layers)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ({"feature": "float"}, r"layers\['feature'\] matches no module that this .*Near matches: features, "),
            ({"features.3.*": "float"}, "Near matches: features"),
            ({"features.0.norm": "float"}, "A batch norm is part of the convolution or linear that it follows"),
            ({"head.drop": "float"}, "dropout and identities are removed"),
            ({nn.ReLU6: "float"}, "Near matches: torch.nn.modules.activation.ReLU, "),
            ({"aten.softmx.int": "float"}, "Near matches: aten.softmax.int, "),
            ({"aten.relu6.default": "per_tensor"}, "matches no operator that this model runs"),
            ({nn.ReLU: "per_channel"}, "Only the weights of these .*can have one scale .*none of them matches"),
            ({"*.act": "per_channel"}, "Only the weights of these operators"),
            ({"aten.sin.default": "per_channel"}, "matches no operator"),
        ],
        ids=label,
    )
    def test_with_a_model(self, layers: dict[Key, str], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            quantized(layers)
        with pytest.raises(OptionError, match=message):
            convert(seeded(Net), (image(),), quantizer=NeutronQuantizer(layers=layers))

    def test_one_quantizer_takes_several_models_with_the_keys(self) -> None:
        quantizer = NeutronQuantizer(layers={"": "per_channel"})
        for build in (Tied, Net, Tied):
            converted = convert(seeded(build), (image(),), quantizer=quantizer)
            assert "per_channel" in granularities(converted).values()
