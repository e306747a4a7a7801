"""Reads profiles of a board, joins them with a program, and fits the cost model to them."""

from openneutron.profiling.fit import CostFit, FitWarning, fit_costs
from openneutron.profiling.join import joined, with_profile
from openneutron.profiling.reading import read_profile
from openneutron.profiling.recorded import BoardProfile, CpuCall, DelegateTimes

__all__ = [
    "BoardProfile", "CostFit", "CpuCall", "DelegateTimes", "FitWarning", "fit_costs", "joined", "read_profile",
    "with_profile",
]  # fmt: skip
