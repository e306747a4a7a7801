"""Rewrites of the exported ATen graph that make it quantizable, a file per pass.

A pass takes a GraphModule, changes it in place and says whether it changed anything; it keeps no state. `table.py`
has the table of all passes.
"""

from openneutron.passes.batch_layers import batch_layers
from openneutron.passes.checks import check_is_static_eval, check_outputs, check_writes_nothing
from openneutron.passes.copy_returned_joins import copy_returned_joins
from openneutron.passes.decompose import decompose
from openneutron.passes.divide_after_sums import divide_after_sums
from openneutron.passes.fold_arithmetic import fold_arithmetic
from openneutron.passes.fold_batch_norm import fold_batch_norm
from openneutron.passes.fold_constants import fold_constants
from openneutron.passes.fold_norm_affine import fold_norm_affine
from openneutron.passes.forget_strides import forget_strides
from openneutron.passes.functionalize import functionalize
from openneutron.passes.hold_states import hold_states
from openneutron.passes.inline_regions import inline_regions
from openneutron.passes.integers_to_floats import integers_to_floats
from openneutron.passes.merge_phases import merge_phases
from openneutron.passes.move_activations import move_activations
from openneutron.passes.name_bad_inputs import name_bad_inputs
from openneutron.passes.name_convolutions import name_convolutions
from openneutron.passes.name_numbers import name_numbers
from openneutron.passes.nest_concatenations import nest_concatenations
from openneutron.passes.read_parts import read_parts
from openneutron.passes.recognize import recognize
from openneutron.passes.remove_batch_counts import remove_batch_counts
from openneutron.passes.remove_dead_channels import remove_dead_channels
from openneutron.passes.remove_dead_operators import remove_dead_operators
from openneutron.passes.remove_empties import remove_empties
from openneutron.passes.remove_expands import remove_expands
from openneutron.passes.remove_identities import remove_identities
from openneutron.passes.scale_before_masks import scale_before_masks
from openneutron.passes.share_results import share_results
from openneutron.passes.split_padded_products import split_padded_products
from openneutron.passes.table import PASSES, prepare, run_passes

__all__ = [
    "PASSES", "batch_layers", "check_is_static_eval", "check_outputs", "check_writes_nothing", "copy_returned_joins",
    "decompose", "divide_after_sums", "fold_arithmetic", "fold_batch_norm", "fold_constants", "fold_norm_affine",
    "forget_strides", "functionalize", "hold_states", "inline_regions", "integers_to_floats", "merge_phases",
    "move_activations", "name_bad_inputs", "name_convolutions", "name_numbers", "nest_concatenations", "prepare",
    "read_parts",
    "recognize", "remove_batch_counts", "remove_dead_channels", "remove_dead_operators", "remove_empties",
    "remove_expands", "remove_identities", "run_passes", "scale_before_masks", "share_results",
    "split_padded_products",
]  # fmt: skip
