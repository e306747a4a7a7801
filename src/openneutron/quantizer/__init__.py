"""The int8 quantizer and its observers."""

from openneutron.quantizer.int8_quantizer import CoarseSoftmaxWarning, Int8Quantizer, UnquantizedWarning
from openneutron.quantizer.observers import (
    DistributionObserver,
    RangeObserver,
    RecentRangeObserver,
    VanishingValuesWarning,
)

__all__ = [
    "CoarseSoftmaxWarning", "DistributionObserver", "Int8Quantizer", "RangeObserver", "RecentRangeObserver",
    "UnquantizedWarning", "VanishingValuesWarning",
]  # fmt: skip
