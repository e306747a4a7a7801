"""Models, weights and example inputs that texts name."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openneutron.errors import InputError, ModelError, OptionError
from openneutron.model.loading import load_model
from openneutron.model.shapes import example_inputs_of
from openneutron.model.weights import WeightsWarning, load_weights
from openneutron.settings.model_texts import arguments_in

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4, bias=True):
        super().__init__()
        self.body = nn.Linear(3, width, bias=bias)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.body(x))

def make(width):
    return Net(width)

def of_options(width, **options):
    return Net(width, **options)

def by_position(width, /, *more):
    return Net(width)

net = Net(2)
number = 3

def broken():
    raise ValueError("no such size")

def returns_text():
    return "net"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "net.py"


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


class TestModel:
    @pytest.mark.parametrize(
        ("name", "args", "width"), [("Net", None, 4), ("Net", "width=6", 6), ("make", "5", 5), ("net", None, 2)]
    )
    def test_of_a_file(self, file: Path, name: str, args: str | None, width: int) -> None:
        found: Any = load_model(f"{file}:{name}", args=args)
        assert found.body.out_features == width
        assert not found.training

    def test_random_weights_are_equal_in_each_call(self, file: Path) -> None:
        state = torch.random.get_rng_state()
        first, second = (load_model(f"{file}:Net") for _ in range(2))
        assert isinstance(first, nn.Module)
        assert isinstance(second, nn.Module)
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(state, torch.random.get_rng_state())

    def test_of_a_package(self) -> None:
        assert isinstance(load_model("torch.nn:Linear", args="3, 4"), nn.Linear)

    def test_of_torch_export_and_of_torchscript(self, tmp_path: Path) -> None:
        module, inputs = network().eval(), torch.randn(2, 3)
        torch.export.save(torch.export.export(module, (inputs,)), tmp_path / "net.pt2")
        scripted: Any = torch.jit
        scripted.save(scripted.trace(module, (inputs,)), str(tmp_path / "net.pt"))
        exported: Any = load_model(str(tmp_path / "net.pt2"))
        torch.testing.assert_close(exported.module()(inputs), module(inputs))
        traced: Any = load_model(str(tmp_path / "net.pt"))
        torch.testing.assert_close(traced(inputs), module(inputs))

    @pytest.mark.parametrize(
        ("name", "args", "error", "message"),
        [
            ("make", None, OptionError, "cannot be called with these arguments: .*width"),
            ("Net", "depth=3", OptionError, "unexpected keyword argument 'depth'"),
            ("Net", "widht=3", OptionError, "unexpected keyword argument 'widht'. Did you mean 'width'"),
            ("make", "widht=3", OptionError, "unexpected keyword argument 'widht'. Did you mean 'width'"),
            ("of_options", "depth=3", OptionError, "these arguments: missing a required argument: 'width'. Give args"),
            ("by_position", "width=3", OptionError, "'width' parameter is positional only"),
            ("by_position", "3, widht=3", OptionError, "unexpected keyword argument 'widht'. Give args"),
            ("by_position", "3, more=3", OptionError, "unexpected keyword argument 'more'. Give args"),
            ("Net", "width=3 + x", OptionError, "takes literals of Python"),
            ("Net", "**{}", OptionError, "takes literals of Python"),
            ("net", "3", OptionError, "is a module already"),
            ("number", None, ModelError, "is of type int"),
            ("broken", None, ModelError, "failed: ValueError: no such size"),
            ("returns_text", None, ModelError, "returns an object of type str"),
            ("Ne", None, OptionError, "Did you mean 'Net'"),
        ],
    )
    def test_values_that_are_not_models_are_refused(
        self, file: Path, name: str, args: str | None, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            load_model(f"{file}:{name}", args=args)

    def test_a_file_of_weights_is_not_a_model(self, tmp_path: Path) -> None:
        torch.save(network().state_dict(), tmp_path / "w.pt")
        with pytest.raises(ModelError, match="contains weights and no model"):
            load_model(str(tmp_path / "w.pt"))

    def test_a_pickled_module_needs_unsafe(self, tmp_path: Path) -> None:
        torch.save(network(), tmp_path / "net.pt")
        with pytest.raises(InputError, match="give --unsafe"):
            load_model(str(tmp_path / "net.pt"))
        assert isinstance(load_model(str(tmp_path / "net.pt"), unsafe=True), nn.Sequential)

    def test_an_exported_program_has_its_weights(self, tmp_path: Path) -> None:
        torch.export.save(torch.export.export(network().eval(), (torch.randn(2, 3),)), tmp_path / "net.pt2")
        with pytest.raises(OptionError, match="Leave out weights"):
            load_model(str(tmp_path / "net.pt2"), weights="w.pt")

    def test_a_library_that_is_not_installed_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "timm", None)
        with pytest.raises(InputError, match="pip install timm"):
            load_model("timm:mobilenetv4_conv_small")


class TestWeights:
    @pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod."])
    @pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
    def test_of_checkpoints(self, tmp_path: Path, prefix: str, key: str | None) -> None:
        module = network()
        state = {prefix + name: value for name, value in module.state_dict().items()}
        torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "w.pt")
        other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        loaded = load_weights(other, tmp_path / "w.pt")
        assert (loaded.key, loaded.prefix, loaded.unexpected) == (key or "", prefix, ())
        for name, value in other.state_dict().items():
            torch.testing.assert_close(value, module.state_dict()[name], rtol=0, atol=0)

    def test_of_safetensors(self, tmp_path: Path) -> None:
        save = pytest.importorskip("safetensors.torch").save_file
        save(network().state_dict(), tmp_path / "w.safetensors")
        other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        load_weights(other, tmp_path / "w.safetensors")
        torch.testing.assert_close(other[0].weight, network()[0].weight)  # type: ignore[index]

    def test_the_model_may_have_the_prefix(self, tmp_path: Path) -> None:
        torch.save(network().state_dict(), tmp_path / "w.pt")
        wrapped = nn.ModuleDict({"model": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))})
        assert load_weights(wrapped, tmp_path / "w.pt").prefix == ""

    def test_the_state_dict_that_fits_is_selected(self, tmp_path: Path) -> None:
        optimizer = {"0.weight": torch.zeros(4, 3)}
        torch.save({"optimizer": optimizer, "ema": network().state_dict()}, tmp_path / "w.pt")
        assert load_weights(network(), tmp_path / "w.pt").key == "ema"

    def test_counts_of_batches_may_be_missing(self, tmp_path: Path) -> None:
        state = {name: value for name, value in network().state_dict().items() if "num_batches" not in name}
        torch.save(state, tmp_path / "w.pt")
        load_weights(network(), tmp_path / "w.pt")

    def test_unexpected_tensors_are_listed(self, tmp_path: Path) -> None:
        torch.save({**network().state_dict(), "head.weight": torch.zeros(2)}, tmp_path / "w.pt")
        with pytest.warns(WeightsWarning, match=r"1 tensors that the model does not have.*head\.weight"):
            assert load_weights(network(), tmp_path / "w.pt").unexpected == ("head.weight",)

    def test_missing_tensors_are_listed(self, tmp_path: Path) -> None:
        torch.save({"0.weight": torch.zeros(4, 3), "fc.weight": torch.zeros(2)}, tmp_path / "w.pt")
        with pytest.raises(InputError, match=r"lacks 5 of the model's 7 tensors: 0\.bias.*fc\.weight"):
            load_weights(network(), tmp_path / "w.pt")

    def test_other_shapes_are_listed(self, tmp_path: Path) -> None:
        torch.save(network(5).state_dict(), tmp_path / "w.pt")
        with pytest.raises(InputError, match=r"0\.weight has \(5, 3\) in the file and \(4, 3\) in the model"):
            load_weights(network(), tmp_path / "w.pt")

    def test_weights_of_half_precision_are_converted(self, tmp_path: Path) -> None:
        torch.save({name: value.half() for name, value in network().state_dict().items()}, tmp_path / "w.pt")
        module: Any = network()
        load_weights(module, tmp_path / "w.pt")
        assert module[0].weight.dtype == torch.float32

    @pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 damaged"])
    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
    def test_a_damaged_file_is_refused(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            load_weights(network(), tmp_path / name)

    def test_a_file_without_tensors_is_refused(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3}, tmp_path / "w.pt")
        with pytest.raises(InputError, match="contains no state dict"):
            load_weights(network(), tmp_path / "w.pt")

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="Cannot read"):
            load_weights(network(), tmp_path / "none.pt")


class TestExampleInputs:
    def test_shapes_dtypes_and_names(self) -> None:
        found: Any = example_inputs_of(["1,3,4,4", "int64:1x7"])
        image, ids = found
        assert (image.shape, image.dtype) == ((1, 3, 4, 4), torch.float32)
        assert (ids.shape, ids.dtype) == ((1, 7), torch.int64)
        named: Any = example_inputs_of(["x=1,3", "mask=bool:1,3"])
        assert list(named) == ["x", "mask"]
        torch.testing.assert_close(example_inputs_of(["2,3"]), example_inputs_of(["2,3"]), rtol=0, atol=0)

    def test_channels_last(self) -> None:
        found: Any = example_inputs_of(["1,3,4,4", "1,3"], channels_last=True)
        image, rows = found
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert rows.is_contiguous()

    @pytest.mark.parametrize("text", ["a,b", "1,-3", "1.5,3", "float8:1,3", "1,3;", "x==1"])
    def test_other_texts_are_refused(self, text: str) -> None:
        with pytest.raises(OptionError, match=r"An input is a shape|dtype of an input"):
            example_inputs_of([text])

    def test_some_names_are_refused(self) -> None:
        with pytest.raises(OptionError, match="all inputs have different names"):
            example_inputs_of(["x=1,3", "1,3"])


def test_arguments() -> None:
    assert arguments_in("1, 'a', sizes=(1, 2), flag=True") == ([1, "a"], {"sizes": (1, 2), "flag": True})
    assert arguments_in("") == ([], {})


@pytest.mark.parametrize(("library", "name"), [("timm", "mobilenetv4_conv_smal"), ("torchvision", "mobilenet_v4")])
def test_models_of_libraries(library: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the packages, which are optional: known names, random weights, and a failed download."""

    def make(given: str, pretrained: bool = False, weights: Any = None, **keywords: Any) -> nn.Module:
        if pretrained or weights is not None:
            raise OSError("no network")
        return nn.Linear(keywords["width"], 1)

    known = ["mobilenetv4_conv_small", "mobilenet_v2"]
    functions = types.SimpleNamespace(list_models=lambda: known, create_model=make, get_model=make)
    module: Any = functions if library == "timm" else types.SimpleNamespace(models=functions)
    monkeypatch.setitem(sys.modules, library, module)
    found: Any = load_model(f"{library}:{known[library == 'torchvision']}", args="width=3", weights="none")
    assert found.in_features == 3
    with pytest.raises(OptionError, match=f"{library} has no model '{name}'. Did you mean"):
        load_model(f"{library}:{name}", weights="none")
    with pytest.raises(InputError, match=r"no network.*'none' for random weights"):
        load_model(f"{library}:{known[0]}")
    with pytest.raises(OptionError, match="takes keyword arguments only"):
        load_model(f"{library}:{known[0]}", args="3", weights="none")
