"""Batch norms after convolutions and linears. torchao folds some of them wrongly, before it calls a quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import convert, lower_documented, seeded
from tests.models import Model, bn, bn1, conv, image
from torch import nn
from torch.export import export
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, quantize
from openneutron.core.fx import op_name
from openneutron.errors import ModelError
from openneutron.quantizer.torchao_folding import is_folded_wrongly

SAMPLES = 8
VECTOR, SEQUENCE, IMAGE = (32, 4), (8, 4, 8), (2, 4, 8, 8)
LAYERS: dict[str, tuple[Callable[..., nn.Module], type[Any], tuple[int, ...]]] = {
    "linear": (lambda **options: nn.Linear(4, 4, **options), nn.BatchNorm1d, VECTOR),
    "linear of rank 3": (lambda **options: nn.Linear(8, 8, **options), nn.BatchNorm1d, SEQUENCE),
    "conv1d": (lambda **options: nn.Conv1d(4, 4, 3, **options), nn.BatchNorm1d, SEQUENCE),
    "conv2d": (lambda **options: nn.Conv2d(4, 4, 3, **options), nn.BatchNorm2d, IMAGE),
    "conv_transpose1d": (lambda **options: nn.ConvTranspose1d(4, 4, 3, **options), nn.BatchNorm1d, SEQUENCE),
    "conv_transpose2d": (lambda **options: nn.ConvTranspose2d(4, 4, 3, **options), nn.BatchNorm2d, IMAGE),
}
NORMS: dict[str, dict[str, Any]] = {"affine": {}, "plain": {"affine": False}, "cumulative": {"momentum": None}}


@dataclass(frozen=True)
class Case:
    label: str
    build: Callable[[], nn.Module] = field(repr=False)
    shape: tuple[int, ...]
    wrong: bool
    """Whether torchao alone folds it wrongly."""
    floor: float = 32
    """Least SQNR in dB."""


def layer_and_norm(layer: str, norm: str, *, bias: bool) -> Callable[[], nn.Module]:
    build, kind, _ = LAYERS[layer]

    def model() -> nn.Module:
        batch_norm = kind(4, **NORMS[norm])
        nn.init.normal_(batch_norm.running_mean)
        nn.init.uniform_(batch_norm.running_var, 0.5, 2)
        if batch_norm.affine:
            nn.init.uniform_(batch_norm.weight, 0.5, 1.5)
            nn.init.normal_(batch_norm.bias)
        return nn.Sequential(build(bias=bias), batch_norm)

    return model


def plain_cases() -> list[Case]:
    return [
        Case(
            f"{layer}, {norm}, {'with' if bias else 'without'} bias",
            layer_and_norm(layer, norm, bias=bias),
            LAYERS[layer][2],
            layer == "linear" and (norm == "plain" or not bias),
        )
        for layer in LAYERS
        for norm in NORMS
        for bias in (True, False)
        if layer != "linear of rank 3" or norm == "affine"
    ]


def normalized(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)  # type: ignore[no-any-return]


def shared_bias(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.b(F.conv2d(x, m.c.weight, m.c.bias)) + F.conv2d(x, m.d.weight, m.c.bias)  # type: ignore[no-any-return]


def bias_read_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.b(m.c(x)) * m.c.bias[:, None, None]  # type: ignore[no-any-return]


def weight_in_a_buffer(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.b(F.conv2d(x, m.w))  # type: ignore[no-any-return]


def keyword_arguments(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.b(F.linear(bias=m.c.bias, weight=m.c.weight, input=x))  # type: ignore[no-any-return]


def tied_weights() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, bn1(4), second)


def computed_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(m.c(x), m.b.running_mean, m.b.running_var, F.softplus(m.b.weight), m.b.bias)


def norm_of_the_input(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(m.c(x), m.b.running_mean, m.b.running_var, x.mean((0, 2, 3)))


SPECIAL = (
    Case("two norms", lambda: nn.Sequential(conv(), bn(), bn()), IMAGE, True),
    Case("two norms of a linear", lambda: nn.Sequential(nn.Linear(4, 4), bn1(4), bn1(4)), VECTOR, True),
    Case("computed weight", lambda: nn.Sequential(normalized(conv()), bn()), IMAGE, True),
    Case("computed weight of a linear", lambda: nn.Sequential(normalized(nn.Linear(4, 4)), bn1(4)), VECTOR, True),
    Case("computed norm", lambda: Model(computed_norm, c=conv(), b=bn()), IMAGE, True),
    Case("norm of the input", lambda: Model(norm_of_the_input, c=conv(), b=bn()), IMAGE, True, 25),
    Case("shared bias", lambda: Model(shared_bias, c=conv(), d=conv(), b=bn()), IMAGE, True),
    Case("bias read twice", lambda: Model(bias_read_twice, c=conv(), b=bn()), IMAGE, True),
    Case("tied weights", tied_weights, VECTOR, True),
    Case("weight in a buffer", lambda: Model(weight_in_a_buffer, w=image(4, 4, 3, 3), b=bn()), IMAGE, True),
    Case("conv1d of one sample", lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), bn1(8)), (4, 8), True),
    Case("conv2d of one sample", lambda: nn.Sequential(conv(), bn1(6)), (4, 6, 8), True),
    Case("keyword arguments", lambda: Model(keyword_arguments, c=nn.Linear(4, 4), b=bn1(4)), VECTOR, False),
    Case("after a relu", lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), bn1(4)), VECTOR, False),
    Case("in front", lambda: nn.Sequential(bn1(4), nn.Linear(4, 4, bias=False)), VECTOR, False),
    Case("dropout between", lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(), bn1(4)), VECTOR, False),
)  # fmt: skip
PLAIN = plain_cases()


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.label.replace(" ", "_"))


def samples_of(case: Case) -> list[tuple[torch.Tensor]]:
    return [(image(*case.shape, seed=seed),) for seed in range(SAMPLES)]


@torch.no_grad()
def sqnr(model: nn.Module, converted: Callable[..., Any], case: Case) -> float:
    (sample,) = samples_of(case)[0]
    wanted = model(sample)
    return float(10 * torch.log10(wanted.square().mean() / (wanted - converted(sample)).square().mean()))


@each((*PLAIN, *SPECIAL))
def test_models_that_torchao_folds_correctly(case: Case) -> None:
    module = export(seeded(case.build), samples_of(case)[0]).module()
    assert is_folded_wrongly(module) == case.wrong


@each((*PLAIN, *SPECIAL))
def test_the_documented_flow_equals_float(case: Case) -> None:
    model, samples = seeded(case.build), samples_of(case)
    converted = convert(model, samples[0], strict=case in PLAIN, calibration=samples)
    assert sqnr(model, converted, case) > case.floor
    assert not any(op_name(node) == "aten.batch_norm.default" for node in converted.graph.nodes)


@each((*PLAIN, *SPECIAL))
def test_the_short_flow_equals_float(case: Case) -> None:
    model, samples = seeded(case.build), samples_of(case)
    recover = "fast" if case in SPECIAL else None
    assert sqnr(model, quantize(model, samples[0], samples, recover=recover), case) > case.floor


def test_dead_operators_are_removed_as_often_for_many_norms_as_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.fx.Graph] = []
    remove = torch.fx.Graph.eliminate_dead_code

    def counted(graph: torch.fx.Graph, *args: Any, **options: Any) -> bool:
        calls.append(graph)
        return remove(graph, *args, **options)

    monkeypatch.setattr(torch.fx.Graph, "eliminate_dead_code", counted)
    counts = []
    for layers in (2, 8):
        calls.clear()
        build = LAYERS["conv2d"][0]
        model = nn.Sequential(*(part for _ in range(layers) for part in (build(bias=False, padding=1), bn(4)))).eval()
        prepare_pt2e(export(model, (torch.ones(IMAGE),)).module(), NeutronQuantizer())
        counts.append(len(calls))
    assert 0 < counts[0] == counts[1]


def test_a_linear_and_its_norm_become_one_operator() -> None:
    samples = [(image(4, 8, seed=seed),) for seed in range(SAMPLES)]
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8, bias=False), bn1(8)))
    converted = convert(model, samples[0], calibration=samples)
    assert [op_name(node) for node in converted.graph.nodes if op_name(node).startswith("aten.")] == [
        "aten.linear.default"
    ]
    program = lower_documented(converted, samples[0])
    assert (program.delegates, program.cpu) == (1, [])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_norm_without_statistics_is_refused_by_name(layer: str, training: bool) -> None:
    build, kind, shape = LAYERS[layer]
    model = nn.Sequential(build(), kind(4, track_running_stats=False)).train(training)
    module = export(model, (image(*shape),)).module()
    prepare = prepare_qat_pt2e if training else prepare_pt2e
    with pytest.raises(ModelError, match="track_running_stats") as error:
        prepare(module, NeutronQuantizer(is_qat=training))
    assert error.value.op == "aten.batch_norm.default"


def test_a_norm_by_the_batch_is_refused_in_eval_mode() -> None:
    def by_the_batch(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(m.c(x), m.b.running_mean, m.b.running_var, training=True)

    with pytest.raises(
        ModelError, match=r"batch_norm has training=True, so it normalizes by the statistics of its batch"
    ) as error:
        convert(seeded(lambda: Model(by_the_batch, c=conv(), b=bn())), (image(),))
    assert error.value.op == "aten.batch_norm.default"


# torch.export rejects norms with momentum=None in train mode, because they divide by a number of batches.
TRAINED = [case for case in PLAIN if "without bias" in case.label and "cumulative" not in case.label]
# In train mode, the parameters of a norm must not depend on the input.
CONSTANT = [case for case in SPECIAL if case.label != "norm of the input"]


def trained(case: Case, *, training: bool) -> float:
    """Returns the SQNR after training, with the final statistics of the norms. `training` is the mode of the export."""
    model, samples = seeded(case.build).train(training), samples_of(case)
    prepared = prepare_qat_pt2e(export(model, samples[0]).module(), NeutronQuantizer(is_qat=True))
    for sample in samples:
        prepared(*sample)
    return sqnr(model.eval(), convert_pt2e(prepared), case)


@each((*TRAINED, *CONSTANT))
def test_training_in_train_mode_ends_equal_to_float(case: Case) -> None:
    assert trained(case, training=True) > case.floor - 7


@each(SPECIAL)
def test_training_in_eval_mode_ends_equal_to_float(case: Case) -> None:
    assert trained(case, training=False) > case.floor - 3
