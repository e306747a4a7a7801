"""Complex numbers become pairs of real numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.both_flows import assert_one_delegate_in_both_flows, samples_of
from tests.flow_support import flat, seeded
from tests.oracle import Function
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, lower, passes, quantize
from openneutron.errors import ModelError
from openneutron.targets import TARGETS

ROW, IMAGES = (2, 16), (3, 4, 5)
WEIGHT = torch.linspace(-1, 1, 48).reshape(8, 3, 2)
Call = Callable[..., Any]


def complex_of(values: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(values.reshape(*values.shape[:-1], -1, 2))


def real_of(values: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(values)


EXACT: dict[str, tuple[Call, tuple[int, ...]]] = {
    "product": (lambda x: real_of(complex_of(x) * complex_of(x.flip(0))), ROW),
    "with a constant": (lambda x: real_of(complex_of(x) * complex_of(WEIGHT.reshape(-1)[:16])), ROW),
    "with numbers": (lambda x: real_of((x * 1j + 2) * (1 - 2j) - complex_of(x.repeat(1, 2))), ROW),
    "with a real tensor": (lambda x: real_of(complex_of(x) * x[:, :8] + x[:, 8:]), ROW),
    "quotients": (lambda x: real_of(complex_of(x) / complex_of(x.flip(0) + 3) + complex_of(x) / 2.5), ROW),
    "conjugate": (lambda x: (complex_of(x).conj() * complex_of(x)).real, ROW),
    "imaginary part": (lambda x: (x.to(torch.complex64) * (1 + 1j)).imag - x.to(torch.complex64).imag, ROW),
    "exponential": (lambda x: real_of(torch.exp(complex_of(x))) + real_of(torch.exp(1j * x[:, :8])), ROW),
    "polar": (lambda x: real_of(torch.polar(x.abs(), x)), ROW),
    "complex": (lambda x: torch.complex(x, x.flip(0)).abs(), ROW),
    "angle": (lambda x: complex_of(x).angle(), ROW),
    "negative and alpha": (lambda x: real_of(torch.sub(-complex_of(x), complex_of(x.flip(0)), alpha=2)), ROW),
    "matrix product": (lambda x: real_of(complex_of(x) @ complex_of(WEIGHT.reshape(8, 6))), ROW),
    "einsum": (lambda x: real_of(torch.einsum("bi,io->bo", complex_of(x), complex_of(WEIGHT.reshape(8, 6)))), ROW),
    "moves": (lambda x: real_of(torch.cat([complex_of(x), x[:, :8]], 1).T.unsqueeze(0)[..., 1:].roll(1, 1)), ROW),
    "parts": (lambda x: real_of(complex_of(x).chunk(2, 1)[1] + complex_of(x).unbind(0)[0][:4]), ROW),
    "indices": (lambda x: real_of(complex_of(x)[:, torch.tensor([0, 2])]), ROW),
    "sums": (lambda x: real_of(complex_of(x).sum(1) + complex_of(x).mean()), ROW),
    "fft": (lambda x: real_of(torch.fft.fft(torch.fft.fft(x))), ROW),
    "fft of another size": (lambda x: real_of(torch.fft.ifft(torch.fft.fft(x, n=20), n=12, norm="forward")), ROW),
    "fft2": (lambda x: torch.fft.fftshift(torch.fft.fft2(x, norm="ortho")).abs(), IMAGES),
    "fftn": (lambda x: real_of(torch.fft.ifftn(torch.fft.fftn(x, s=(4, 6)), dim=(0, 2))), IMAGES),
    "rfft": (lambda x: torch.fft.rfft(x, dim=1, norm="forward").abs(), IMAGES),
    "rfftn": (lambda x: torch.fft.irfftn(torch.fft.rfftn(x), s=x.shape), IMAGES),
    "rfft2": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x, dim=(0, 1)), s=(3, 4), dim=(0, 1)), IMAGES),
    "irfft of half a spectrum": (lambda x: torch.fft.irfft(torch.fft.rfft(x)[:, :5], n=16), ROW),
    "irfft of odd sizes": (lambda x: torch.fft.irfft(torch.fft.rfft(x), n=15, norm="ortho"), ROW),
    "irfft of real values": (lambda x: torch.fft.irfft(x.to(torch.complex64)), ROW),
    "stft": (lambda x: real_of(torch.stft(x, 8, 2, window=torch.hann_window(8), return_complex=True)), (1, 32)),
    "stft without batch": (lambda x: torch.stft(
        x, 8, win_length=6, window=torch.hann_window(6), center=False, normalized=True, onesided=False,
        return_complex=True).abs(), (32,)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_the_function_is_kept(name: str) -> None:
    function, shape = EXACT[name]
    (sample,) = samples_of([shape], 1)
    model = Function(lambda scale, x: function(x * scale), torch.tensor(0.7)).eval()
    module = passes.prepare(torch.export.export(model, sample).module(), TARGETS["imxrt700"])
    assert not [node for node in module.graph.nodes if getattr(node.meta.get("val"), "is_complex", bool)()]
    for got, want in zip(flat(module(*sample)), flat(model(*sample)), strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


class Attention(nn.Module):
    """Attention of 2 heads with rotary embeddings, as in Llama."""

    turns: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(16, 16), nn.Linear(16, 16)
        steps = torch.outer(torch.arange(6).float(), 10000 ** -(torch.arange(0, 8, 2) / 8))
        self.register_buffer("turns", torch.polar(torch.ones_like(steps), steps), persistent=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.reshape(1, 6, 2, 8)
        pairs = torch.view_as_complex(heads.float().reshape(1, 6, 2, 4, 2))
        turned: torch.Tensor = pairs * self.turns[None, :, None, :]
        return real_of(turned).flatten(3).type_as(x).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries, keys = self.rotate(self.queries(x)), self.rotate(self.keys(x))
        return F.scaled_dot_product_attention(queries, keys, keys, is_causal=True)


class GlobalFilter(nn.Module):
    """The filter in the frequency domain of GFNet."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.weight)
        filtered: torch.Tensor = torch.fft.irfft2(spectrum, s=(4, 4), dim=(1, 2), norm="ortho")
        return filtered


class Mixing(nn.Module):
    """The mixing of tokens in FNet."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = torch.fft.fft(torch.fft.fft(self.layer(x), dim=-1), dim=-2)
        return mixed.real


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "rotary embeddings": (Attention, (1, 6, 16), 29.0),
    "global filter": (GlobalFilter, (1, 4, 4, 6), 28.0),
    "mixing": (Mixing, (1, 5, 8), 30.0),
}


@pytest.mark.parametrize("recover", [None, "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_one_delegate_in_both_flows(name: str, recover: str | None) -> None:
    make, shape, floor = NETWORKS[name]
    assert_one_delegate_in_both_flows(seeded(make), samples_of([shape]), floor, recover)


@pytest.mark.parametrize("name", NETWORKS)
def test_training(name: str) -> None:
    make, shape, _ = NETWORKS[name]
    ((sample,),) = samples_of([shape], 1)
    exported = torch.export.export(seeded(make).train(), (sample,)).module()
    prepared = prepare_qat_pt2e(exported, NeutronQuantizer(is_qat=True))
    prepared(sample).square().mean().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    converted = convert_pt2e(prepared)
    program = lower(converted, (sample,))
    assert not [row for row in program.placement if row.where == "cpu"]
    torch.testing.assert_close(program.run(sample), converted(sample), atol=0.1, rtol=0.0)


REFUSED: dict[str, tuple[Call, str]] = {
    "an operator without a rule": (lambda x: real_of(complex_of(x).sqrt()), r"no rule.*aten\.sqrt"),
    "an output": (complex_of, r"output is complex.*view_as_real"),
    "a large transform": (lambda x: torch.fft.rfft(x, n=5000).abs(), r"at most 1024.*aten\.fft_rfft"),
    "a computed window": (lambda x: torch.stft(x, 16, window=x[0], return_complex=True).abs(), r"window.*aten\.stft"),
}


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, documented: bool) -> None:
    function, message = REFUSED[name]
    samples = samples_of([ROW], 2)
    model = Function(function).eval()
    exported = torch.export.export(model, samples[0]).module()
    with pytest.raises(ModelError, match=message) as error:
        prepare_pt2e(exported, NeutronQuantizer()) if documented else quantize(model, samples[0], samples)
    assert error.value.source is not None


def test_a_complex_input_is_refused() -> None:
    sample = torch.ones(ROW, dtype=torch.complex64)
    exported = torch.export.export(Function(torch.abs).eval(), (sample,)).module()
    with pytest.raises(ModelError, match=r"input is complex.*view_as_real"):
        prepare_pt2e(exported, NeutronQuantizer())
