"""Quantization in one call, with the name of ExecuTorch's NXP backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

from openneutron.model.data import InputForm, forms_of, in_batches, is_batch_of

__all__ = ["calibrate_and_quantize"]


def calibrate_and_quantize(
    model: torch.export.ExportedProgram | GraphModule,
    calibration_inputs: Iterable[Any],
    quantizer: Any,
    is_qat: bool = False,
    train_fn: Callable[[GraphModule], Any] | None = None,
) -> GraphModule:
    """Prepares, calibrates and converts an exported model, and returns the converted module.

    `calibration_inputs` has tuples of inputs, or tensors for a model with one input. Batches that are larger than the
    model's batch are split. With `is_qat`, `train_fn` trains the prepared model; without `train_fn`, the prepared model
    is calibrated in eval mode. Raises the errors of `NeutronQuantizer`.
    """
    exported = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    forms = forms_of(exported)
    prepared = prepare_qat_pt2e(exported, quantizer) if is_qat else prepare_pt2e(exported, quantizer)
    if is_qat and train_fn is not None:
        train_fn(move_exported_model_to_train(prepared))
    else:
        prepared = move_exported_model_to_eval(prepared) if is_qat else prepared
        with torch.no_grad():
            for item in calibration_inputs:
                values = (item,) if isinstance(item, torch.Tensor) else tuple(item)
                for inputs in _in_batches_of_the_model(values, forms):
                    prepared(*inputs)
    converted: GraphModule = convert_pt2e(move_exported_model_to_eval(prepared) if is_qat else prepared)
    return converted


def _in_batches_of_the_model(values: tuple[Any, ...], forms: Sequence[InputForm]) -> Iterator[tuple[Any, ...]]:
    """Splits `values` into batches of the model if they are a larger batch, else returns them unchanged."""
    if len(values) == len(forms) and all(map(_is_larger_batch, values, forms)):
        yield from in_batches(values, [form.sizes[0] for form in forms])
    else:
        yield values


def _is_larger_batch(value: Any, form: InputForm) -> bool:
    return is_batch_of(value, form) and form.batch is not None and len(value) > form.batch
