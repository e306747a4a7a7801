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
MATRIX = torch.complex(torch.linspace(-1, 1, 40).reshape(8, 5), torch.linspace(1, -0.5, 40).reshape(8, 5))
KERNEL = torch.complex(torch.linspace(-1, 1, 18).reshape(3, 2, 3), torch.ones(3, 2, 3))
WINDOW = torch.hann_window(16)
Call = Callable[..., Any]


def complex_of(values: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(values.reshape(*values.shape[:-1], -1, 2))


def real_of(values: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(values)


def spectrum(x: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = torch.stft(x, 16, 4, window=WINDOW, return_complex=True, **options)
    return found


def written(z: torch.Tensor) -> torch.Tensor:
    """Writes to parts of complex numbers."""
    z = z.clone()
    z[:, :2] = z[:, 2:4] * 2
    z[:, 4] = torch.tensor(1j)
    z.mul_(1j).add_(2)
    return z


def spectral_convolution(x: torch.Tensor) -> torch.Tensor:
    """Multiplies the lowest frequencies by weights, as a Fourier neural operator does."""
    out = torch.zeros(2, 9, dtype=torch.cfloat)
    out[:, :4] = x[:, :4] * MATRIX[0, :4]
    values: torch.Tensor = torch.fft.irfft(out, n=16)
    return values


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
    "irfft of real numbers": (torch.fft.irfft, ROW),
    "irfft2 of real numbers": (lambda x: torch.fft.irfft2(x, s=(3, 4)) * 2, IMAGES),
    "irfftn of real numbers": (lambda x: torch.fft.irfftn(x, norm="forward"), IMAGES),
    "irfft of real values": (lambda x: torch.fft.irfft(x.to(torch.complex64)), ROW),
    "hfft of real numbers": (torch.fft.hfft, ROW),
    "hfft": (lambda x: torch.fft.hfft(complex_of(x), n=13, norm="ortho") + torch.fft.hfft(complex_of(x), 13), ROW),
    "hfft2 of real numbers": (lambda x: torch.fft.hfft2(x, s=(3, 4), norm="forward"), IMAGES),
    "hfftn": (lambda x: torch.fft.hfftn(torch.fft.fft(x), dim=(0, 2)), IMAGES),
    "hfftn of real numbers": (torch.fft.hfftn, IMAGES),
    "ihfft": (lambda x: real_of(torch.fft.ihfft(x, n=10, norm="forward") + torch.fft.ihfft(x, n=10)), ROW),
    "ihfft2": (lambda x: real_of(torch.fft.ihfft2(x, norm="ortho")), IMAGES),
    "ihfftn": (lambda x: real_of(torch.fft.ihfftn(x)), IMAGES),
    "stft": (lambda x: real_of(torch.stft(x, 8, 2, window=torch.hann_window(8), return_complex=True)), (1, 32)),
    "stft without batch": (lambda x: torch.stft(
        x, 8, win_length=6, window=torch.hann_window(6), center=False, normalized=True, onesided=False,
        return_complex=True).abs(), (32,)),
    "parts that broadcast to a matrix product": (lambda x: real_of((x[:, :8] + 1j * x[:, :1]) @ MATRIX), ROW),
    "a part that is a number in a matrix product": (lambda x: real_of((x[:, :8] + 1j) @ MATRIX), ROW),
    "a part that is a number in an einsum": (
        lambda x: real_of(torch.einsum("bi,io->bo", x[:, :8] + 2j, MATRIX)), ROW),
    "parts that broadcast to an fft": (lambda x: real_of(torch.fft.fft(x[:1] + 1j * x, dim=0)), ROW),
    "a part that is a number in an fft": (lambda x: real_of(torch.fft.fft(x + 1j)), ROW),
    "a part that is a number in an irfft": (lambda x: torch.fft.irfft(x[:, :9] * 1j), ROW),
    "parts that broadcast to an irfft": (lambda x: torch.fft.irfft(x[:, :9] + 1j * x[:1, :9]), ROW),
    "complex of tensors that broadcast": (lambda x: real_of(torch.fft.fft(torch.complex(x[:1], x))), ROW),
    "parts that broadcast to a cat": (
        lambda x: real_of(torch.cat([x[:, :8] + 1j * x[0, :8], complex_of(x), x[:, :8] + 1j], 1)), ROW),
    "parts of numbers": (lambda x: (complex_of(x) * 0).abs() + (1j * x).real[:, :8] + (x + 1j).imag[:, :8], ROW),
    "sums of numbers": (lambda x: real_of((x + 1j).sum(1) + (x + 1j * x[:1]).sum(0).mean()), ROW),
    "roots": (lambda x: real_of(complex_of(x).sqrt() + complex_of(x) ** 0.5), ROW),
    "powers": (lambda x: real_of(complex_of(x) ** 3 + complex_of(x).square() + (complex_of(x) + 4) ** -2), ROW),
    "logarithm": (lambda x: real_of((complex_of(x) + 4).log()), ROW),
    "reciprocals": (lambda x: real_of(2 / (complex_of(x) + 4) + 1j / (complex_of(x) + 4)), ROW),
    "numbers minus values": (lambda x: real_of((1 - complex_of(x)) * (1j - complex_of(x))), ROW),
    "adjoint": (lambda x: real_of(complex_of(x) @ complex_of(x).mH + complex_of(x) @ complex_of(x).adjoint()), ROW),
    "adjoint of real numbers": (lambda x: x @ x.mH + x @ x.adjoint(), ROW),
    "inner products": (
        lambda x: real_of(torch.vdot(*complex_of(x)) + torch.dot(*complex_of(x)) + torch.mv(MATRIX.T, x[0, :8] + 0j)),
        ROW),
    "products that torch decomposes": (
        lambda x: real_of(torch.outer(*complex_of(x)) + torch.kron(complex_of(x), MATRIX[:4, :1])), ROW),
    "linear": (lambda x: real_of(F.linear(complex_of(x), MATRIX.T.contiguous(), MATRIX[0])), ROW),
    "convolution": (lambda x: real_of(F.conv1d(complex_of(x)[None], KERNEL, MATRIX[0, :3], padding=1)), ROW),
    "norm": (lambda x: complex_of(x).norm(dim=1), ROW),
    "fills": (lambda x: real_of(torch.full_like(complex_of(x), 1 + 2j) * complex_of(x)
                                + torch.ones_like(complex_of(x))), ROW),
    "masked fills": (
        lambda x: real_of(complex_of(x).masked_fill(x[:, :8] > 0, 1j) + complex_of(x).masked_fill(x[:, 8:] > 0, 2)),
        ROW),
    "where": (
        lambda x: real_of(torch.where(x[:, :8] > 0, complex_of(x), x[:, 8:]) + torch.where(x[:, 8:] > 0, x[:, :8], 1j)),
        ROW),
    "pads": (lambda x: real_of(F.pad(complex_of(x), (1, 2), value=1.5) + F.pad(complex_of(x), (2, 1))), ROW),
    "writes to slices": (lambda x: real_of(written(complex_of(x))), ROW),
    "scans and scatters": (lambda x: real_of(
        complex_of(x).cumsum(1) + complex_of(x).index_add(0, torch.tensor([1]), complex_of(x)[:1])), ROW),
    "grids": (lambda x: real_of(torch.meshgrid(*complex_of(x), indexing="ij")[1] * torch.diagonal(complex_of(x))[0]),
              ROW),
    "views in another dtype": (
        lambda x: complex_of(x).view(torch.float32) + real_of(x.view(torch.complex64)).flatten(1), ROW),
    "spectral convolution": (lambda x: spectral_convolution(torch.fft.rfft(x)), ROW),
    "istft": (lambda x: torch.istft(spectrum(x) * (0.5 + 0.5j), 16, 4, window=WINDOW), (2, 64)),
    "istft of a length": (lambda x: torch.istft(spectrum(x), 16, 4, window=WINDOW, length=60), (2, 64)),
    "istft of a longer length": (lambda x: torch.istft(spectrum(x), 16, 4, window=WINDOW, length=70), (2, 64)),
    "istft of a short window": (lambda x: torch.istft(
        spectrum(x, normalized=True), 16, 4, 12, torch.hann_window(12), normalized=True), (2, 64)),
    "istft of two sides": (
        lambda x: torch.istft(spectrum(x, onesided=False), 16, 4, window=WINDOW, onesided=False), (2, 64)),
    "istft without center": (lambda x: torch.istft(
        spectrum(x, center=False), 16, 4, window=torch.hamming_window(16), center=False), (2, 64)),
    "istft without batch or window": (lambda x: torch.istft(spectrum(x), 16, 4, window=torch.ones(16)), (64,)),
    "integers in a concatenation": (
        lambda x: real_of(torch.cat([complex_of(x), torch.ones(2, 1, dtype=torch.long), x[:, :2] > 0], 1)), ROW),
    "integers in a stack": (lambda x: real_of(torch.stack([complex_of(x), torch.arange(16).reshape(2, 8)])), ROW),
    "integers written to a slice": (
        lambda x: real_of(torch.slice_scatter(complex_of(x), torch.full((2, 2), 3), 1, 2, 4)), ROW),
    "integers of masked fills": (
        lambda x: real_of(complex_of(x).masked_fill(x[:, :8] > 0, torch.tensor(2))), ROW),
    "integers in arithmetic": (
        lambda x: real_of(complex_of(x) * torch.arange(8) + torch.where(x[:, :8] > 0, complex_of(x), torch.arange(8)))
        + (torch.arange(8) + 1j * x[:, :8]).real[..., None], ROW),
    "indices of all kinds": (
        lambda x: real_of(complex_of(x).gather(1, torch.tensor([[1, 2], [0, 3]]))
                          + complex_of(x).index_put((torch.tensor([1]),), complex_of(x)[:1])[:, :2]), ROW),
    "conversions to integers": (
        lambda x: (complex_of(x) * 3).to(torch.int64) + (complex_of(x) * 3).int() + x[:, :8], ROW),
    "norm that torch decomposes": (lambda x: torch.linalg.norm(complex_of(x), dim=1), ROW),
    "l1 losses": (lambda x: F.l1_loss(complex_of(x), complex_of(x.flip(0)), reduction="none")
                  + F.l1_loss(complex_of(x), complex_of(x.flip(0))), ROW),
    "a complex exponent": (lambda x: real_of(complex_of(x) ** (2 + 0j)), ROW),
    "an exponent of zero": (lambda x: real_of(complex_of(x) ** 0) * x[:, :8, None], ROW),
    "complex alphas": (
        lambda x: real_of(torch.add(complex_of(x), complex_of(x.flip(0)), alpha=1j)
                          + torch.rsub(complex_of(x), complex_of(x.flip(0)), alpha=2 - 1j)), ROW),
    "real results of operators on parts": (
        lambda x: (x[:, :8] + torch.full_like(complex_of(x), 0.5, dtype=torch.float32)
                   + complex_of(x).sum(1, keepdim=True, dtype=torch.float32)), ROW),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", EXACT)
def test_real_operators_equal_the_complex_function(name: str) -> None:
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


class NeuralOperator(nn.Module):
    """A layer of a Fourier neural operator, with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.skip = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)
        self.low, self.high = (nn.Parameter(torch.randn(4, 4, 2, 3, dtype=torch.cfloat) / 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lift(x)
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros(1, 4, 8, 5, dtype=torch.cfloat, device=x.device)
        out[:, :, :2, :3] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :2, :3], self.low)
        out[:, :, -2:, :3] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -2:, :3], self.high)
        return F.gelu(torch.fft.irfft2(out, s=(8, 8)) + self.skip(x))


class Denoiser(nn.Module):
    """Masks the spectrum of a recording."""

    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Sequential(nn.Conv1d(9, 8, 1), nn.ReLU(), nn.Conv1d(8, 9, 1), nn.Sigmoid())
        self.register_buffer("window", torch.hann_window(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(x, 16, 4, window=self.window, return_complex=True)
        return torch.istft(spectrum * self.mask(spectrum.abs()), 16, 4, window=self.window, length=x.shape[-1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "rotary embeddings": (Attention, (1, 6, 16), 29.0),
    "global filter": (GlobalFilter, (1, 4, 4, 6), 28.0),
    "mixing": (Mixing, (1, 5, 8), 30.0),
    "neural operator": (NeuralOperator, (1, 1, 8, 8), 28.0),
    "denoiser": (Denoiser, (1, 64), 28.0),
}


@pytest.mark.parametrize(
    ("name", "recover"),
    [*((name, None) for name in NETWORKS), *((name, "auto") for name in ("rotary embeddings", "global filter"))],
)
def test_networks_are_one_delegate_in_both_flows(name: str, recover: str | None) -> None:
    make, shape, floor = NETWORKS[name]
    assert_one_delegate_in_both_flows(seeded(make), samples_of([shape]), floor, recover)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "neural operator"])
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


def test_training_of_complex_weights_is_refused() -> None:
    ((sample,),) = samples_of([(1, 1, 8, 8)], 1)
    exported = torch.export.export(seeded(NeuralOperator).train(), (sample,)).module()
    with pytest.raises(ModelError, match=r"would not be trained: 'high', 'low'.*requires_grad_"):
        prepare_qat_pt2e(exported, NeutronQuantizer(is_qat=True))


REFUSED: dict[str, tuple[Call, str]] = {
    "an operator without a rule": (lambda x: real_of(complex_of(x).tanh()), r"no rule.*aten\.tanh"),
    "an operator that torch decomposes for real numbers": (
        lambda x: real_of(complex_of(x).nan_to_num()),
        r"no rule.*aten\.nan_to_num",
    ),
    "a large power": (lambda x: real_of(complex_of(x) ** 9), r"Only powers.*aten\.pow"),
    "an inverse with complex output": (
        lambda x: torch.istft(
            complex_of(x)[None].mT.repeat(1, 1, 5)[0].repeat(2, 1)[:8],
            8,
            2,
            window=torch.ones(8),
            onesided=False,
            return_complex=True,
        ).abs(),
        r"return_complex=False.*aten\.istft",
    ),
    "a conversion to bool": (
        lambda x: torch.where(complex_of(x).bool(), x[:, :8], 1.0),
        r"to bool.*abs\(\).*aten\.to",
    ),
    "a view of integers": (
        lambda x: complex_of(x).view(torch.int32) + x,
        r"float32 numbers only.*view_as_real.*aten\.view",
    ),
    "a view of doubles": (
        lambda x: complex_of(x).view(torch.float64).float() + x[:, :8],
        r"float32 numbers only.*view_as_real.*aten\.view",
    ),
    "a complex exponent": (lambda x: real_of(complex_of(x) ** (2 + 1j)), r"Only powers.*aten\.pow"),
    "a complex factor": (
        lambda x: real_of(complex_of(x).index_add(0, torch.tensor([1]), complex_of(x)[:1], alpha=1j)),
        r"factor 1j.*Multiply.*aten\.index_add",
    ),
    "a complex signal": (
        lambda x: torch.stft(
            complex_of(x), 4, 2, window=torch.ones(4), center=False, onesided=False, return_complex=True
        ).abs(),
        r"complex signals.*x\.real.*aten\.stft",
    ),
    "an output": (complex_of, r"output is complex.*view_as_real"),
    "a large transform": (lambda x: torch.fft.rfft(x, n=5000).abs(), r"at most 1024.*aten\.fft_rfft"),
    "a computed window": (lambda x: torch.stft(x, 16, window=x[0], return_complex=True).abs(), r"window.*aten\.stft"),
}


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_uses_are_refused(name: str, documented: bool) -> None:
    function, message = REFUSED[name]
    samples = samples_of([ROW], 2)
    model = Function(function).eval()
    exported = torch.export.export(model, samples[0]).module()
    with pytest.raises(ModelError, match=message) as error:
        prepare_pt2e(exported, NeutronQuantizer()) if documented else quantize(model, samples[0], samples)
    assert error.value.source is not None


@pytest.mark.parametrize("documented", [False, True])
def test_undefined_outputs_of_an_istft_are_refused(documented: bool) -> None:
    """torch raises an error for this call in eager mode, but exports it."""
    ((sample,),) = samples_of([(2, 64)], 1)
    model = Function(lambda x: torch.istft(spectrum(x, center=False), 16, 4, window=WINDOW, center=False)).eval()
    exported = torch.export.export(model, (sample,)).module()
    with pytest.raises(ModelError, match=r"add up to zero.*center=True.*aten\.istft") as error:
        prepare_pt2e(exported, NeutronQuantizer()) if documented else quantize(exported, (sample,), [(sample,)])
    assert error.value.source is not None


class Accumulates(nn.Module):
    """Keeps a complex state."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 5, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(torch.fft.rfft(x))
        return self.total.abs()


def test_a_complex_state_is_refused() -> None:
    ((sample,),) = samples_of([(1, 8)], 1)
    exported = torch.export.export(Accumulates().eval(), (sample,)).module()
    with pytest.raises(ModelError, match=r"writes to the complex buffer 'total'.*view_as_real"):
        prepare_pt2e(exported, NeutronQuantizer())


def test_a_complex_input_is_refused() -> None:
    sample = torch.ones(ROW, dtype=torch.complex64)
    exported = torch.export.export(Function(torch.abs).eval(), (sample,)).module()
    with pytest.raises(ModelError, match=r"input is complex.*view_as_real"):
        prepare_pt2e(exported, NeutronQuantizer())
