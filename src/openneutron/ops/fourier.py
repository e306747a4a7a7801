"""Discrete Fourier transforms as products with constant matrices.

A transform of n values X_k = sum_j x_j exp(-2 pi i j k / n) is a product with a matrix of cosines and one of sines. A
complex input becomes one product of the concatenated real and imaginary parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.boundary import error_at
from openneutron.core.fx import op_name, shape_of
from openneutron.ops.complex_numbers import ComplexRewriting, Pair, Rule
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.indexing import multiply_along

__all__ = ["COMPLEX_INSIDE", "DECOMPOSED", "FOURIER_RULES", "MAX_TRANSFORMED", "Transform", "check_size"]

aten = torch.ops.aten

MAX_TRANSFORMED = 1024
"""The largest number of values of a transform. Its matrices have the square of it as elements."""


@dataclass(frozen=True)
class Transform:
    """A Fourier transform of `size` values along dimension `dim`."""

    dim: int
    size: int
    inverse: bool
    norm: str
    """"backward", "forward" or "ortho", as in torch.fft."""

    @property
    def factor(self) -> float:
        """The factor of the sum."""
        if self.norm == "ortho":
            return 1 / math.sqrt(self.size)
        return 1 / self.size if self.inverse == (self.norm == "backward") else 1.0

    def matrices(self, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the real and imaginary parts of the transform, float64 of shape [outputs, inputs]."""
        steps = torch.outer(torch.arange(outputs), torch.arange(inputs)) % self.size
        angles = steps.double() * (2 * math.pi / self.size * (1 if self.inverse else -1))
        return angles.cos() * self.factor, angles.sin() * self.factor

    def real_matrices(self, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the matrices from the real and imaginary parts of half a spectrum to `size` real values."""
        real, imag = self.matrices(self.size, inputs)
        counted = torch.full((inputs,), 2.0, dtype=torch.float64)
        counted[0] = 1.0
        if self.size % 2 == 0 and inputs > self.size // 2:
            counted[self.size // 2] = 1.0
        return real * counted, -imag * counted


def _fourier(writing: ComplexRewriting) -> Pair | Node:
    """fft, ifft, rfft, irfft, and the same over several dimensions."""
    name = op_name(writing.rewriting.instance.node).split(".")[1].removeprefix("fft_")
    return _transform(writing, name, writing.whole(writing.args["self"]), writing.args["norm"] or "backward")


def _hermitian(writing: ComplexRewriting) -> Pair | Node:
    """hfft and ihfft, and the same over several dimensions.

    hfft(x) = irfft(conj(x)) and ihfft(x) = conj(rfft(x)), with the norms "forward" and "backward" exchanged.
    """
    name = op_name(writing.rewriting.instance.node).split(".")[1].removeprefix("fft_")
    value, norm = writing.whole(writing.args["self"]), writing.args["norm"] or "backward"
    norm = _EXCHANGED.get(norm, norm)
    if name.startswith("ihfft"):
        found = _transform(writing, f"r{name.removeprefix('ih')}", value, norm)
        assert isinstance(found, Pair)
        return _conjugate(writing, found)
    return _transform(writing, f"ir{name.removeprefix('h')}", _conjugate(writing, value), norm)


_EXCHANGED = {"forward": "backward", "backward": "forward"}


def _conjugate(writing: ComplexRewriting, value: Pair) -> Pair:
    return value if value.imag is None else Pair(value.real, writing.sub(None, value.imag))


def _transform(writing: ComplexRewriting, name: str, value: Pair, norm: str) -> Pair | Node:
    """Transforms values as the operator `name`, one of fft, ifft, rfft and irfft, over one or several dimensions."""
    transforms = _transforms(writing, name, shape_of(writing.node(value.real)), norm)
    if name.startswith("irfft"):
        *others, last = transforms
        for transform in others:
            value = _transformed(writing, value, transform, transform.size)
        return _to_real(writing, value, last)
    for index, transform in enumerate(reversed(transforms)):
        halves = name.startswith("rfft") and index == 0
        value = _transformed(writing, value, transform, transform.size // 2 + 1 if halves else transform.size)
    return value


def _transforms(writing: ComplexRewriting, name: str, shape: Sequence[int], norm: str) -> list[Transform]:
    """Returns the transform of each dimension. Raises `ModelError` for a transform that is too large."""
    sizes, dims = _extents(writing.args, shape)
    inverse = name.startswith("i")
    found: list[Transform] = []
    for index, (dim, size) in enumerate(zip(dims, sizes, strict=True), start=1):
        is_half = name.startswith("irfft") and index == len(dims)
        usual = 2 * (shape[dim] - 1) if is_half else shape[dim]
        found.append(Transform(dim, usual if size is None else size, inverse, norm))
        check_size(writing, found[-1].size)
    return found


def _extents(args: dict[str, Any], shape: Sequence[int]) -> tuple[list[int | None], list[int]]:
    """Returns the size (None for the default) and the dimension of each transform, in the order of the arguments."""
    if "n" in args:
        return [args["n"]], [args["dim"] % len(shape)]
    sizes, dims = args["s"], args["dim"]
    if dims is None:
        count = len(shape) if sizes is None else len(sizes)
        dims = range(len(shape) - count, len(shape))
    return [None if size == -1 else size for size in sizes or [-1] * len(dims)], [dim % len(shape) for dim in dims]


def _transformed(writing: ComplexRewriting, value: Pair, transform: Transform, outputs: int) -> Pair:
    """Transforms values along a dimension. Fewer values than `size` are padded with zeros, more are cut."""
    real, dim = writing.node(value.real), transform.dim
    cosines, sines = transform.matrices(outputs, min(transform.size, shape_of(real)[dim]))
    if value.imag is None:
        return Pair(*(_product(writing, [real], dim, [matrix]) for matrix in (cosines, sines)))
    parts = [real, writing.node(value.imag)]
    return Pair(*(_product(writing, parts, dim, both) for both in ([cosines, -sines], [sines, cosines])))


def _to_real(writing: ComplexRewriting, value: Pair, transform: Transform) -> Node:
    """Transforms half a spectrum to real values."""
    real = writing.node(value.real)
    matrices = transform.real_matrices(min(transform.size // 2 + 1, shape_of(real)[transform.dim]))
    parts = [real] if value.imag is None else [real, writing.node(value.imag)]
    return _product(writing, parts, transform.dim, matrices[: len(parts)])


def _product(writing: ComplexRewriting, parts: Sequence[Node], dim: int, matrices: Sequence[torch.Tensor]) -> Node:
    """Returns the sum of products of each part with its matrix along a dimension, as one product."""
    call, size = writing.rewriting.call, matrices[0].shape[1]
    cut = [part if shape_of(part)[dim] == size else call(aten.slice.Tensor, part, dim, 0, size) for part in parts]
    values = cut[0] if len(cut) == 1 else call(aten.cat.default, cut, dim)
    return multiply_along(
        writing.rewriting, values, dim, writing.rewriting.constant(torch.cat(list(matrices), 1).float())
    )


def check_size(writing: ComplexRewriting, size: int) -> None:
    """Raises `ModelError` for a transform that is too large."""
    if size > MAX_TRANSFORMED:
        message = f"OpenNeutron transforms at most {MAX_TRANSFORMED} values along a dimension, not {size}."
        raise error_at(writing.rewriting.instance.node, message)


def _shift(rewriting: Rewriting) -> Node:
    """Rolls each dimension by half its size, which fftshift rounds down and ifftshift rounds up."""
    value, dims = rewriting.args["self"], rewriting.args["dim"]
    rounding = int(op_name(rewriting.instance.node) == "aten.fft_ifftshift.default")
    dims = list(range(len(rewriting.shape))) if dims is None else dims
    return rewriting.call(aten.roll.default, value, [(rewriting.shape[dim] + rounding) // 2 for dim in dims], dims)


DECOMPOSED = (
    Decomposition(
        name="fftshift, ifftshift",
        targets=("aten.fft_fftshift.default", "aten.fft_ifftshift.default"),
        rewrite=_shift,
        becomes="roll",
    ),
)

_NAMES = "fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn"
_HERMITIAN_NAMES = "hfft ihfft hfft2 ihfft2 hfftn ihfftn"

FOURIER_RULES: dict[str, Rule] = {
    **{f"aten.fft_{name}.default": _fourier for name in _NAMES.split()},
    **{f"aten.fft_{name}.default": _hermitian for name in _HERMITIAN_NAMES.split()},
}
"""Rules by the name of the operator."""

COMPLEX_INSIDE = frozenset(
    f"aten.fft_{name}.default" for name in ("irfft", "irfft2", "irfftn", "hfft", "hfft2", "hfftn")
)
"""Transforms that return real numbers, and compute with complex numbers even if they read real numbers."""
