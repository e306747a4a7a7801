"""Views: a view represents any chain of transposes and reshapes of a tensor. It is emitted as at most three operators.

A view splits the stored dimensions into factors ("atoms"), so that each step of the chain only permutes whole atoms. It
consists of the atoms in stored order, the order in which they are read, and the final shape. A chain followed by its
inverse gives the identity view. No operators are emitted until a reader needs the values in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from openneutron.ir.graph import Array, Kind, Tensor
from openneutron.ir.kinds import RESHAPE, TRANSPOSE

__all__ = ["Emit", "View", "swapped_blocks"]


# Emits one view operator, given its kind, its operand, its input and the shape of its output.
Emit = Callable[[Kind, tuple[int, ...], Tensor, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class View:
    """The values of `stored`, read in another order and shape.

    `atoms` are sizes (> 1) in stored order, whose product is the number of elements. `order` has the numbers of the
    atoms in the order of reading. Each dimension of `shape` is the product of consecutive atoms of `order`.
    """

    stored: Tensor
    atoms: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def identity(cls, tensor: Tensor) -> View:
        """Returns the view of a tensor in its own order and shape."""
        atoms = tuple(size for size in tensor.shape if size > 1)
        return cls(tensor, atoms, tuple(range(len(atoms))), tensor.shape)

    @property
    def in_stored_order(self) -> bool:
        """Whether the view reads the elements in stored order, so that only the shape may differ."""
        return self.order == tuple(range(len(self.order)))

    @property
    def is_identity(self) -> bool:
        """Whether the view equals the stored tensor."""
        return self.in_stored_order and self.shape == self.stored.shape

    @property
    def atoms_by_dim(self) -> tuple[tuple[int, ...], ...]:
        """The atoms of each dimension of `shape`."""
        return _group_atoms(self.shape, self.order, self.atoms)

    def permuted(self, perm: Sequence[int]) -> View:
        """Returns the transposed view: its dimension i is dimension perm[i] of this view."""
        groups = self.atoms_by_dim
        order = tuple(atom for dim in perm for atom in groups[dim])
        return replace(self, order=order, shape=tuple(self.shape[dim] for dim in perm))

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """Returns the view with the same values in another shape; None if a dimension would split an atom unevenly."""
        view = self._merge_atoms()
        refined = view._split_along(view.order, shape)
        return refined and replace(refined, shape=tuple(shape))

    def _split_along(self, order: Sequence[int], shape: Sequence[int]) -> View | None:
        """Splits atoms so that, in `order`, consecutive atoms form each dimension of `shape`; None if impossible."""
        factors: list[tuple[int, ...]] = [()] * len(self.atoms)  # of each atom, outermost first
        position, remaining = -1, 1
        for size in shape:
            needed = size
            while needed > 1:
                if remaining == 1:
                    position += 1
                    remaining = self.atoms[order[position]]
                if needed % remaining and remaining % needed:
                    return None
                part = min(needed, remaining)
                factors[order[position]] += (part,)
                needed, remaining = needed // part, remaining // part
        first = np.cumsum([0, *map(len, factors)]).tolist()
        new_order = tuple(first[atom] + part for atom in self.order for part in range(len(factors[atom])))
        return replace(self, atoms=tuple(part for parts in factors for part in parts), order=new_order)

    def _merge_atoms(self) -> View:
        """Merges atoms that are consecutive both in stored order and in `order`."""
        runs: list[list[int]] = []
        for atom in self.order:
            if runs and runs[-1][-1] + 1 == atom:
                runs[-1].append(atom)
            else:
                runs.append([atom])
        stored = sorted(runs)
        atoms = tuple(math.prod(self.atoms[atom] for atom in run) for run in stored)
        return replace(self, atoms=atoms, order=tuple(stored.index(run) for run in runs))

    def dimension_permutation(self) -> tuple[int, ...] | None:
        """Returns perm with shape[i] = stored.shape[perm[i]] if the view is a transpose of whole dimensions."""
        view = self._split_along(range(len(self.atoms)), self.stored.shape)
        if view is None:
            return None
        stored, groups = view._stored_atoms_by_dim(), view.atoms_by_dim
        if len(stored) != len(groups) or sorted(stored) != sorted(groups):
            return None
        units = iter(dim for dim, group in enumerate(stored) if not group)
        where = {group: dim for dim, group in enumerate(stored) if group}
        return tuple(where[group] if group else next(units) for group in groups)

    def dimension_order(self) -> tuple[int, ...] | None:
        """Returns the dimensions in stored order if the view is a transpose of whole dimensions."""
        perm = self.dimension_permutation()
        return None if perm is None else tuple(np.argsort(perm).tolist())

    def block_order(self) -> tuple[int, ...] | None:
        """Returns the dimensions in stored order; None if a dimension has atoms that are not consecutive in memory."""
        blocks = all(group == tuple(range(group[0], group[0] + len(group))) for group in self.atoms_by_dim if group)
        return self.atom_order() if blocks else None

    def atom_order(self) -> tuple[int, ...]:
        """Returns the dimensions in the stored order of their first atoms.

        A dimension of size 1 follows the dimension before it, because a reshape most likely merges both.
        """
        starts: list[int] = []
        for group in self.atoms_by_dim:
            starts.append(min(group) if group else starts[-1] if starts else -1)
        return tuple(np.argsort(starts, kind="stable").tolist())

    def _stored_atoms_by_dim(self) -> tuple[tuple[int, ...], ...]:
        """The atoms of each stored dimension."""
        return _group_atoms(self.stored.shape, range(len(self.atoms)), self.atoms)

    def unapplied(self, layout: View) -> View | None:
        """Returns the view that becomes this view if `layout` is applied to it; None if there is no such view."""
        refined = self.reshaped([layout.atoms[atom] for atom in layout.order])
        if refined is None:
            return None
        return refined.permuted(np.argsort(layout.order, kind="stable").tolist()).reshaped(layout.stored.shape)

    def evaluate(self, data: Array) -> Array:
        """Returns the view of `data`, which has the stored shape."""
        return np.asarray(data.reshape(self.atoms).transpose(self.order).reshape(self.shape), order="C")

    def emit(self, emit: Emit) -> Tensor:
        """Emits as few TRANSPOSE and RESHAPE operators as the view needs, and returns their output."""
        if self.in_stored_order:
            return _emit_reshape(emit, self.stored, self.shape)
        perm = self.dimension_permutation()
        if perm is not None:
            return emit(TRANSPOSE, perm, self.stored, self.shape)
        if (perm := self._stored_dimensions_in_order()) is not None:
            moved = emit(TRANSPOSE, perm, self.stored, tuple(self.stored.shape[dim] for dim in perm))
            return _emit_reshape(emit, moved, self.shape)
        split, perm = self._transpose_plan()
        moved = emit(TRANSPOSE, perm, _emit_reshape(emit, self.stored, split), tuple(split[dim] for dim in perm))
        return _emit_reshape(emit, moved, self.shape)

    def _stored_dimensions_in_order(self) -> tuple[int, ...] | None:
        """Returns the permutation of the stored dimensions that reads the atoms in `order`; None if there is none."""
        view = self._split_along(range(len(self.atoms)), self.stored.shape)
        if view is None:
            return None
        stored = view._stored_atoms_by_dim()
        owner = {atom: dim for dim, group in enumerate(stored) for atom in group}
        perm = tuple(dict.fromkeys(owner[atom] for atom in view.order))
        if tuple(atom for dim in perm for atom in stored[dim]) != view.order:
            return None
        return perm + tuple(dim for dim, group in enumerate(stored) if not group)

    def _transpose_plan(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the input shape and the permutation of the TRANSPOSE of this view.

        The TRANSPOSE returns `shape` if the atoms of each dimension are consecutive in memory. Otherwise, it permutes
        merged atoms, and a RESHAPE of its output returns `shape`.
        """
        if all(group == tuple(range(group[0], group[0] + len(group))) for group in self.atoms_by_dim if group):
            blocks, atoms = self.atoms_by_dim, self.atoms
        else:
            merged = self._merge_atoms()
            blocks, atoms = tuple((atom,) for atom in merged.order), merged.atoms
        by_position = sorted(range(len(blocks)), key=lambda block: blocks[block][:1])
        split = tuple(math.prod(atoms[atom] for atom in blocks[block]) for block in by_position)
        return split, tuple(np.argsort(by_position, kind="stable").tolist())


def swapped_blocks(shape: Sequence[int], perm: Sequence[int]) -> tuple[int, int] | None:
    """Returns (a, b) if a transpose swaps two blocks of consecutive dimensions of a and b elements, else None.

    NHWC to NCHW is such a swap for one image. Dimensions of size 1 do not count. If nothing is swapped, b is 1.
    """
    moved = [dim for dim in perm if shape[dim] > 1]
    start = moved.index(min(moved)) if moved else 0
    if moved[start:] + moved[:start] != sorted(moved):
        return None
    back = math.prod(shape[dim] for dim in moved[:start])
    return math.prod(shape) // back, back


def _emit_reshape(emit: Emit, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor if tensor.shape == shape else emit(RESHAPE, shape, tensor, shape)


def _group_atoms(shape: Sequence[int], order: Sequence[int], atoms: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Returns, for each dimension of `shape`, the consecutive atoms of `order` whose product is its size."""
    runs: list[tuple[int, ...]] = []
    position = 0
    for size in shape:
        start, product = position, 1
        while product < size:
            product *= atoms[order[position]]
            position += 1
        runs.append(tuple(order[start:position]))
    return tuple(runs)
