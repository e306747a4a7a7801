"""The quantizer of the documented flow, and its observers."""

from openneutron.quantizer.neutron_quantizer import NeutronQuantizer, UnquantizedWarning
from openneutron.quantizer.observers import DistributionObserver, RangeObserver, RecentRangeObserver

__all__ = ["DistributionObserver", "NeutronQuantizer", "RangeObserver", "RecentRangeObserver", "UnquantizedWarning"]
