"""Rewrites of the exported ATen graph that make it quantizable, a file per pass.

A pass takes a GraphModule, changes it in place and says whether it changed anything; it keeps no state.
"""

from openneutron.passes.checks import check_is_static_eval, check_writes_nothing
from openneutron.passes.decompose import decompose
from openneutron.passes.fold_batch_norm import fold_batch_norm
from openneutron.passes.fold_constants import fold_constants
from openneutron.passes.functionalize import functionalize
from openneutron.passes.name_bad_inputs import name_bad_inputs
from openneutron.passes.name_numbers import name_numbers
from openneutron.passes.remove_dead_channels import remove_dead_channels
from openneutron.passes.remove_identities import remove_identities

__all__ = [
    "check_is_static_eval", "check_writes_nothing", "decompose", "fold_batch_norm", "fold_constants", "functionalize",
    "name_bad_inputs", "name_numbers", "prepare", "remove_dead_channels", "remove_identities",
]  # fmt: skip

from torch.fx import GraphModule

from openneutron.targets import NeutronTarget


def prepare(module: GraphModule, target: NeutronTarget, *, training: bool = False) -> GraphModule:
    """All passes that any quantization starts with, in their order. Linear in the nodes of the graph.

    No batch norm in eval mode is left: torchao's `convert_pt2e` takes 10 s for a model that has one.

    Raises `ModelError` for a model that cannot be quantized as a whole: train mode (unless `training`), dynamic
    shapes, a dtype other than float32, writes in place that other values would see.
    """
    check_is_static_eval(module, training=training)
    name_bad_inputs(module)
    functionalize(module)
    if not training:
        check_writes_nothing(module)
    fold_constants(module)
    remove_identities(module)
    if decompose(module, target):
        fold_constants(module)
        remove_identities(module)
    fold_batch_norm(module)
    name_numbers(module)
    if not training:
        remove_dead_channels(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
