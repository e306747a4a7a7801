"""Targets: chips with a Neutron NPU (`TARGETS`), NXP's boards with these chips, and board files of users."""

from __future__ import annotations

from openneutron.targets.board import ROLES, Board, Clocks, Placement, Region
from openneutron.targets.chips import ASSUMED_MACS_PER_PIPELINE, TARGETS, HardwareVersion, NeutronTarget
from openneutron.targets.costs import COMPUTE_KINDS, Costs
from openneutron.targets.files import boards, check_board_name, is_board_file, read_board, text_of_board
from openneutron.targets.flavors import Generation, generation_of_flavor, takes_weights_per_channel
from openneutron.targets.spec import NeutronTargetSpec, Target

__all__ = [
    "ASSUMED_MACS_PER_PIPELINE", "COMPUTE_KINDS", "ROLES", "TARGETS", "Board", "Clocks", "Costs", "Generation",
    "HardwareVersion", "NeutronTarget", "NeutronTargetSpec", "Placement", "Region", "Target", "boards",
    "check_board_name", "generation_of_flavor", "is_board_file", "read_board", "takes_weights_per_channel",
    "text_of_board",
]  # fmt: skip
