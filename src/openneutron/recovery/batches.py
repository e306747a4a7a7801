"""Runs the float graph and the converted module on several samples at once.

A batch saves the fixed cost of each operator, and images in channels-last are convolved faster. Neither graph is
rewritten: literal shapes are multiplied by the number of samples where an operator reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from openneutron.calibration.bare_graph import (
    SINGLE,
    Batches,
    bare_graph,
    batched_sizes,
    choose_batches,
    overwriting_operator,
)
from openneutron.core.evaluation import evaluate_call, evaluate_operator, run_node
from openneutron.ops.shapes import needs_strides, takes_sizes
from openneutron.passes.add_input_guards import GUARDS

__all__ = ["Batch", "batches_of", "batches_that_run", "run_in_batch"]

# With fewer samples, the trial of a batch takes longer than the batches save.
FEWEST_SAMPLES = 16


@dataclass(frozen=True)
class Batch:
    """The `inputs` of `count` samples, concatenated along dimension 0."""

    inputs: tuple[Any, ...]
    count: int

    def samples_in(self, value: Any) -> list[Any]:
        """Splits a value of this batch into the values of its samples, which are views."""
        return list(value.chunk(self.count)) if self.count > 1 else [value]


def batches_that_run(module: GraphModule, samples: Sequence[tuple[Any, ...]]) -> Batches:
    """Selects the batch size and the memory format for the float graph `module`, by trials on two samples.

    Returns `SINGLE` for fewer than `FEWEST_SAMPLES` samples, and if the graph does not run in batches.
    """
    if len(samples) < FEWEST_SAMPLES:
        return SINGLE
    return choose_batches(bare_graph(module), list(samples[:FEWEST_SAMPLES]), None)


def batches_of(samples: Sequence[tuple[Any, ...]], form: Batches) -> list[Batch]:
    """Concatenates consecutive samples. The last batch has what is left."""
    if form == SINGLE:
        return [Batch(inputs, 1) for inputs in samples]
    parts = (samples[start : start + form.size] for start in range(0, len(samples), form.size))
    return [Batch(form.concatenate(part), len(part)) for part in parts]


def run_in_batch(
    module: GraphModule, node: Node, value_of: Callable[[Node], Any], count: int, *, overwrites: bool = False
) -> Any:
    """Computes a node of any kind except placeholders on values of `count` samples, as `run_node` does for one sample.

    With `overwrites`, an activation overwrites its operand if nothing else reads the operand. Allocating memory costs
    more than the activation.
    """
    if node.op == "call_module" and node.target == GUARDS and count > 1:  # they check the shapes of one sample
        return None
    if node.op != "call_function":
        return run_node(module, node, value_of)
    if overwrites and (operator := overwriting_operator(node)) is not None:
        return evaluate_operator(operator, node, value_of)
    if not takes_sizes(node):
        return evaluate_call(node, value_of)
    # Sizes that are computed from a batch already count its samples, so literals are multiplied before values are read.
    args = (node.args[0], batched_sizes(node.args[1], count), *node.args[2:])
    arguments: Any = map_arg((args, node.kwargs), value_of)
    (value, sizes, *others), options = arguments
    if needs_strides(node):  # views of channels-last tensors may not exist
        return torch.reshape(value, sizes)
    assert callable(node.target)
    return node.target(value, sizes, *others, **options)
