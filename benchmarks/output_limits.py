"""Measures what limits each output of a network in int8: `python -m benchmarks.output_limits [NETWORK ...]`.

The networks are those of `benchmarks.suite`. For each output, such as the boxes and the scores of a detector, a row
shows the SQNR to the float network in dB, with these values in int8 and all others in float:

- all values;
- only weights and biases;
- only activations;
- only the values that are returned, directly or after operators that move them;
- all values but these.

"Centred" SQNRs leave out the mean of each element over the samples, which does not depend on the input.
With `--train MINUTES`, the last row shows all values in int8 after training towards the outputs of the float network.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from openneutron import QuantizedModel, distill, finish_training, prepare_training, quantize
from openneutron.accuracy.quantized_layers import QuantizedLayer, QuantizedLayers, find_layers
from openneutron.accuracy.replay import record
from openneutron.core.fx import output_node

from .layer_losses import sqnr
from .suite import CALIBRATION_SAMPLES, EVALUATION_SAMPLES
from .zoo import ZOO, smooth

TRAINING_SAMPLES, BATCH = 192, 8


@dataclass(frozen=True)
class Limits:
    """SQNRs of the outputs in dB for one selection of values in int8; `centred` without the mean over the samples."""

    values: str
    outputs: tuple[float, ...]
    centred: tuple[float, ...]


def returned_layers(found: QuantizedLayers) -> list[QuantizedLayer]:
    """Returns the layers whose values are returned. Linear in nodes."""
    layers = {layer.quantize: layer for layer in found.layers}
    waiting: list[Node] = [leaf for leaf in tree_leaves(output_node(found.module.graph).args[0]) if leaf is not None]
    seen: dict[Node, None] = {}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen[node] = None
            waiting += [] if node in layers else node.all_input_nodes
    return [layers[node] for node in seen if node in layers]


@torch.no_grad()
def limits_of(quantized: QuantizedModel, samples: Sequence[Tensor]) -> Iterator[Limits]:
    """Returns a row for each selection of values in int8."""
    assert quantized.reference is not None
    found = find_layers(quantized.module, quantized.reference, quantized.target)
    returned = returned_layers(found)
    others = [layer for layer in found.layers if layer not in set(returned)]
    everything = found.roundings_of(found.layers)
    selections: dict[str, dict[str, Any]] = {
        "all values": {},
        "weights": {"skipped": everything},
        "activations": {"known": found.float_constants},
        "returned values": {"skipped": found.roundings_of(others), "known": found.float_constants},
        "all but these": {"skipped": found.roundings_of(returned)},
    }
    wanted = [_outputs(found.reference, record(found.reference, (sample,))) for sample in samples]
    for name, options in selections.items():
        given = [_outputs(found.module, record(found.module, (sample,), **options)) for sample in samples]
        yield _limits(name, wanted, given)


def _outputs(module: torch.fx.GraphModule, values: dict[Node, Any]) -> list[Tensor]:
    return tree_leaves(values[output_node(module.graph)])


def _limits(name: str, wanted: Sequence[Sequence[Tensor]], given: Sequence[Sequence[Tensor]]) -> Limits:
    pairs = [
        (torch.cat(a), torch.cat(b)) for a, b in zip(zip(*wanted, strict=True), zip(*given, strict=True), strict=True)
    ]
    centred = [sqnr(a - a.mean(0), b - a.mean(0)) for a, b in pairs]
    return Limits(name, tuple(sqnr(a, b) for a, b in pairs), tuple(centred))


@torch.no_grad()
def after_training(model: nn.Module, quantized: QuantizedModel, shape: Any, minutes: float) -> Limits:
    """Trains the quantized model, and returns a row for it."""
    module = prepare_training(quantized)
    inputs = torch.cat(smooth(shape, TRAINING_SAMPLES, seed=3))
    steps = distill(module, inputs, minutes * 60, model=model, batch=BATCH).steps
    trained, samples = finish_training(module), smooth(shape, EVALUATION_SAMPLES, seed=2)
    wanted, given = ([tree_leaves(call(sample)) for sample in samples] for call in (model, trained))
    return _limits(f"all values, after {steps} steps", wanted, given)


def main() -> None:
    """Prints a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NETWORK", help=f"of {', '.join(ZOO)}; default: ssdlite")
    parser.add_argument("--small", action="store_true", help="use the small inputs of continuous integration")
    parser.add_argument("--recover", choices=["fast", "auto"], help="option of `quantize` (default: None)")
    parser.add_argument("--train", type=float, default=0, metavar="MINUTES")
    arguments = parser.parse_args()
    names = arguments.names or ["ssdlite"]
    if unknown := set(names) - set(ZOO):
        parser.error(f"no such network: {', '.join(sorted(unknown))}")
    for name in names:
        shape = ZOO[name].small if arguments.small else ZOO[name].full
        model = ZOO[name].build(shape)
        calibration = smooth(shape, CALIBRATION_SAMPLES, seed=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = quantize(model, (calibration[0],), calibration, recover=arguments.recover)
        rows = list(limits_of(quantized, smooth(shape, EVALUATION_SAMPLES, seed=2)))
        if arguments.train:
            rows.append(after_training(model, quantized, shape, arguments.train))
        table = Table("in int8", "SQNR of the outputs, dB", "centred", title=name, title_justify="left")
        for row in rows:
            table.add_row(row.values, *(", ".join(f"{one:.1f}" for one in each) for each in (row.outputs, row.centred)))
        Console().print(table)


if __name__ == "__main__":
    main()
