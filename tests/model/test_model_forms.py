"""Models in other forms: exported, saved, traced, scripted, functions. Errors for other objects name an alternative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from tests.model.test_forms import sqnr
from tests.oracle import Function
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronQuantizer, load, lower, quantize
from openneutron.accuracy import analyze, evaluate
from openneutron.accuracy.compare import compare_layers
from openneutron.core.fx import op_name
from openneutron.errors import CalibrationError, InputError, ModelError, OpenNeutronError, OptionError
from openneutron.passes import specialize_convolutions

SHAPE = (1, 3, 8, 8)


class Net(nn.Module):
    """A convolution, a batch norm and a linear layer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Any:
        """Returns class scores."""
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

    def scaled(self, x: Tensor, factor: float = 2.0) -> Any:
        return self(x) * factor


def net(seed: int = 0, width: int = 4) -> Net:
    torch.manual_seed(seed)
    return Net(width).eval()


def images(count: int = 8) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(SHAPE) for _ in range(count)]


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images(1)[0],))


def saved(model: nn.Module, folder: Path) -> Path:
    torch.export.save(exported(model), folder / "net.pt2")
    return folder / "net.pt2"


TAKEN: dict[str, Callable[[Net, Path], Any]] = {
    "exported program": lambda m, _: exported(m),
    "its module": lambda m, _: exported(m).module(),
    "the module of one loaded": lambda m, folder: torch.export.load(saved(m, folder)).module(),
    "path": lambda m, folder: str(saved(m, folder)),
    "dynamic batch": lambda m, _: torch.export.export(
        m, (torch.cat(images(2)),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4)},)
    ),
    "traced": lambda m, _: torch.jit.trace(m, images(1)[0]),  # type: ignore[no-untyped-call]
    "scripted": lambda m, _: torch.jit.script(m),
    "data parallel": lambda m, _: nn.DataParallel(m).eval(),
    "compiled": lambda m, _: torch.compile(m),
    "forward": lambda m, _: m.forward,
    "function": lambda m, _: lambda x: m(x) * 1.0,
    "partial": lambda m, _: functools.partial(_applied, m),
    "callable object": lambda m, _: Wrapper(m),
    "method of an object": lambda m, _: Wrapper(m).scores,
}  # fmt: skip


class Wrapper:
    """An object that is not a module, and has a module as an attribute."""

    def __init__(self, module: Net) -> None:
        self.net = module

    def __call__(self, x: Tensor) -> Any:
        return self.net(x)

    def scores(self, x: Tensor) -> Any:
        return self.net(x)


def _applied(module: nn.Module, x: Tensor) -> Any:
    return module(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TAKEN)
def test_each_form_of_a_model_is_quantized(name: str, tmp_path: Path) -> None:
    model, data = net(), images()
    quantized = quantize(TAKEN[name](model, tmp_path), (data[0],), data, recover=None, progress=False)
    program = lower(quantized)
    with torch.no_grad():
        assert sqnr(model(data[1]), program.run(data[1])) > 25
    assert all(row.where == "npu" for row in program.placement)
    if name in ("path", "scripted", "function", "callable object"):
        assert analyze(model, quantized, data, samples=1).output_sqnr_db > 20


def test_a_function_without_a_signature() -> None:
    data = images()
    quantized = quantize(torch.sigmoid, (data[0],), data, progress=False)
    assert sqnr(torch.sigmoid(data[1]), quantized(data[1])) > 25


@pytest.mark.parametrize("name", ["callable object", "method of an object"])
def test_modules_of_an_object_have_names(name: str, tmp_path: Path) -> None:
    model, data = TAKEN[name](net(), tmp_path), images()
    program = lower(quantize(model, (data[0],), data, layers={"net.head": "float"}, recover=None, progress=False))
    assert {row.module for row in program.placement if row.where == "cpu"} == {"net.head"}


def test_a_method_of_a_module() -> None:
    model, data = net(), images()
    quantized = quantize(model.scaled, (data[0], 3.0), data, progress=False)
    with torch.no_grad():
        assert sqnr(model.scaled(data[1], 3.0), quantized(data[1], 3.0)) > 25


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda _: net().state_dict(), "state dict or a checkpoint.*torch.nn.Module.*load_state_dict"),
        (lambda _: {"model": net().state_dict(), "epoch": 3}, "state dict or a checkpoint"),
        (lambda folder: folder / "net.pth", "a file of weights.*Give the torch.nn.Module"),
        (lambda _: "net.onnx", "ONNX model.*Give the torch.nn.Module"),
        (lambda _: "net.pte", "an ExecuTorch program"),
        (lambda _: "net", r"not an exported program \(\.pt2\)"),
        (lambda _: Net, "Net is a class.*Net\\(...\\).eval\\(\\)"),
        (lambda _: None, "is a NoneType. Give the torch.nn.Module"),
        (lambda _: 3, "is a int. Give the torch.nn.Module"),
        (lambda _: torch.ones(2), "is a Tensor. Give the torch.nn.Module"),
        (
            lambda _: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 4))).eval(),  # type: ignore[no-untyped-call]
            "Module '0' .* is quantized already, by torch's eager-mode quantization. Give the float model",
        ),
        (lambda _: net().to("meta"), "'conv.weight' is on the device 'meta'.*load_state_dict"),
        (lambda _: net().train(), "train mode.*Call model.eval"),
        (lambda _: torch.jit.script(net().train()), "train mode.*Call model.eval"),
        (lambda _: exported(net().train()), "train mode.*Call model.eval"),
        (lambda _: exported(net().train()).module(), "train mode.*Call model.eval"),
        (lambda _: quantize(net(), images(1)[0], images(), progress=False), "quantized already. Call lower"),
        (lambda _: quantize(net(), images(1)[0], images(), progress=False).module, "quantized already. Call lower"),
        (lambda _: prepare_pt2e(exported(net()).module(), NeutronQuantizer()), "prepared by prepare_pt2e"),
    ],
)
def test_unsupported_models_are_refused(model: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    given = model(tmp_path)
    with pytest.raises(ModelError, match=message):
        quantize(given, (images(1)[0],), images())


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.pt2").write_bytes(b"no zip file")
    for name in ("missing.pt2", "broken.pt2"):
        with pytest.raises(InputError, match=name):
            quantize(tmp_path / name, (images(1)[0],), images())


def test_lower_and_analyze_take_exported_programs(tmp_path: Path) -> None:
    model, data = net(), images()
    prepared = prepare_pt2e(exported(model).module(), NeutronQuantizer())
    for x in data:
        prepared(x)
    with pytest.raises(ModelError, match=r"prepared by prepare_pt2e and not converted\. Call convert_pt2e"):
        lower(prepared, (data[0],))
    converted = convert_pt2e(prepared)
    program = lower(converted, (data[0],))
    again = torch.export.export(converted, (data[0],))
    torch.export.save(again, tmp_path / "int8.pt2")
    for given in (again, tmp_path / "int8.pt2"):
        assert torch.equal(lower(given).run(data[1]), program.run(data[1]))
    for reference in (model, exported(model), exported(model).module()):
        assert analyze(reference, converted, data, samples=1).output_sqnr_db > 20
    assert analyze(model, again, data, samples=1).output_sqnr_db > 20
    program.save(tmp_path / "net.pte")
    for run in (tmp_path / "net.pte", program.buffer, again, program, load(program.buffer)):
        assert evaluate(run, [(data[0], 0)], lambda outputs, _: float(outputs.numel())) == 5
    with pytest.raises(ModelError, match="lowered already"):
        lower(program)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="has no quantized operators"):
        lower(exported(model))
    with pytest.raises(ModelError, match="no quantized layer"):
        analyze(model, exported(model), data)


def test_another_model_is_refused() -> None:
    data = images()
    quantized, other = (quantize(net(seed), data[0], data, progress=False) for seed in (0, 5))
    for model in (net(5), net(0, width=6), exported(net(5))):
        with pytest.raises(ModelError, match=r"is not the one that was quantized: . of its . parameters have other"):
            analyze(model, quantized, data)
    with pytest.raises(ModelError, match=r"not lowered from this module: delegate 0 has other scales"):
        compare_layers(quantized, lower(other), data, samples=1)


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_general_convolution_gets_the_name_of_its_kind(dimensions: int, transposed: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4, *(9, 8)[:dimensions]), torch.randn(4, 2, *(3, 3)[:dimensions])
    ones, zeros = [1] * dimensions, [0] * dimensions

    class General(nn.Module):
        def forward(self, x: Tensor) -> Any:
            stride = [2, *ones[1:]]
            return torch.ops.aten.convolution(x, weight, None, stride, ones, ones, transposed, zeros, 2)

    graph = torch.export.export(General(), (x,)).module()
    wanted = graph(x)
    assert specialize_convolutions(graph)
    assert not specialize_convolutions(graph)
    names = [op_name(node) for node in graph.graph.nodes if node.op == "call_function"]
    kind = f"conv_transpose{dimensions}d" if transposed else f"conv{dimensions}d"
    assert [name.split(".")[1] for name in names] == [kind]
    assert torch.equal(graph(x), wanted)


class Branching(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if y.sum() > 0:
            return torch.relu(y)
        return -y


class Counting(Net):
    def forward(self, x: Tensor) -> Any:
        return self.conv(x) * int(x.abs().max().item() * 10)


class Masked(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return y[y > 0].sum()


class Failing(Net):
    def forward(self, x: Tensor) -> Any:
        return x[{"a": 0}["b"]]


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> tuple[None, int]:
        return None, x.shape[0]


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.table(ids))
        return result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "message", "kind"),
    [
        (Branching, "uses the values of a tensor for a branch", ModelError),
        (Counting, "uses the values of a tensor for a branch|depends on the values of a tensor", ModelError),
        (Masked, "depends on the values of a tensor", ModelError),
        (Failing, "does not run on the example inputs.*'b'", InputError),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_models_that_torch_export_refuses(
    model: type[Net], message: str, kind: type[OpenNeutronError], strict: bool
) -> None:
    with pytest.raises(kind, match=message) as error:
        quantize(model().eval(), images(1)[0], images(), strict=strict, progress=False)
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)
    assert error.value.source is not None
    assert error.value.source.startswith(__file__)
    assert (error.value.__cause__ is None) == ("depends on the values" in str(error.value))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 6, batch_first=True)

    def forward(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(sequences, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0]


class WithNumpy(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(torch.from_numpy(np.tanh(x.numpy())))


class ReturnsSet(Net):
    def forward(self, x: Tensor) -> Any:
        return {super().forward(x)}


def sparse_linear() -> nn.Module:
    model = nn.Linear(8, 4)
    model.weight = nn.Parameter(model.weight.detach().to_sparse())
    return model


class Densified(nn.Module):
    """A linear layer with a sparse mask, which `forward` densifies, and an unused sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.mask: Tensor
        self.register_buffer("mask", torch.eye(4, 8).to_sparse())
        self.register_buffer("unused", torch.eye(4).to_sparse_csr())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear.weight * self.mask.to_dense())


def ctc_loss(x: Tensor) -> Tensor:
    log_probabilities = x.reshape(4, 1, 2).log_softmax(-1)
    return nn.functional.ctc_loss(log_probabilities, torch.tensor([[1]]), torch.tensor([4]), torch.tensor([1]))


VECTOR = (torch.ones(1, 8),)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (WithNumpy, images(1)[0], "converts a tensor to a numpy array.*Compute this with torch"),
        (ReturnsSet, images(1)[0], "returns a set.*Return tensors"),
        (Packed, (torch.ones(2, 5, 4), torch.tensor([5, 3])), "values of a tensor as a size.*Give the padded"),
        (lambda: nn.LazyLinear(4), VECTOR, "'weight' has no shape yet.*Call the model once"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.LazyBatchNorm1d()), VECTOR, "'1.weight' has no shape yet"),
        (sparse_linear, VECTOR, "'weight' is sparse.*to_dense"),
        (lambda: Function(torch.cov), VECTOR, "torch.cov and torch.corrcoef call it.*Write the comparison"),
        (lambda: Function(torch.corrcoef), VECTOR, "calls equal on tensors.*Write the comparison"),
        (lambda: Function(lambda x: x * torch.allclose(x, x)), VECTOR, "calls allclose on tensors.*torch.isclose"),
        (lambda: Function(lambda x: torch.combinations(x[0])), VECTOR, "torch.combinations.*Select values with"),
        (lambda: Function(ctc_loss), VECTOR, "does not support the operator aten._ctc_loss.Tensor.*outside of the"),
    ],
)
@pytest.mark.parametrize("recover", [None, "auto"])
def test_models_that_torch_export_cannot_read(
    model: Callable[[], nn.Module], inputs: tuple[Tensor, ...], message: str, recover: str | None
) -> None:
    with pytest.raises(ModelError, match=message) as error:
        quantize(model().eval(), inputs, [inputs], recover=recover, progress=False)
    from_forward = model in (WithNumpy, ReturnsSet, Packed)
    assert (error.value.source or "").startswith(__file__ if from_forward and model is not ReturnsSet else "")


@pytest.mark.filterwarnings("ignore")
def test_sparse_buffers_that_no_operator_of_the_npu_reads() -> None:
    model, generator = Densified().eval(), torch.Generator().manual_seed(0)
    samples = [(torch.randn(1, 8, generator=generator),) for _ in range(8)]
    quantized = quantize(model, samples[0], samples, recover=None, progress=False)
    with torch.no_grad():
        assert sqnr(model(*samples[0]), quantized.module(*samples[0])) > 30


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(1, 8).to_sparse(), "sparse tensor.*to_dense"),
        (torch.ones(1, 8, device="meta"), "device 'meta'.*Give real inputs"),
        (torch.quantize_per_tensor(torch.ones(1, 8), 0.1, 0, torch.qint8), "quantized tensor.*Give dequantize"),
        (torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)]), "nested tensor.*Give a padded tensor"),
    ],
)
def test_inputs_that_are_not_arrays_of_values(value: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(nn.Linear(8, 4).eval(), (value,), [(value,)], progress=False)


@pytest.mark.parametrize("jobs", [1, 2])
def test_values_that_an_operator_does_not_take(jobs: int) -> None:
    """Row numbers beyond a table's size: the error names the operator."""
    ids = [torch.randint(0, 10, (1, 6)) for _ in range(4)]
    with pytest.raises(OpenNeutronError, match=r"Running .* on the calibration data failed: Ind") as error:
        quantize(Embedded().eval(), ids[0], [*ids, ids[0] + 9], recover=None, jobs=jobs, progress=False)
    assert error.value.op == "aten.embedding.default"
    assert error.value.node is not None
    assert jobs > 1 or (error.value.source or "").startswith(__file__)


def test_errors_of_evaluate_name_the_sample() -> None:
    model, data = net(), images(2)
    with pytest.raises(InputError, match="Running the model on sample 1 failed: RuntimeError"):
        evaluate(model, [(data[0], 0), (data[1][:, :2], 0)])
    with pytest.raises(OptionError, match="The metric of sample 0 failed: ZeroDivisionError"):
        evaluate(model, [(data[0], 0)], lambda *_: 1 / 0)


def test_errors_of_the_users_data_have_a_type() -> None:
    model, data = net(), images(4)
    quantized = quantize(model, data[0], data, recover=None, progress=False)
    with pytest.raises(CalibrationError, match=r"Reading the calibration data failed: ZeroDivisionError"):
        quantize(model, data[0], (1 / 0 for _ in data))
    with pytest.raises(CalibrationError, match=r"Reading the calibration data failed: AttributeError"):
        quantize(model, data[0], data, transform=lambda value: value.nothing)
    for measure in (
        lambda given: analyze(None, quantized, given),
        lambda given: compare_layers(quantized, None, given),
        lambda given: evaluate(quantized, given),
    ):
        with pytest.raises(InputError, match=r"Reading the data failed: ZeroDivisionError"):
            measure(1 / 0 for _ in data)


@pytest.mark.parametrize(
    "call",
    [
        lambda q, data: analyze(None, q, data, samples="a"),  # type: ignore[arg-type]
        lambda q, data: analyze(None, q, data, program=3),  # type: ignore[arg-type]
        lambda q, data: compare_layers(q, 3, data),  # type: ignore[arg-type]
        lambda _, data: compare_layers(net(), None, data),  # type: ignore[arg-type]
        lambda q, _: lower(q).save(3),  # type: ignore[arg-type]
        lambda q, _: q.save(3),
        lambda q, _: lower(q).package(3),  # type: ignore[arg-type]
        lambda q, _: lower(q).to_model_explorer(3),  # type: ignore[arg-type]
        lambda q, data: lower(q.module, {"y": data[0]}),
        lambda _, data: evaluate(net().state_dict(), [(data[0], 0)]),
        lambda _, data: quantize(Nothing().eval(), data[0], data),
    ],
)
def test_wrong_arguments_cause_typed_errors(call: Callable[[Any, Any], Any]) -> None:
    data = images(4)
    with pytest.raises(OpenNeutronError):
        call(quantize(net(), data[0], data, recover=None, progress=False), data)


def test_an_exported_program_brings_its_example_inputs() -> None:
    data = images(4)
    quantized = quantize(exported(net()), None, data, recover=None, progress=False)
    assert lower(quantized).run(data[0]).shape == (1, 5)


def test_printed_results_are_summaries() -> None:
    model, data = net(), images()
    quantized = quantize(model, data[0], data, progress=False)
    program = lower(quantized, operators_not_to_delegate=["aten.linear.default"])
    text = str(program)
    assert text.splitlines()[0].startswith("Portable program, which this host runs; for imxrt700, ")
    assert "in  x: float32 (1, 3, 8, 8)" in text
    assert "out output0: float32 (1, 5)" in text
    assert "on the CPU\n    linear (aten." in text
    assert "Quantized model for imxrt700: " in str(quantized)
    assert "operators in int8" in str(quantized)
    assert "  in  x: float32 (1, 3, 8, 8)\n  recovery: correction weights, range_by " in str(quantized)
    estimate = str(program.estimate())
    assert "estimate for imxrt700" in estimate
    assert "Layer(" not in estimate
    for shown in (text, str(quantized), estimate, str(compare_layers(quantized, lower(quantized), data, samples=1))):
        assert len(shown) < 2000


def test_an_output_without_dimensions_needs_no_operator_on_the_cpu() -> None:
    class Total(Net):
        def forward(self, x: Tensor) -> Any:
            return torch.relu(self.conv(x)).mean()

    data = images()
    quantized = quantize(Total().eval(), data[0], data, progress=False)
    program = lower(quantized)
    assert [row for row in program.placement if row.where == "cpu"] == []
    plan = deserialize_pte_binary(program.buffer).program.execution_plan[0]
    assert {one.name.split("::")[1] for one in plan.operators} == {"quantize_per_tensor", "dequantize_per_tensor"}
    found = program.run(data[0])
    assert found.shape == ()
    assert torch.allclose(found, quantized.module(data[0]), atol=1e-2)
