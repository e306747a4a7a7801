"""Passes that rewrite an exported ATen graph so that it can be quantized, one file per pass.

A pass takes a GraphModule, changes it in place, returns whether it changed anything, and keeps no state. `table.py`
lists all passes in their order.
"""

from openneutron.passes.add_batch_dimension import add_batch_dimension
from openneutron.passes.add_input_guards import add_input_guards
from openneutron.passes.checks import check_is_static_eval, check_outputs, check_writes_nothing
from openneutron.passes.complex_to_real import complex_to_real
from openneutron.passes.copy_returned_concatenations import copy_returned_concatenations
from openneutron.passes.decompose import decompose
from openneutron.passes.densify_constants import densify_constants
from openneutron.passes.divide_after_sums import divide_after_sums
from openneutron.passes.eliminate_common_subexpressions import eliminate_common_subexpressions
from openneutron.passes.eliminate_dead_code import eliminate_dead_code
from openneutron.passes.fold_arithmetic import fold_arithmetic
from openneutron.passes.fold_batch_norm import fold_batch_norm
from openneutron.passes.fold_constants import fold_constants
from openneutron.passes.fold_infinite_comparisons import fold_infinite_comparisons
from openneutron.passes.fold_norm_affine import fold_norm_affine
from openneutron.passes.fold_slices_of_concatenations import fold_slices_of_concatenations
from openneutron.passes.functionalize import functionalize
from openneutron.passes.fuse_patterns import fuse_patterns
from openneutron.passes.hold_states import hold_states
from openneutron.passes.inline_regions import inline_regions
from openneutron.passes.integers_to_floats import integers_to_floats
from openneutron.passes.move_activations import move_activations
from openneutron.passes.nest_concatenations import nest_concatenations
from openneutron.passes.remove_batch_counts import remove_batch_counts
from openneutron.passes.remove_dead_channels import remove_dead_channels
from openneutron.passes.remove_empties import remove_empties
from openneutron.passes.remove_expands import remove_expands
from openneutron.passes.remove_identities import remove_identities
from openneutron.passes.remove_stride_dependence import remove_stride_dependence
from openneutron.passes.scalars_to_constants import scalars_to_constants
from openneutron.passes.scale_before_masks import scale_before_masks
from openneutron.passes.slices_to_space_to_depth import slices_to_space_to_depth
from openneutron.passes.specialize_convolutions import specialize_convolutions
from openneutron.passes.split_padded_products import split_padded_products
from openneutron.passes.table import PASSES, prepare, run_passes

__all__ = [
    "PASSES",
    "add_batch_dimension",
    "add_input_guards",
    "check_is_static_eval",
    "check_outputs",
    "check_writes_nothing",
    "complex_to_real",
    "copy_returned_concatenations",
    "decompose",
    "densify_constants",
    "divide_after_sums",
    "eliminate_common_subexpressions",
    "eliminate_dead_code",
    "fold_arithmetic",
    "fold_batch_norm",
    "fold_constants",
    "fold_infinite_comparisons",
    "fold_norm_affine",
    "fold_slices_of_concatenations",
    "functionalize",
    "fuse_patterns",
    "hold_states",
    "inline_regions",
    "integers_to_floats",
    "move_activations",
    "nest_concatenations",
    "prepare",
    "remove_batch_counts",
    "remove_dead_channels",
    "remove_empties",
    "remove_expands",
    "remove_identities",
    "remove_stride_dependence",
    "run_passes",
    "scalars_to_constants",
    "scale_before_masks",
    "slices_to_space_to_depth",
    "specialize_convolutions",
    "split_padded_products",
]  # fmt: skip
