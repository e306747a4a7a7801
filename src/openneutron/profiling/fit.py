"""Fits the coefficients of the cost model to profiles of a board.

The cost model is linear in its coefficients: the cycles to start an operator, the cycles to move a byte, and a factor
for each kind of computation. Where transfers and computations overlap (Neutron-S), each operator counts with the longer
of the two. The fit is a maximum a posteriori estimate of the logarithms of the coefficients. The residual of a row is
the logarithm of estimated / measured cycles, so that a row that took eight times as long counts as much as one that
took an eighth. Weights after Cauchy limit the influence of outliers. The prior has its mean at the target's
coefficients; the more the residuals scatter and the fewer the rows are, the nearer the result is to them. The width of
the prior is the one with the least error on rows that are left out of the fit (cross-validation), so that noise has
little influence on the coefficients of a board like the target. If the median relative error of the fitted coefficients
on the profiles is above 5 % and larger than that of the target's coefficients, the target's coefficients stay.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from openneutron.core.numbers import in_percent
from openneutron.errors import InputError
from openneutron.page.content import LayerRow, Summary
from openneutron.profiling.join import layer_cycles
from openneutron.targets import COMPUTE_KINDS, Costs

__all__ = ["LEAST_ROWS", "CostFit", "FitWarning", "fit_costs"]

GOOD_ERROR = 0.05
"""A median relative error of fitted coefficients up to this one is accepted, even if the error before was smaller."""
LEAST_ROWS = 8
"""The least number of rows of profiles for a fit."""
_ROWS_OF_A_KIND = 4
"""The least number of rows with which a kind of computation gets its own factor."""
_LEAST_SHARE = 0.2
"""A row counts for a kind if its computation takes this share of the measured cycles."""
_PRIOR = 0.6
"""The standard deviation of the prior of a coefficient's logarithm. Two thirds of it lie within a factor of 1.8."""
_PRIOR_OF_KIND = 0.4
"""The same for the factor of a kind of computation, relative to the common factor."""
_WIDTHS = (1.0, 0.3, 0.1, 0.03)
"""The factors of both standard deviations among which cross-validation chooses."""
_FOLDS = 5
_LEAST_SCALE = 0.02
"""The least scatter of the residuals, so that exact rows do not outweigh all others."""
_LARGEST_SCATTER = 1.0
_LARGEST_LOSS = 1.0
"""The largest loss of a row that is left out, so that outliers do not choose the width."""
_ROUNDS = 60
_LARGEST_STEP = 1.0  # of the logarithm of a coefficient in a round
_CAUCHY = 2.385  # 95 % efficiency for normal residuals
_LARGEST_BANDWIDTH = 4096.0  # bytes per cycle, for a board whose transfers take no measurable time
_LEAST_FACTOR = 0.01
_LEAST_COEFFICIENT = 1e-6

Numbers = npt.NDArray[np.float64]


class FitWarning(UserWarning):
    """Fitted coefficients make the estimates of the profiles worse, so the coefficients of the target are kept."""


@dataclass(frozen=True)
class CostFit:
    """Coefficients that were fitted to profiles."""

    costs: Costs
    """The coefficients."""
    rows: int
    """The rows of the profiles that were used."""
    kinds: tuple[str, ...]
    """The kinds of computation that have their own factor; all others share one factor."""
    error_before: float
    """The median relative error of the estimated cycles of a row with the target's coefficients."""
    error_after: float
    """The same with the fitted coefficients."""
    kept: bool = False
    """Whether `costs` are the target's coefficients, because those of the fit have a larger error."""

    def __str__(self) -> str:
        factors = ", ".join(f"{kind} {factor:.3g}" for kind, factor in self.costs.compute)
        return (
            f"{self.rows} rows; median relative error of the estimates {in_percent(self.error_before, 1)} before, "
            f"{in_percent(self.error_after, 1)} after{'; the coefficients of the target are kept' * self.kept}\n"
            f"  start of an operator: {self.costs.operator_cycles:.4g} cycles\n"
            f"  bytes per cycle: {self.costs.bytes_per_cycle:.4g}\n"
            f"  factors of computation: {factors or 'none'}"
        )


@dataclass(frozen=True)
class _Row:
    layers: tuple[LayerRow, ...]
    cycles: int


def fit_costs(summaries: Sequence[Summary], base: Costs, source: str = "") -> CostFit:
    """Fits the coefficients to summaries with profiles. The fit begins with `base`, the coefficients of the target.

    If `base` has no cycles to start an operator, the fit begins with those of `Costs()`: 0 has no logarithm.
    If the fit increases the median relative error, to more than `GOOD_ERROR`, returns `base` with a `FitWarning`.

    Raises `InputError` for profiles of boards with different NPUs, and for fewer than `LEAST_ROWS` rows whose operators
    are known.
    """
    classes = {summary.target.neutron_class for summary in summaries}
    arrays = {summary.target.macs_per_cycle for summary in summaries}
    if len(classes) > 1 or len(arrays) > 1:
        names = ", ".join(sorted({summary.target.name for summary in summaries}))
        raise InputError(f"The programs are for targets with different NPUs: {names}. Give profiles of one board.")
    rows = [row for summary in summaries for row in _rows(summary)]
    if len(rows) < LEAST_ROWS:
        raise InputError(
            f"The profiles have {len(rows)} rows with cycles and known operators; a fit needs at least {LEAST_ROWS}. "
            "Give profiles of larger programs or of several, lowered with use_profiling."
        )
    moves = classes == {"Neutron-S"}
    own = _kinds_with_rows(rows)
    chosen = _fitted(rows, own, base, moves=moves, width=_best_width(rows, own, base, moves=moves))
    before, after = _error(rows, base, moves), _error(rows, chosen, moves)
    if after > max(before, GOOD_ERROR):
        warnings.warn(
            f"The fit increases the median relative error of the estimates from {100 * before:.3g} % to "
            f"{100 * after:.3g} %, so the coefficients of the target are kept. Give profiles of more operators, and "
            "check that each profile belongs to its program.",
            FitWarning,
            stacklevel=2,
        )
        return CostFit(base, len(rows), (), before, after, kept=True)
    return CostFit(replace(chosen, source=source), len(rows), own, before, after)


def _rows(summary: Summary) -> list[_Row]:
    if summary.profile is None:
        return []
    found = [_Row(tuple(summary.layers[at] for at in row.layers), row.cycles) for row in summary.profile.rows]
    return [row for row in found if row.cycles > 0 and row.layers and all(layer.work for layer in row.layers)]


def _kinds_with_rows(rows: Sequence[_Row]) -> tuple[str, ...]:
    counts = dict.fromkeys(COMPUTE_KINDS, 0)
    for row in rows:
        for kind in {layer.work for layer in row.layers} & set(counts):
            cycles = sum(layer.formula_cycles for layer in row.layers if layer.work == kind)
            counts[kind] += cycles >= _LEAST_SHARE * row.cycles
    return tuple(kind for kind, count in counts.items() if count >= _ROWS_OF_A_KIND)


def _error(rows: Sequence[_Row], costs: Costs, moves: bool) -> float:
    return statistics.median(abs(_estimate(row, costs, moves) - row.cycles) / row.cycles for row in rows)


def _estimate(row: _Row, costs: Costs, moves: bool) -> float:
    return sum(layer_cycles(layer, costs, moves_while_computing=moves) for layer in row.layers)


def _best_width(rows: Sequence[_Row], kinds: tuple[str, ...], base: Costs, *, moves: bool) -> float:
    """Returns the factor of the prior's standard deviations with the least error in cross-validation."""
    return min(_WIDTHS, key=lambda width: _left_out_error(rows, kinds, base, width, moves=moves))


def _left_out_error(rows: Sequence[_Row], kinds: tuple[str, ...], base: Costs, width: float, *, moves: bool) -> float:
    """Returns the mean error of the rows, each with the coefficients of a fit to the rows of the other folds.

    The error is the absolute logarithm of estimated / measured cycles, at most `_LARGEST_LOSS`.
    """
    found = 0.0
    for fold in range(_FOLDS):
        others = [row for at, row in enumerate(rows) if at % _FOLDS != fold]
        costs = _fitted(others, kinds, base, moves=moves, width=width)
        for row in rows[fold::_FOLDS]:
            found += min(_LARGEST_LOSS, abs(math.log(_estimate(row, costs, moves) / row.cycles)))
    return found / len(rows)


def _fitted(rows: Sequence[_Row], kinds: tuple[str, ...], base: Costs, *, moves: bool, width: float) -> Costs:
    """Returns the coefficients, with a factor for each of `kinds` and one for other kinds.

    Gauss-Newton steps on the logarithms of the coefficients: the cycles to start an operator, those to move a byte, the
    common factor of computations, and for each kind its factor relative to the common one.
    """
    factors = [base.compute_factor(kind) for kind in kinds]
    cycles = base.operator_cycles or Costs().operator_cycles
    start = np.log(np.maximum([cycles, 1 / base.bytes_per_cycle, 1.0, *factors], _LEAST_COEFFICIENT))
    precision = np.array([_PRIOR**-2] * 3 + [_PRIOR_OF_KIND**-2] * len(kinds)) / width**2
    measured = np.log([row.cycles for row in rows])
    found = start.copy()
    for _ in range(_ROUNDS):
        matrix = np.stack([_features(row, kinds, _costs(found, kinds, base), moves) for row in rows])
        parts = matrix * _coefficients(found)
        estimated = parts.sum(1)
        residual = np.log(estimated) - measured
        scatter = min(max(float(np.median(np.abs(residual))) / 0.6745, _LEAST_SCALE), _LARGEST_SCATTER)
        weights = 1 / (1 + np.square(residual / (_CAUCHY * scatter)))
        share = parts / estimated[:, None]
        slope = np.column_stack([share[:, :2], share[:, 2:].sum(1), share[:, 3:]])
        prior = precision * scatter**2
        normal = slope.T @ (weights[:, None] * slope) + np.diag(prior)
        step = np.linalg.solve(normal, slope.T @ (weights * residual) + prior * (found - start))
        found = found - np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
        if np.abs(step).max() < 1e-6:
            break
    return _costs(found, kinds, base)


def _coefficients(found: Numbers) -> Numbers:
    """Returns the coefficients of the columns of `_features`."""
    start, byte, common = np.exp(found[:3])
    return np.array([start, byte, common, *(common * np.exp(found[3:]))])


def _features(row: _Row, kinds: tuple[str, ...], costs: Costs, moves: bool) -> Numbers:
    """Returns the number that each coefficient is multiplied by, summed over the operators of a row.

    The columns are the start, the bytes, the computations of other kinds, and those of each of `kinds`.
    """
    found = np.zeros(len(kinds) + 3)
    columns = {kind: 3 + number for number, kind in enumerate(kinds)}
    for layer in row.layers:
        found[0] += 1
        compute = layer.formula_cycles * costs.compute_factor(layer.work)
        is_bound_by_transfer = layer.moved_bytes / costs.bytes_per_cycle > compute
        if not moves or is_bound_by_transfer:
            found[1] += layer.moved_bytes
        if not moves or not is_bound_by_transfer:
            found[columns.get(layer.work, 2)] += layer.formula_cycles
    return found


def _costs(found: Numbers, kinds: tuple[str, ...], base: Costs) -> Costs:
    start, byte, common, *factors = map(float, _coefficients(found))
    known = dict(zip(kinds, factors, strict=True))
    compute = tuple(sorted((kind, max(_LEAST_FACTOR, known.get(kind, common))) for kind in COMPUTE_KINDS))
    bandwidth = min(_LARGEST_BANDWIDTH, 1 / byte) if byte > 0 else _LARGEST_BANDWIDTH
    return replace(base, operator_cycles=start, bytes_per_cycle=bandwidth, compute=compute)
