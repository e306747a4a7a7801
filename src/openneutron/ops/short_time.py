"""Short-time Fourier transforms and their inverses as convolutions with windowed cosines and sines."""

from __future__ import annotations

import torch
from torch.fx import Node

from openneutron.core.boundary import error_at
from openneutron.core.fx import shape_of
from openneutron.ops.complex_numbers import ComplexRewriting, Pair, Rule
from openneutron.ops.fourier import Transform, check_size
from openneutron.ops.graph_builder import mul, reshape, slice_, unsqueeze

__all__ = ["SHORT_TIME_RULES"]

aten = torch.ops.aten

_SMALLEST_ENVELOPE = 1e-11
"""torch.istft refuses sums of squared windows below this value."""


def _forward(writing: ComplexRewriting) -> Pair | Node:
    """stft: a convolution with windowed cosines, and one with windowed sines."""
    args = writing.args
    if args["self"].meta["val"].is_complex():
        message = (
            "stft of complex signals is not supported. Compute stft(x.real, ..., onesided=False) + "
            "1j * stft(x.imag, ..., onesided=False) instead."
        )
        raise error_at(writing.rewriting.instance.node, message)
    if args.get("align_to_window") or args.get("center"):
        message = "stft pads the signal in a way that is not supported. Pad it with torch.nn.functional.pad instead."
        raise error_at(writing.rewriting.instance.node, message)
    size, hop = args["n_fft"], args["hop_length"] or args["n_fft"] // 4
    check_size(writing, size)
    outputs = size if args["onesided"] is False else size // 2 + 1
    window = _window(writing, size)
    transform = Transform(-1, size, inverse=False, norm="ortho" if args["normalized"] else "backward")
    signal = args["self"]
    rows = unsqueeze(writing.rewriting, signal, -2)
    rows = reshape(writing.rewriting, rows, (-1, 1, shape_of(signal)[-1])) if len(shape_of(signal)) == 1 else rows

    def convolved(matrix: torch.Tensor) -> Node:
        kernel = writing.rewriting.constant((matrix * window).float().unsqueeze(1))
        found = writing.rewriting.call(aten.conv1d.default, rows, kernel, None, [hop])
        return reshape(writing.rewriting, found, (*shape_of(signal)[:-1], *shape_of(found)[1:]))

    return Pair(*map(convolved, transform.matrices(outputs, size)))


def _inverse(writing: ComplexRewriting) -> Node:
    """istft: a transposed convolution that adds the windowed frames, divided by the sum of the squared windows."""
    args, node = writing.args, writing.rewriting.instance.node
    if args["return_complex"]:
        raise error_at(node, "istft with return_complex=True is not supported. Use return_complex=False.")
    size, hop = args["n_fft"], args["hop_length"] or args["n_fft"] // 4
    check_size(writing, size)
    shape, window = shape_of(args["self"]), _window(writing, size)
    bins, frames = size // 2 + 1, shape[-1]
    kernel = _inverse_kernel(args, size, bins) * window
    parts = [slice_(writing.rewriting, part, -2, range(bins)) if shape[-2] > bins else part
             for part in writing.parts(args["self"])]  # fmt: skip
    rows = reshape(writing.rewriting, writing.rewriting.call(aten.cat.default, parts, -2), (-1, 2 * bins, frames))
    weight = writing.rewriting.constant(kernel.float().unsqueeze(1))
    found = writing.rewriting.call(aten.conv_transpose1d.default, rows, weight, None, [hop])
    begin = size // 2 if args["center"] else 0
    total = size + hop * (frames - 1)
    wanted = total - 2 * begin if args["length"] is None else args["length"]
    kept = range(begin, min(begin + wanted, total))
    envelope = _envelope(window, hop, frames)[kept.start : kept.stop]
    if bool((envelope < _SMALLEST_ENVELOPE).any()):
        message = (
            "The squared windows of this istft add up to zero at some outputs, so these are undefined. Use "
            "center=True, or a window and a hop_length whose squared windows overlap to positive sums."
        )
        raise error_at(node, message)
    scale = writing.rewriting.constant((1 / envelope).float())
    found = mul(writing.rewriting, slice_(writing.rewriting, found, -1, kept), scale)
    if len(kept) < wanted:
        found = writing.rewriting.call(aten.constant_pad_nd.default, found, [0, wanted - len(kept)], 0.0)
    return reshape(writing.rewriting, found, (*shape[:-2], wanted))


def _inverse_kernel(args: dict[str, object], size: int, bins: int) -> torch.Tensor:
    """Returns the values that the real and imaginary part of each bin add to a frame: float64 [2 * bins, size]."""
    transform = Transform(-1, size, inverse=True, norm="ortho" if args["normalized"] else "backward")
    return torch.cat([matrix.T for matrix in transform.real_matrices(bins)])


def _envelope(window: torch.Tensor, hop: int, frames: int) -> torch.Tensor:
    """Returns the sum of the squared windows of all frames, float64 of shape [size + hop * (frames - 1)]."""
    rows = torch.ones(1, 1, frames, dtype=torch.float64)
    return torch.nn.functional.conv_transpose1d(rows, window.square()[None, None], stride=hop).flatten()


def _window(writing: ComplexRewriting, size: int) -> torch.Tensor:
    """Returns the window, padded with zeros on both sides to `size` values, float64.

    Raises `ModelError` for a window that is not a constant.
    """
    window, length = writing.args["window"], writing.args["win_length"] or size
    values = torch.ones(length) if window is None else writing.rewriting.value_of("window")
    if values is None:
        message = "The window of this transform is computed from inputs; make it a buffer."
        raise error_at(writing.rewriting.instance.node, message)
    before = (size - length) // 2
    return torch.nn.functional.pad(values.double(), (before, size - length - before))


SHORT_TIME_RULES: dict[str, Rule] = {
    "aten.stft.default": _forward,
    "aten.stft.center": _forward,
    "aten.istft.default": _inverse,
}
"""Rules by the name of the operator."""
