"""The oracle of the operator tests: compares the `.pte` on the host with the converted module in eager PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from openneutron import NeutronProgram, QuantizedModel, lower, quantize
from openneutron.core.fx import is_dequantize, iterate_nodes, output_node
from openneutron.quantizer import UnquantizedWarning
from openneutron.runtime import HostProgram

__all__ = [
    "Agreement", "Function", "agreement", "agreements", "everything_on_the_npu", "lowered", "quantized",
    "quantized_elsewhere", "samples_like",
]  # fmt: skip

CALIBRATION_SAMPLES = 4
# Wider than the calibrated range, to compare saturation too.
OVERSHOOT = 1.25

Inputs = tuple[torch.Tensor, ...]


class Function(torch.nn.Module):
    """A function as a module. `children` and constants are registered, and passed before the inputs."""

    def __init__(self, function: Callable[..., Any], *parts: torch.nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = [f"part{i}" for i in range(len(parts))]
        for name, part in zip(self.names, parts, strict=True):
            if isinstance(part, torch.nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*(getattr(self, name) for name in self.names), *inputs)


@dataclass(frozen=True)
class Agreement:
    """The agreement of a program with its converted module: the largest difference in LSBs, and the number of equal
    values.
    """

    worst: int
    equal: int
    values: int

    @property
    def exact(self) -> float:
        """The percentage of equal values."""
        return 100 * self.equal / self.values

    def __add__(self, other: Agreement) -> Agreement:
        worst = max(self.worst, other.worst)
        return Agreement(worst, self.equal + other.equal, self.values + other.values)


def samples_like(shapes: Sequence[tuple[int, ...]], count: int, seed: int, spread: tuple[float, float]) -> list[Inputs]:
    """Returns random inputs of `shapes`, normally distributed with `spread` (mean, standard deviation)."""
    generator = torch.Generator().manual_seed(seed)
    mean, deviation = spread
    return [tuple(torch.randn(shape, generator=generator) * deviation + mean for shape in shapes) for _ in range(count)]


def quantized(
    model: torch.nn.Module, shapes: Sequence[tuple[int, ...]], spread: tuple[float, float] = (0.0, 1.0), **options: Any
) -> QuantizedModel:
    """Quantizes `model` in eval mode on random data. Ignores warnings about operators that remain in float."""
    calibration = samples_like(shapes, CALIBRATION_SAMPLES, 0, spread)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnquantizedWarning)
        return quantize(model.eval(), calibration[0], calibration, **{"recover": None, **options})


def quantized_elsewhere(model: torch.nn.Module, shapes: Sequence[tuple[int, ...]]) -> QuantizedModel:
    """Returns `model` with its inputs and its output in int8 with equal qparams, as another
    quantizer might leave it.
    """
    ops = torch.ops.quantized_decomposed

    def rounded(value: torch.Tensor) -> torch.Tensor:
        qparams = (0.05, 3, -128, 127, torch.int8)
        codes = ops.quantize_per_tensor.default(value, *qparams)
        return ops.dequantize_per_tensor.default(codes, *qparams)  # type: ignore[no-any-return]

    (inputs,) = samples_like(shapes, 1, 0, (0.0, 1.0))
    around = Function(lambda part, *values: rounded(part(*map(rounded, values))), model)
    return QuantizedModel(torch.export.export(around.eval(), inputs).module(), inputs, "imxrt700")


def lowered(model: QuantizedModel, **options: Any) -> NeutronProgram:
    """Lowers a quantized model."""
    return lower(model, **options)


def everything_on_the_npu(program: NeutronProgram) -> bool:
    """Whether one delegate has all operators of the quantized graph."""
    return {row.partition for row in program.placement} == {0}


def agreement(
    program: NeutronProgram,
    model: QuantizedModel,
    samples: int = 3,
    seed: int = 1,
    spread: tuple[float, float] = (0.0, 1.0),
) -> Agreement:
    """Runs both on random inputs. Differences are in LSBs of each output."""
    host = HostProgram.from_bytes(program.buffer)
    mean, deviation = spread
    shapes = [tuple(value.shape) for value in model.example_inputs]
    result = Agreement(0, 0, 0)
    for inputs in samples_like(shapes, samples, seed, (mean, deviation * OVERSHOOT)):
        result = sum(agreements(host.run(*inputs), model(*inputs), model), result)
    return result


def agreements(found: Any, expected: Any, model: QuantizedModel) -> list[Agreement]:
    """Returns the agreement of each output of the program (`found`) with the converted module (`expected`)."""
    result = []
    nodes = iterate_nodes(output_node(model.module.graph).args)
    for got, want, node in zip(_as_tuple(found), _as_tuple(expected), nodes, strict=True):
        assert got.shape == want.shape
        steps = torch.round((got - want).abs() / _lsb(node, want))
        result.append(Agreement(int(steps.max()), int((steps == 0).sum()), steps.numel()))
    return result


def _as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def _lsb(node: Node, values: torch.Tensor) -> float:
    """Returns the scale of the dequantize that an output comes from; for a float graph, an 8-bit step of its values."""
    while node.op == "call_function":
        if is_dequantize(node):
            return float(node.args[1])  # type: ignore[arg-type]
        node = node.all_input_nodes[0]
    return float(values.abs().max()) / 255
