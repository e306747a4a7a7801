"""Inputs and outputs of any form: numbers, text, None, nested and keyword arguments, repeated outputs."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from tests.flow_support import convert, lower_documented
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, treespec_dumps
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronPartitioner, NeutronQuantizer, generate_neutron_compile_spec, load, lower, quantize
from openneutron.accuracy import analyze, evaluate
from openneutron.accuracy.compare import compare_layers
from openneutron.errors import FormatError, HostError, InputError, ModelError
from openneutron.model.arguments import paths_from_tree
from openneutron.report.inspect import inspect_bytes
from openneutron.runtime import HostProgram, TensorInfo
from openneutron.runtime.program import ConstantInfo

SAMPLES = 8


@dataclass
class Pair:
    """Two tensors; the second may be missing."""

    left: Tensor
    right: Tensor | None = None


class Named(NamedTuple):
    """Two tensors."""

    left: Tensor
    right: Tensor


class Net(nn.Module):
    """A function of a linear layer, a buffer and the inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.l = nn.Linear(8, 8)
        self.register_buffer("strides", torch.tensor([8.0, 16.0, 32.0]))
        self.register_buffer("ids", torch.tensor([3, 5]))


class Positional(Net):
    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class Keyword(Net):
    def forward(self, x: Tensor, *, scale: Tensor, gain: float = 1.0) -> Any:
        return self.function(self, x) * scale * gain


class Optional(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: Tensor | None = None, mode: str = "plain") -> Any:
        y = self.function(self, x if mask is None else x * mask)
        y = torch.relu(y) if mode == "relu" else y
        return y if scale is None else y * scale


class OneDict(Net):
    def forward(self, batch: dict[str, Any]) -> Any:
        return self.function(self, batch["a"]) + batch["deep"][0]


@dataclass
class Registered:
    """Two tensors in a class registered by torch's documented call."""

    left: Tensor
    right: Tensor


torch.export.register_dataclass(Registered, serialized_type_name="tests.Registered")


class OfRegistered(Net):
    def forward(self, pair: Registered) -> Registered:
        return Registered(self.function(self, pair.left), pair.right)


class Structured(Net):
    def forward(self, batch: dict[str, Any], pair: Pair, named: Named) -> Any:
        return self.function(self, batch["a"]) + pair.left + named.right


def x(*shape: int) -> Tensor:
    return torch.randn(shape or (1, 8))


def linear(m: Any, value: Tensor) -> Tensor:
    result: Tensor = m.l(value)
    return result


def twice(m: Any, value: Tensor) -> Any:
    y = m.l(value)
    return y, {"again": y, "relu": torch.relu(y)}


def two_of_three(m: Any, value: Tensor) -> Any:
    return Pair(m.l(value)), [None, (torch.sigmoid(m.l(value)), 2, 0.5, True)]


OUTPUTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "none in a dict": lambda m, v: {"loss": None, "logits": m.l(v)},
    "none in a tuple": lambda m, v: (m.l(v), None),
    "numbers": lambda m, v: (m.l(v), 3, 0.5, True, v.shape[0]),
    "nested, with a dataclass": two_of_three,
    "a buffer": lambda m, v: (m.l(v), m.strides),
    "a buffer of integers": lambda m, v: (m.l(v), m.ids),
    "a constant": lambda m, v: (m.l(v), torch.ones(2)),
    "computed of a buffer": lambda m, v: (m.l(v), m.strides * 2),
    "twice": twice,
    "an input as it is": lambda m, v: (m.l(v), v),
    "an input as it is, before": lambda m, v: (v, m.l(v)),
    "a parameter": lambda m, v: (m.l(v), m.l.bias),
}  # fmt: skip
ARGUMENTS: dict[str, tuple[type[Net], Callable[[], Any]]] = {
    "keyword-only": (Keyword, lambda: {"x": x(), "scale": torch.rand(1, 8)}),
    "keyword-only with a number": (Keyword, lambda: {"x": x(), "scale": torch.rand(1, 8), "gain": 2.0}),
    "keywords out of order": (Optional, lambda: {"scale": torch.rand(1, 8), "x": x()}),
    "none and text": (Optional, lambda: (x(), None, torch.rand(1, 8), "relu")),
    "none and text by name": (Optional, lambda: {"x": x(), "mask": None, "mode": "relu"}),
    "one dict": (OneDict, lambda: ({"a": x(), "none": {}, "deep": [x(), None, 3]},)),
    "one dict, itself": (OneDict, lambda: {"a": x(), "deep": [x(), True, "text"]}),
    "dict, dataclass and named tuple": (Structured, lambda: ({"a": x()}, Pair(x()), Named(x(), x()))),
    "a registered dataclass": (OfRegistered, lambda: (Registered(x(), x()),)),
    "the same by name": (Structured, lambda: {"batch": {"a": x()}, "pair": Pair(x(), x()), "named": Named(x(), x())}),
}  # fmt: skip


def seeded(kind: type[Net], function: Callable[..., Any]) -> Net:
    torch.manual_seed(0)
    return kind(function).eval()


def called(model: Any, sample: Any) -> Any:
    if isinstance(sample, dict):
        return model(sample) if "deep" in sample else model(**sample)
    return model(*sample) if isinstance(sample, tuple) else model(sample)


def sqnr(wanted: Tensor, found: Tensor) -> float:
    noise = float((wanted.double() - found.double()).square().sum())
    return 10 * math.log10(float(wanted.double().square().sum()) / noise) if noise else math.inf


def leaves(value: Any) -> list[Any]:
    """Returns all leaves, including those of dataclasses that torch does not know."""
    found = []
    for leaf in tree_leaves(value):
        is_data = dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)
        found += leaves(list(vars(leaf).values())) if is_data else [leaf]
    return found


def assert_close(wanted: Any, found: Any, floor: float = 25.0) -> None:
    """Checks that constants are equal, and that float tensors have at least `floor` dB SQNR."""
    expected, got = leaves(wanted), leaves(found)
    assert len(expected) == len(got)
    for one, other in zip(expected, got, strict=True):
        if not isinstance(one, Tensor):
            assert other == one
            assert type(other) is type(one)
        elif one.is_floating_point():
            assert sqnr(one, other) > floor
        else:
            assert torch.equal(one, other)


def assert_names_are_equal(pte: bytes) -> None:
    """Asserts that `inspect` reads the names of the inputs that `load` reads, which differ."""
    names = load(pte).input_names()
    assert [one.name for one in inspect_bytes(pte, "a program").inputs] == names
    assert len(set(names)) == len(names)


def quietly_lowered(quantized: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lower(quantized, *args, **options)


@pytest.mark.parametrize(
    ("name", "recover"), [*((name, None) for name in OUTPUTS), ("none in a dict", "auto"), ("a buffer", "fast")]
)
def test_outputs(name: str, recover: str | None) -> None:
    model = seeded(Positional, OUTPUTS[name])
    data = [(x(),) for _ in range(SAMPLES)]
    quantized = quantize(model, data[0], data, recover=recover, progress=False)
    program = lower(quantized)
    with torch.no_grad():
        wanted = model(*data[0])
    assert_close(wanted, quantized(*data[0]))
    assert_close(wanted, program.run(*data[0]))
    assert_close(wanted, load(program.buffer).run(*data[0]))
    kinds = [isinstance(leaf, Tensor) for leaf in leaves(wanted)]
    assert [isinstance(info, TensorInfo) for info in program.outputs] == kinds


@pytest.mark.parametrize("name", ["none in a dict", "numbers", "a buffer", "twice", "an input as it is"])
def test_outputs_of_any_form_with_int8_io_and_in_evaluation(name: str) -> None:
    model = seeded(Positional, OUTPUTS[name])
    data = [(x(),) for _ in range(SAMPLES)]
    quantized = quantize(model, data[0], data, recover=None, progress=False)
    program = quietly_lowered(quantized, int8_io=True)
    info = program.inputs[0]
    given = info.quantize(*data[0]) if info.scale is not None else data[0][0]
    infos = zip(program.outputs, leaves(program.run(given)), strict=True)
    found = [info.dequantize(value) if isinstance(info, TensorInfo) and info.scale else value for info, value in infos]
    with torch.no_grad():
        assert_close(model(*data[0]), found)
    assert analyze(model, quantized, data, samples=2).output_sqnr_db > 20
    assert compare_layers(quantized, program, data, samples=1).first is None
    pairs = [(inputs, leaves(model(*inputs))) for inputs in data[:2]]

    def worst(outputs: Any, label: Any) -> float:
        tensors = zip(leaves(outputs), label, strict=True)
        return min(sqnr(b, a) for a, b in tensors if isinstance(b, Tensor) and b.is_floating_point())

    with torch.no_grad():
        for run in (model, quantized, lower(quantized)):
            assert evaluate(run, pairs, worst) > 20


@pytest.mark.parametrize(
    ("name", "recover"), [*((name, None) for name in ARGUMENTS), ("keyword-only", "auto"), ("one dict", "fast")]
)
def test_arguments(name: str, recover: str | None) -> None:
    kind, sample = ARGUMENTS[name]
    model = seeded(kind, linear)
    torch.manual_seed(1)
    data = [sample() for _ in range(SAMPLES)]
    quantized = quantize(model, data[0], data, recover=recover, progress=False)
    program = lower(quantized)
    with torch.no_grad():
        wanted = called(model, data[0])
    assert_close(wanted, called(quantized.module, data[0]))
    for run in (program.run, load(program.buffer).run):
        found = run(**data[0]) if isinstance(data[0], dict) and kind is not OneDict else run(*_as_tuple(data[0]))
        assert_close(wanted, found)
    assert_names_are_equal(program.buffer)
    flat = quantized.examples.leaves
    assert_close(wanted, program.run(*flat))
    assert_close(wanted, program.run(*(value for value in flat if isinstance(value, Tensor))))
    assert [info.value for info in program.inputs if isinstance(info, ConstantInfo)] == [
        value for value in flat if not isinstance(value, Tensor)
    ]


def _as_tuple(sample: Any) -> tuple[Any, ...]:
    return sample if isinstance(sample, tuple) else (sample,)


@pytest.mark.parametrize("name", ["keyword-only with a number", "none and text", "one dict", "the same by name"])
def test_arguments_of_any_form_in_analyze_and_compare_layers(name: str) -> None:
    kind, sample = ARGUMENTS[name]
    model = seeded(kind, linear)
    torch.manual_seed(1)
    data = [sample() for _ in range(SAMPLES)]
    quantized = quantize(model, data[0], data, recover=None, progress=False)
    assert analyze(model, quantized, data, samples=2).output_sqnr_db > 20
    assert analyze(model, quantized.module, data, samples=2).output_sqnr_db > 20
    program = quietly_lowered(quantized, int8_io=True)
    assert compare_layers(quantized, program, data, samples=1).first is None
    with torch.no_grad():
        pairs = [(inputs if kind is not OneDict else _as_tuple(inputs), called(model, inputs)) for inputs in data[:2]]
        for run in (model, quantized, lower(quantized)):
            assert evaluate(run, pairs, lambda found, wanted: sqnr(leaves(wanted)[0], leaves(found)[0])) > 20


@pytest.mark.parametrize(
    "name", ["keyword-only with a number", "none and text", "one dict", "a registered dataclass", "the same by name"]
)
def test_arguments_in_the_documented_flow(name: str) -> None:
    kind, sample = ARGUMENTS[name]
    model = seeded(kind, linear)
    torch.manual_seed(1)
    data = [sample() for _ in range(SAMPLES)]
    quantized = quantize(model, data[0], data, recover=None, progress=False)  # this call registers the dataclass
    examples = quantized.examples
    exported = torch.export.export(model, examples.args, dict(examples.kwargs))
    prepared = prepare_pt2e(exported.module(), NeutronQuantizer())
    with torch.no_grad():
        for inputs in data:
            called(prepared, inputs)
        converted = convert_pt2e(prepared)
        assert_close(called(model, data[0]), called(converted, data[0]))
    again = torch.export.export(converted, examples.args, dict(examples.kwargs))
    specs = generate_neutron_compile_spec("imxrt700")
    edge = to_edge_transform_and_lower(again, partitioner=[NeutronPartitioner(specs)])
    program = HostProgram.from_bytes(bytes(edge.to_executorch().buffer))
    assert_names_are_equal(program.buffer)
    tensors = [value for value in examples.leaves if isinstance(value, Tensor)]
    with torch.no_grad():
        assert_close(called(model, data[0]), program.run(*tensors))
    assert_close(program.run(*tensors), lower(again).run(*tensors), 100)


def test_plain_inputs_by_name() -> None:
    model = seeded(Optional, linear)
    data = [(x(), torch.rand(1, 8)) for _ in range(SAMPLES)]
    program = lower(quantize(model, data[0], data, progress=False))
    wanted = program.run(*data[0])
    assert torch.equal(program.run(mask=data[0][1], x=data[0][0]), wanted)
    assert torch.equal(program.run(data[0][0].numpy(), mask=data[0][1].numpy()), wanted)
    assert torch.equal(copy.deepcopy(program).run(data[0][0], mask=data[0][1]), wanted)
    for inputs, named, message in (
        ((), {"x": data[0][0]}, "got no input 'mask'"),
        ((data[0][0],), {"x": data[0][0]}, "'x' twice"),
        ((data[0][0],), {"masc": data[0][1]}, "no input 'masc'; its inputs are 'x', 'mask'"),
        ((data[0][0],) * 3, {}, "takes 2 inputs, got 3"),
    ):
        with pytest.raises(InputError, match=message):
            program.run(*inputs, **named)
    assert_names_are_equal(program.buffer)
    loaded = load(program.buffer)
    assert loaded.input_names() == ["x", "mask"]
    assert torch.equal(loaded.run(mask=data[0][1], x=data[0][0]), wanted)
    with pytest.raises(InputError, match="no input 'masc'; its inputs are 'x', 'mask'"):
        loaded.run(data[0][0], masc=data[0][1])


@pytest.mark.parametrize("damage", [(b'[[["batch"', b'{[["batch"'), (b'[[["batch"', b'[[[ 9000 "')])
def test_damaged_names_of_inputs_are_refused(damage: tuple[bytes, bytes]) -> None:
    kind, sample = ARGUMENTS["one dict"]
    data = [sample() for _ in range(2)]
    pte = lower(quantize(seeded(kind, linear), data[0], data, recover=None, progress=False)).buffer
    assert pte.count(damage[0]) == 1
    with pytest.raises(FormatError, match=r"a file: the names of its inputs cannot be read: .*Lower the model again"):
        inspect_bytes(pte.replace(*damage), "a file")
    with pytest.raises(HostError, match="cannot be loaded"):
        load(pte.replace(*damage))


def test_another_constant_is_refused() -> None:
    model = seeded(Optional, linear)
    data = [(x(), None, torch.rand(1, 8), "relu") for _ in range(SAMPLES)]
    quantized = quantize(model, data[0], data, progress=False)
    program = lower(quantized)
    for run in (program.run, load(program.buffer).run):
        with pytest.raises(InputError, match=r"input 'mode' is 'gelu', expected 'relu': the program was exported with"):
            run(*data[0][:3], "gelu")
    with pytest.raises(InputError, match=r"the model takes .*'relu'"):
        analyze(None, quantized, [(*data[0][:3], "gelu")])


def test_another_constant_is_refused_in_the_documented_flow() -> None:
    model = seeded(Optional, linear)
    exported = torch.export.export(model, (x(), None, torch.rand(1, 8), "relu"))
    prepared = prepare_pt2e(exported.module(), NeutronQuantizer())
    prepared(x(), None, torch.rand(1, 8), "relu")
    converted = convert_pt2e(prepared)
    for module in (prepared, converted):
        with pytest.raises(InputError, match="Input 'mode' is 'gelu'; the model was exported for 'relu'"):
            module(x(), None, torch.rand(1, 8), "gelu")


def test_one_tensor_given_for_two_inputs() -> None:
    """torch.export merges both into one input and leaves the other one unused."""
    model = seeded(Optional, linear)
    one = x()
    data = [(x(), torch.rand(1, 8)) for _ in range(SAMPLES)]
    program = lower(quantize(model, (one, one), data, progress=False))
    with torch.no_grad():
        assert_close(model(*data[0]), program.run(*data[0]))


def test_numpy_arrays_everywhere() -> None:
    model = seeded(Keyword, linear)
    rng = np.random.default_rng(0)
    data = [
        {"x": rng.normal(size=(1, 8)).astype(np.float32), "scale": rng.random((1, 8), dtype=np.float32)}
        for _ in range(SAMPLES)
    ]
    quantized = quantize(model, data[0], data, progress=False)
    program = lower(quantized)
    with torch.no_grad():
        wanted = model(**{name: torch.from_numpy(value) for name, value in data[0].items()})
    assert_close(wanted, program.run(**data[0]))
    assert_close(wanted, quantized(**data[0]))
    assert analyze(None, quantized, data, samples=2).output_sqnr_db > 20
    assert evaluate(program, [(inputs, 0) for inputs in data], lambda outputs, _: float(outputs.numel())) == 8
    plain = nn.Sequential(nn.Linear(8, 4)).eval()
    samples = rng.normal(size=(16, 8)).astype(np.float32)
    assert quantize(plain, samples[:1], samples, progress=False)(samples[:1]).shape == (1, 4)


def test_text_among_the_outputs_is_refused() -> None:
    model = seeded(Positional, lambda m, v: (m.l(v), "name"))
    with pytest.raises(ModelError, match=r"output 1 is the text 'name'"):
        lower(quantize(model, (x(),), [(x(),) for _ in range(SAMPLES)], progress=False))


def test_example_inputs_of_another_type_are_refused() -> None:
    with pytest.raises(InputError, match=r"example_inputs may contain tensors, .*; got object"):
        quantize(seeded(Positional, linear), (object(),), [(x(),)])
    with pytest.raises(InputError, match=r"example_inputs have the name 'y', but forward takes only .* Use the names"):
        quantize(seeded(Optional, linear), {"x": x(), "y": x()}, [(x(),)])


@pytest.mark.parametrize("given", [({"a": 0, "b": 1},), ([0, 1],), ((0, 1),)])
def test_a_documented_program_takes_the_arguments_of_the_model(given: tuple[Any, ...]) -> None:
    class Sum(nn.Module):
        def forward(self, given: Any) -> torch.Tensor:
            first, second = given.values() if isinstance(given, dict) else given
            return torch.add(first.sigmoid(), second)

    tensors = [torch.randn(2, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    arguments = tree_map(tensors.__getitem__, given)
    converted = convert(Sum().eval(), arguments)
    program = load(lower_documented(converted, arguments).pte)
    assert torch.equal(program.run(*arguments), program.run(*tensors))
    assert torch.allclose(program.run(*tensors), converted(*arguments), atol=0.05)
    with pytest.raises(InputError, match="argument 0"):
        program.run({})
    with pytest.raises(InputError, match="does not contain the names of its inputs"):
        program.run(given=arguments[0])


def test_a_text_is_left_out_of_a_documented_program() -> None:
    model = seeded(Optional, linear)
    sample: tuple[Any, ...] = x(), None, torch.rand(1, 8), "relu"
    converted = convert(model, sample)
    pte = lower_documented(converted, sample).pte
    wanted = converted(*sample)
    for given in (sample[:3], (sample[0], sample[2]), (*sample[:3], None)):
        assert torch.allclose(load(pte).run(*given), wanted, atol=0.05)
    with pytest.raises(InputError, match=r"input 'argument 3' is the text 'relu', but this .*Leave this input out"):
        load(pte).run(*sample)
    assert compare_layers(converted, pte, [sample], samples=1).output_lsb <= 1


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        (((0, [1, (2,)]), {"k": {"a": 3, 7: 4}}), [("argument 0",), ("argument 1", 0), ("argument 1", 1, 0), ("k", "a"),
                                                   ("k", 7)]),
        (((Registered(x(), x()),), {}), [("argument 0", "left"), ("argument 0", "right")]),
        (((), {}), []),
    ],
)  # fmt: skip
def test_paths_of_a_serialized_tree(tree: Any, paths: list[Any]) -> None:
    assert paths_from_tree(treespec_dumps(tree_structure(tree))) == paths


@pytest.mark.parametrize("text", ["", "[]", "[1, {}]", '[1, {"children_spec": [1]}]', '[1, {"children_spec": [1, 2]}]'])
def test_a_damaged_tree_is_refused(text: str) -> None:
    assert paths_from_tree(text) is None


@pytest.mark.parametrize("recover", [None, "fast"])
def test_the_float_graph_takes_inputs_by_name_and_by_position(recover: str | None) -> None:
    samples = [{"input": torch.rand(2, 8)} for _ in range(2)]
    reference = quantize(nn.Linear(8, 4).eval(), samples[0], samples, recover=recover).reference
    assert reference is not None
    torch.testing.assert_close(reference(**samples[0]), reference(samples[0]["input"]))
