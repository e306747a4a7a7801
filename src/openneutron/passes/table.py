"""The table of passes that prepare a model for quantization, with their order, purposes and conditions, and their
driver.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from openneutron.core.driver import Driver, PassRun
from openneutron.passes.add_batch_dimension import add_batch_dimension
from openneutron.passes.add_dimension_to_scalars import add_dimension_to_scalars
from openneutron.passes.add_input_guards import add_input_guards
from openneutron.passes.checks import (
    check_is_static_eval,
    check_outputs,
    check_parameters_are_kept,
    check_writes_nothing,
)
from openneutron.passes.clip_embeddings import clip_embeddings
from openneutron.passes.complex_to_real import complex_to_real
from openneutron.passes.copy_returned_concatenations import copy_returned_concatenations
from openneutron.passes.copy_values_of_states import copy_values_of_states
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
from openneutron.passes.hold_states import end_gradients, hold_states
from openneutron.passes.inline_regions import inline_regions
from openneutron.passes.integers_to_floats import integers_to_floats
from openneutron.passes.move_activations import move_activations
from openneutron.passes.nest_concatenations import nest_concatenations
from openneutron.passes.recognize_cells import recognize_cells
from openneutron.passes.remove_batch_counts import remove_batch_counts
from openneutron.passes.remove_dead_channels import remove_dead_channels
from openneutron.passes.remove_empties import remove_empties
from openneutron.passes.remove_expands import remove_expands
from openneutron.passes.remove_identities import remove_identities
from openneutron.passes.remove_stride_dependence import remove_stride_dependence
from openneutron.passes.resolve_constant_shapes import resolve_constant_shapes
from openneutron.passes.scalars_to_constants import scalars_to_constants
from openneutron.passes.scale_before_masks import scale_before_masks
from openneutron.passes.share_equal_weights import share_equal_weights
from openneutron.passes.slices_to_space_to_depth import slices_to_space_to_depth
from openneutron.passes.specialize_convolutions import specialize_convolutions
from openneutron.passes.split_padded_products import split_padded_products
from openneutron.passes.write_canonical_operators import write_canonical_operators
from openneutron.targets import NeutronTarget

__all__ = ["PASSES", "Pass", "Setting", "When", "prepare", "run_passes"]


class When(enum.Enum):
    """The kinds of models for which a pass runs."""

    ALWAYS = "for every model"
    CALIBRATION = "for models that are calibrated"
    TRAINING = "for models that are trained quantized"


@dataclass(frozen=True)
class Setting:
    """Arguments of passes other than the graph. A pass gets the fields that its parameters name."""

    target: NeutronTarget
    training: bool = False
    keeps_float: Callable[[Node], bool] = lambda _: False
    """Returns whether an operator stays in float. No pass merges such operators with others."""
    is_wide: Callable[[Node], bool] = lambda _: False
    """Returns whether the state of a recurrent operator consists of two int8 tensors."""


@dataclass(frozen=True)
class Pass:
    """One row of the table.

    `run` takes the module, and those fields of `Setting` that its parameters name. It changes the module in place,
    returns whether it changed anything, and keeps no state.
    """

    run: Callable[..., bool]
    purpose: str
    when: When = When.ALWAYS
    after_change_by: Callable[..., bool] | None = None
    """The pass runs only if this earlier one changed the graph."""
    keeps_parameters: bool = False
    """If True, a call for training raises `ModelError` if the pass replaces a trainable parameter by a constant."""

    @property
    def name(self) -> str:
        """Returns the name of the function."""
        return self.run.__name__

    def runs_for(self, setting: Setting) -> bool:
        """Returns whether the pass runs for training if `setting.training`, else whether it runs for calibration."""
        return self.when in (When.ALWAYS, When.TRAINING if setting.training else When.CALIBRATION)

    def __call__(self, module: GraphModule, setting: Setting) -> bool:
        """Runs the pass, and returns whether it changed the graph."""
        parameters = inspect.signature(self.run).parameters
        arguments: dict[str, Any] = {name: getattr(setting, name) for name in parameters if hasattr(setting, name)}
        is_watched = self.keeps_parameters and setting.training
        with check_parameters_are_kept(module) if is_watched else nullcontext():
            return self.run(module, **arguments)


def remove_unused(module: GraphModule) -> bool:
    """Rule, linear in nodes: operators without readers are removed, and the module's code is regenerated."""
    changed = module.graph.eliminate_dead_code()
    module.recompile()
    return changed


PASSES: tuple[Pass, ...] = (
    Pass(inline_regions, "inline the subgraphs that torch.export writes for no_grad, autocast and checkpoints"),
    Pass(densify_constants, "write sparse constants as dense ones", keeps_parameters=True),
    Pass(resolve_constant_shapes, "compute shapes that depend on constants alone, such as those of x[:, mask]"),
    Pass(check_is_static_eval, "refuse train mode, dynamic shapes and dtypes other than float32"),
    Pass(check_outputs, "refuse outputs that a program cannot return"),
    Pass(specialize_convolutions, "write aten.convolution as conv1d, conv2d and so on"),
    Pass(add_input_guards, "let the module name an input of another shape or dtype"),
    Pass(remove_batch_counts, "remove the counters of batch norms"),
    Pass(clip_embeddings, "clip the rows of embeddings with max_norm", When.CALIBRATION),
    Pass(hold_states, "read each buffer that the model writes once at the start, and write it once at the end"),
    Pass(functionalize, "write in-place operators as operators that return a new value"),
    Pass(end_gradients, "stop gradients at the states of the previous call", When.TRAINING),
    Pass(check_writes_nothing, "refuse writes in place that are left"),
    Pass(write_canonical_operators, "write operators that have several names under one"),
    Pass(eliminate_dead_code, "remove operators that nothing reads, and checks of shapes"),
    Pass(add_dimension_to_scalars, "give values without dimensions one if an operator reads along dimension 0"),
    Pass(remove_stride_dependence, "write operators that depend on strides as operators that do not"),
    Pass(remove_empties, "remove tensors without elements"),
    Pass(fold_constants, "compute values that do not depend on inputs"),
    Pass(fold_infinite_comparisons, "fold comparisons of finite values with infinity"),
    Pass(complex_to_real, "compute complex numbers as pairs of real numbers", keeps_parameters=True),
    Pass(integers_to_floats, "replace integers between booleans and float32 by float32 or boolean values"),
    Pass(add_batch_dimension, "give layers of a single sample a batch dimension of 1"),
    Pass(remove_identities, "remove operators that return their input"),
    Pass(eliminate_common_subexpressions, "compute equal calls once", When.CALIBRATION),
    Pass(slices_to_space_to_depth, "write a concatenation of strided slices as space-to-depth"),
    Pass(split_padded_products, "split a matrix product with one padded row into a product and a sum"),
    Pass(scale_before_masks, "scale scores before they are masked", keeps_parameters=True),
    Pass(
        fuse_patterns,
        "write spelled-out activations and norms as single operators",
        keeps_parameters=True,
    ),
    Pass(fold_norm_affine, "fold weight and bias of a layer norm into the linears that read it", When.CALIBRATION),
    Pass(decompose, "write operators that the NPU lacks with operators that it has", keeps_parameters=True),
    Pass(add_batch_dimension, "give layers that decompose wrote a batch dimension of 1", after_change_by=decompose),
    Pass(fold_constants, "compute the constants that decompose wrote", after_change_by=decompose),
    Pass(remove_identities, "remove identities that decompose wrote", after_change_by=decompose),
    Pass(eliminate_common_subexpressions, "compute equal calls that decompose wrote once", When.CALIBRATION),
    Pass(divide_after_sums, "divide by the sum of a wide softmax after its weighted sum", When.CALIBRATION),
    Pass(fold_slices_of_concatenations, "read the part of a concatenation that a slice takes"),
    Pass(remove_expands, "remove expands that an arithmetic operator broadcasts anyway"),
    Pass(fold_batch_norm, "fold batch norms into convolutions and linears"),
    Pass(scalars_to_constants, "write numbers in arithmetic as float32 constants", keeps_parameters=True),
    Pass(move_activations, "move activations directly after the layers that can fuse them"),
    Pass(nest_concatenations, "read an earlier concatenation instead of all its inputs again"),
    Pass(copy_returned_concatenations, "copy concatenations that are returned and computed with"),
    Pass(fold_arithmetic, "fold constant sums and products into weights and biases", When.CALIBRATION),
    Pass(remove_dead_channels, "remove channels whose activation is zero for every input", When.CALIBRATION),
    Pass(share_equal_weights, "let layers of a loop share weights that passes copied", When.CALIBRATION),
    Pass(recognize_cells, "note the cell states of LSTMs that the model computes itself", When.CALIBRATION),
    Pass(remove_unused, "remove operators that have no readers after the passes"),
    Pass(copy_values_of_states, "copy a value that is written to several states"),
)
"""The passes that run before every quantization, in their order."""


def prepare(
    module: GraphModule,
    target: NeutronTarget,
    *,
    training: bool = False,
    keeps_float: Callable[[Node], bool] = lambda _: False,
    is_wide: Callable[[Node], bool] = lambda _: False,
) -> GraphModule:
    """Runs `PASSES` on an exported module, in place. Linear in the nodes of the graph.

    `keeps_float` returns whether an operator is to stay in float. No pass merges such operators with others. `is_wide`
    returns whether the state of a recurrent operator is to consist of two int8 tensors.

    The result has no batch norm in eval mode, because torchao's `convert_pt2e` takes 10 s for a model that has one.
    With `training`, parameters are kept, and so are operators that exist in train mode only. The quantizer replaces
    these operators (`quantizer.training.prepare_for_training`).

    Raises `ModelError` for a dtype other than float32 and for in-place writes that `functionalize` cannot replace.
    Without `training`, raises it for train mode and dynamic shapes too.
    """
    run_passes(PASSES, module, Setting(target, training, keeps_float, is_wide), "prepare")
    return module


def run_passes(passes: Iterable[Pass], module: GraphModule, setting: Setting, pipeline: str) -> Sequence[PassRun]:
    """Runs those of `passes` whose conditions hold, in place, and returns the passes that ran, each with its seconds.

    After each pass that changed the graph, the graph is checked with `torch.fx.Graph.lint`, and dumped (see `Driver`).
    """
    changed: dict[Callable[..., bool], bool] = {}

    def lint(graph: GraphModule, _: str) -> None:
        if changed[latest.run]:
            graph.graph.lint()

    driver: Driver[GraphModule] = Driver(pipeline, _graph_text, lint)
    for latest in passes:
        if not latest.runs_for(setting):
            continue
        if latest.after_change_by is not None and not changed.get(latest.after_change_by):
            continue

        def transform(graph: GraphModule, run: Pass = latest) -> GraphModule:
            changed[run.run] = run(graph, setting)
            return graph

        driver.run(latest.name, latest.purpose, transform, module)
    driver.finish()
    return driver.runs


def _graph_text(module: GraphModule) -> str:
    return str(module.print_readable(print_output=False))
