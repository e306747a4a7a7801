"""Writes to slices and views become slices and a concatenation on the NPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.both_flows import assert_one_delegate_in_both_flows, one_delegate, samples_of
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, flat, lower_documented, seeded
from tests.models import Model, conv, image
from tests.passes.test_passes import exported, names
from torch import nn

from openneutron import NeutronQuantizer, lower, passes, quantize
from openneutron.errors import ModelError
from openneutron.passes.functionalize import writes_memory
from openneutron.targets import TARGETS

Function = Callable[[torch.Tensor], Any]


def _partial(x: torch.Tensor) -> Any:
    x[:, :2] = F.relu(x[:, :2])
    return x


def _border(x: torch.Tensor) -> Any:
    x[:, :, 0] = 0
    x[:, :, -1] = 0
    x[..., 0] = 0
    x[..., -1] = 0
    return x


def _temporal_shift(x: torch.Tensor) -> Any:
    out = torch.zeros_like(x)
    out[:-1, :1] = x[1:, :1]
    out[1:, 1:2] = x[:-1, 1:2]
    out[:, 2:] = x[:, 2:]
    return out


def _strided(x: torch.Tensor) -> Any:
    x[:, ::2] = F.relu(x[:, ::2])
    x[:, :, 1::3] = 0
    return x


def _woven(x: torch.Tensor) -> Any:
    out = x.new_zeros(x.shape)
    out[..., ::2] = x[..., :4]
    out[..., 1::2] = x[..., 4:]
    return out


def _listed(x: torch.Tensor) -> Any:
    x[:, [0, 2]] = F.relu(x[:, 1:3])
    x[:, :, [1, 5]] = 0.5
    return x


def _in_place(x: torch.Tensor) -> Any:
    x[:, :2].add_(1)
    x[:, 2:].mul_(0.5)
    x[:, 0].copy_(x[:, 1])
    x[..., 3].fill_(0.25)
    x[0, 1] *= 2
    return x


def _into_a_larger_one(x: torch.Tensor) -> Any:
    out = x.new_zeros(x.shape[0], 6, 8, 8)
    out[:, 1:5] = x
    return F.relu(out)[:, :4]


def _stepwise(x: torch.Tensor) -> Any:
    out = torch.empty_like(x)
    for row in range(8):
        out[:, :, row] = F.relu(x[:, :, 7 - row])
    return out


WRITES: dict[str, tuple[Function, int]] = {
    "partial": (_partial, 1), "border": (_border, 1), "temporal shift": (_temporal_shift, 4), "strided": (_strided, 1),
    "woven": (_woven, 1), "listed": (_listed, 1), "in place": (_in_place, 1), "larger": (_into_a_larger_one, 1),
    "stepwise": (_stepwise, 1),
}  # fmt: skip


def _model(name: str) -> nn.Module:
    return seeded(lambda: Model(lambda m, x: m.d(WRITES[name][0](m.c(x))), c=conv(), d=conv()))


def _prepared(function: Function, shape: tuple[int, ...] = (1, 4, 8, 8)) -> list[str]:
    model = Model(lambda _, x: function(F.relu(x)))
    return names(passes.prepare(exported(model, image(*shape)), TARGETS["imxrt700"]))


@pytest.mark.parametrize("name", WRITES)
def test_one_delegate_in_both_flows(name: str) -> None:
    assert_one_delegate_in_both_flows(_model(name), samples_of([(WRITES[name][1], 4, 8, 8)]), 25.0, recover=None)


@pytest.mark.parametrize("recover", ["fast", "auto"])
@pytest.mark.parametrize("name", ["partial", "temporal shift"])
def test_recovery(name: str, recover: str) -> None:
    one_delegate(_model(name), samples_of([(WRITES[name][1], 4, 8, 8)]), 25.0, recover)


@pytest.mark.parametrize("name", WRITES)
def test_the_prepared_graph_computes_the_same(name: str) -> None:
    model, inputs = _model(name), image(WRITES[name][1], 4, 8, 8)
    module = passes.prepare(exported(model, inputs), TARGETS["imxrt700"])
    torch.testing.assert_close(module(inputs), model(inputs), rtol=1e-5, atol=1e-5)


def _slices(x: torch.Tensor) -> Any:
    x = x.flatten(2).transpose(1, 2).clone()
    x[..., :2] = x[..., :2] * 80
    x[..., 2:] = x[..., 2:].sigmoid()
    return x


def _selections(x: torch.Tensor) -> Any:
    x = x * 2
    x[:, 0] = x[:, 0] * 100
    x[:, 1] *= 30
    x[:, 2] = x[:, 2].sigmoid()
    x[:, 3] = x[:, 3].tanh()
    return x


@pytest.mark.parametrize("recover", [None, "auto"])
@pytest.mark.parametrize(("decode", "dim"), [(_slices, 2), (_selections, 1)], ids=["slices", "selections"])
def test_a_part_that_is_scaled_in_place_does_not_widen_the_range_of_the_others(
    decode: Function, dim: int, recover: str | None
) -> None:
    model = seeded(lambda: Model(lambda m, x: decode(m.c(x)), c=conv()))
    samples = samples_of([(1, 4, 8, 8)])
    program = lower(quantize(model, samples[0], samples, recover=recover, progress=False))
    documented = lower_documented(convert(model, samples[0], calibration=samples), samples[0])
    for run in (program.run, documented.run):
        found, wanted = (
            torch.stack([flat(function(*sample))[0].movedim(dim, 0) for sample in samples[:4]], 1)
            for function in (run, model)
        )
        for channel in range(4):
            assert signal_to_noise(found.__getitem__, wanted.__getitem__, [(torch.tensor(channel),)]) > 25, channel


def test_a_write_to_all_elements_removes_the_old_values() -> None:
    assert _prepared(_woven).count("slice.Tensor") == 2
    assert _prepared(_stepwise).count("cat.default") == 1


def test_a_zeroed_border_is_two_concatenations() -> None:
    assert _prepared(_border).count("cat.default") == 2


def test_training() -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

    module = torch.export.export(_model("partial").train(), (image(),)).module()
    prepared = prepare_qat_pt2e(module, NeutronQuantizer(is_qat=True))
    prepared(image()).sum().backward()
    program = lower(convert_pt2e(prepared), (image(),))
    assert {row.where for row in program.placement} == {"npu"}


def test_a_write_to_a_part_of_an_input_is_refused() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        x[:, :2] = 0
        return m.c(x)

    with pytest.raises(ModelError, match=r"a part of an input.*x\.clone") as caught:
        passes.prepare(exported(Model(function, c=conv())), TARGETS["imxrt700"])
    assert caught.value.source is not None


PARTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "split": lambda x: torch.split(x, 2, 1)[0].mul_(2),
    "split sizes": lambda x: torch.split(x, [1, 3], 1)[1].relu_(),
    "chunk": lambda x: x.chunk(2, 1)[1].relu_(),
    "unbind": lambda x: x.unbind(1)[2].fill_(0.5),
}


@pytest.mark.parametrize("name", PARTS)
def test_writes_to_one_of_several_views(name: str) -> None:
    """torch exports these models without gradients only."""

    def function(m: Any, x: torch.Tensor) -> Any:
        value = m.c(x)
        PARTS[name](value)
        return m.d(value)

    model, samples = seeded(lambda: Model(function, c=conv(), d=conv())), samples_of([(1, 4, 8, 8)])
    program = lower(quantize(model, samples[0], samples, recover=None, progress=False))
    with torch.no_grad():
        documented = lower_documented(convert(model, samples[0], calibration=samples), samples[0])
        for run in (program.run, documented.run):
            assert signal_to_noise(run, model, samples[:2]) > 25
    assert {(row.where, row.partition) for row in program.placement} == {("npu", 0)}


REFUSED: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "expand": (lambda x: x[:, :1].expand(1, 4, 8, 8).mul_(1), r"the view that aten\.expand\.default returns"),
    "unfold": (lambda x: x.unfold(2, 3, 2).mul_(2), r"the view that aten\.unfold\.default returns"),
    "as_strided": (lambda x: x.as_strided((2, 2), (8, 1)).zero_(), r"the view that aten\.as_strided\.default returns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_writes_that_cannot_be_written_back_name_their_view(name: str) -> None:
    write, pattern = REFUSED[name]

    def function(m: Any, x: torch.Tensor) -> Any:
        value = m.c(x)
        write(value)
        return m.d(value)

    with pytest.raises(ModelError, match=pattern + r".*x\.clone") as caught:
        passes.prepare(exported(seeded(lambda: Model(function, c=conv(), d=conv()))), TARGETS["imxrt700"])
    assert caught.value.source is not None
    assert caught.value.op is not None


def _halved(x: torch.Tensor, parts: Callable[[torch.Tensor], Any]) -> Any:
    parts(x)[0].mul_(0.5)
    return x


# Writes through views other than slices, reshapes and transposes.
VIEWS: dict[str, Function] = {
    "hsplit": lambda x: _halved(x, lambda y: torch.hsplit(y, 2)),
    "vsplit": lambda x: _halved(x, lambda y: torch.vsplit(y, [2, 3])),
    "dsplit": lambda x: _halved(x, lambda y: torch.dsplit(y, 2)),
    "unsafe_split": lambda x: _halved(x, lambda y: y.unsafe_split(2, 1)),
    "unsafe_chunk": lambda x: _halved(x, lambda y: y.unsafe_chunk(2, 3)),
    "tensor_split": lambda x: _halved(x, lambda y: y.tensor_split(3, 3)),
    "diagonal": lambda x: (x.diagonal(0, 2, 3).mul_(0.5), x)[1],
    "part of a diagonal": lambda x: (x[:, 1:].diagonal(1, 2, 3)[..., :2].fill_(0.25), x)[1],
    "fill_diagonal_": lambda x: (x[0, 0].fill_diagonal_(0.5), x)[1],
    "unfold": lambda x: (x.unfold(3, 2, 2)[..., 0].mul_(0.5), x)[1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_writes_through_other_views(name: str) -> None:
    assert_runs_between_convolutions(VIEWS[name], 25.0)


def assert_runs_between_convolutions(write: Function, floor: float) -> None:
    """Checks that a function between two convolutions keeps its values, and is one delegate of `floor` dB."""
    model = seeded(lambda: Model(lambda m, x: m.d(write(m.c(x))), c=conv(), d=conv()))
    inputs = image(1, 4, 8, 8)
    module = passes.prepare(exported(model, inputs), TARGETS["imxrt700"])
    torch.testing.assert_close(module(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    assert_one_delegate_in_both_flows(model, samples_of([(1, 4, 8, 8)]), floor, recover=None)


COMPARISONS: dict[str, Function] = {
    "gt_": lambda x: x * x.clone().gt_(0.25), "le_": lambda x: x * x.clone().le_(x.flip(3)),
    "ne_": lambda x: x * x.relu().ne_(0), "logical_not_": lambda x: x + x.relu().logical_not_(),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_in_place_write_numbers(name: str) -> None:
    assert_runs_between_convolutions(COMPARISONS[name], 10.0)


def _kept(x: torch.Tensor, change: Callable[[torch.Tensor, torch.Tensor], Any]) -> torch.Tensor:
    mask = x > 0.25
    change(mask, x < -0.25)
    return x * mask


# Augmented assignments to a mask, whose operators have names such as __ior__.
AUGMENTED: dict[str, Function] = {
    "|=": lambda x: _kept(x, lambda mask, other: mask.__ior__(other)),
    "&=": lambda x: _kept(x, lambda mask, other: mask.__iand__(~other)),
    "^=": lambda x: _kept(x, lambda mask, other: mask.__ixor__(other)),
    "|= to a part": lambda x: _kept(x, lambda mask, other: mask[:, :2].__ior__(other[:, :2])),
    "|= of a number": lambda x: _kept(x, lambda mask, _: mask.__ior__(False)),
}


@pytest.mark.parametrize("name", AUGMENTED)
def test_augmented_assignments_to_masks(name: str) -> None:
    model = seeded(lambda: Model(lambda m, x: m.d(AUGMENTED[name](m.c(x))), c=conv(), d=conv()))
    inputs = image(1, 4, 8, 8)
    module = passes.prepare(exported(model, inputs), TARGETS["imxrt700"])
    torch.testing.assert_close(module(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    assert not any(map(writes_memory, module.graph.nodes))
