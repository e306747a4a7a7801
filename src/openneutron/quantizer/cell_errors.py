"""Measures the error of the hidden states of an LSTM for several ranges of its cell states.

A narrow range clips large cell states, a wide one rounds all of them coarsely, and each step adds to both errors. The
error of a single value does not show this. A `CellReplay` therefore computes the cell states of all steps again,
rounded with each of the `LIMITS`, from the gates of the float graph.

The units of a layer often differ in range by a factor of ten or more. `scale_cells` then gives each unit a range of its
own in the same int8 tensor (see `cell_scales`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from openneutron.ops.recurrent import CELL_LIMIT

__all__ = ["CODES", "LIMITS", "MOST_SAMPLES", "CellErrors", "CellReplay"]

LIMITS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.3, CELL_LIMIT)
# The range of a unit is one of BASES, the same for all units, divided by a power of two up to 2^HALVINGS. Powers of two
# from 1 to 2^7, and their inverses, are exact in int8 within 0.4 %.
BASES, HALVINGS = (1.5, 1.75, 2.0, 2.3, CELL_LIMIT), 5
NARROW_LIMITS = tuple(base / 2**halvings for base in BASES for halvings in range(1, HALVINGS + 1))
REPLAYED = (*LIMITS, *NARROW_LIMITS)
# Ranges of units cost two products at each step. They are used if they reduce the error to less than this share, and if
# the error without them is more than this share of the energy of the hidden states (45 dB). The feedback of
# the hidden states, which the replay leaves out, multiplies this error.
WORTHWHILE, NEGLIGIBLE = 0.4, 3e-5
MOST_SAMPLES = 24
CODES = 255  # steps from the lowest to the highest code of an int8 range


@dataclass
class CellErrors:
    """Sums over the steps of a layer: the energy of the hidden states, and of their errors by limit and unit.

    The limits are the elements of `REPLAYED` times `factor`, which is not 1 for a layer without a limit.
    """

    factor: float = 1.0
    unit_errors: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    energy: float = 0.0

    def add(self, errors: Tensor, energy: Tensor) -> None:
        """Adds the energies of the errors [limits, units] and of the hidden states [] of a step, both float64."""
        self.unit_errors = self.unit_errors + errors
        self.energy += float(energy)

    @property
    def limit(self) -> float:
        """The element of `LIMITS` with the least error."""
        return LIMITS[int(self.unit_errors[: len(LIMITS)].sum(1).argmin())]

    def ranges_of_units(self) -> tuple[float, Tensor] | None:
        """Returns one of `BASES`, and the number of halvings of each unit's range; None if they are not worthwhile."""
        one_range = float(self.unit_errors.sum(1).min())
        if one_range <= NEGLIGIBLE * self.energy:
            return None
        found = []
        for base in BASES:
            rows = [REPLAYED.index(base / 2**halvings) for halvings in range(HALVINGS + 1)]
            errors, halvings = self.unit_errors[rows].min(0)
            found.append((float(errors.sum()), base, halvings))
        error, base, halvings = min(found, key=lambda each: each[0])
        return (base, halvings) if error < WORTHWHILE * one_range else None


@dataclass
class CellReplay:
    """Computes the cell states of one layer, rounded with each of `REPLAYED` times `factor`, step by step."""

    factor: float = 1.0
    cells: Tensor | None = None
    """The cell states after the latest step with each limit [limits, ..., units]; None before the first step."""

    def step(
        self, cell: Tensor, forget_gate: Tensor, before: Tensor, written: Tensor, output_gate: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Computes the next step. Takes the float values of the step, [..., units] each.

        Returns the energies of the errors of the hidden states [limits, units], and of the hidden states [], as sums
        over all other dimensions, in float64.
        """
        cells = self._rounded(before[None]) if self.cells is None else self.cells
        self.cells = self._rounded(self._rounded(forget_gate * cells) + written)
        hidden, found = cell.tanh(), self.cells.tanh()
        if output_gate is not None:
            hidden, found = hidden * output_gate, found * output_gate
        errors = (found - hidden).reshape(found.shape[0], -1, found.shape[-1]).square().sum(1, dtype=torch.float64)
        return errors, hidden.square().sum(dtype=torch.float64)

    def _rounded(self, values: Tensor) -> Tensor:
        """Rounds `values` [limits or 1, ...] to int8 codes of a range from minus to plus each limit."""
        limits = (torch.tensor(REPLAYED) * self.factor).to(values.device).reshape(-1, *[1] * (values.dim() - 1))
        step = 2 * limits / CODES
        return (torch.round(values / step) * step).clamp(-limits, limits)
