"""Which operators of a quantized graph run on the NPU, in how many pieces, and why the others do not."""

from openneutron.partition.partitioner import NeutronPartitioner
from openneutron.partition.placing import Placement, placement

__all__ = ["NeutronPartitioner", "Placement", "placement"]
