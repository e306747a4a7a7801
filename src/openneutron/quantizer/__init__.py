"""The quantizer of the documented flow, and its observers."""

from openneutron.quantizer.neutron_quantizer import CoarseSoftmaxWarning, NeutronQuantizer, UnquantizedWarning
from openneutron.quantizer.observers import (
    DistributionObserver,
    RangeObserver,
    RecentRangeObserver,
    VanishingValuesWarning,
)

__all__ = [
    "CoarseSoftmaxWarning", "DistributionObserver", "NeutronQuantizer", "RangeObserver", "RecentRangeObserver",
    "UnquantizedWarning", "VanishingValuesWarning",
]  # fmt: skip
