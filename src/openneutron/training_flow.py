"""The short flow of training: `prepare_training`, `distill` and `finish_training`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from openneutron.core.boundary import typed_errors
from openneutron.core.locks import traces_alone
from openneutron.errors import InputError, ModelError, OptionError
from openneutron.flow import quantize
from openneutron.model.data import Data, forms_of, inputs_in
from openneutron.model.examples import arguments_of, examples_of
from openneutron.model.exporting import check_eval, check_gradients, is_quantized
from openneutron.model.state import has_state
from openneutron.quantized_model import QuantizedModel
from openneutron.recovery.weighted_layers import layers_of
from openneutron.targets import NeutronTargetSpec, Target
from openneutron.training.distillation import ComparedValues, Distillation, Samples, train_towards
from openneutron.training.layer_states import LayerStates, compare_states, floats_of, recurrent_states
from openneutron.training.recurrent_layers import BATCH as RECURRENT_BATCH
from openneutron.training.recurrent_layers import RATE as RECURRENT_RATE
from openneutron.training.trainable import TrainableModel

__all__ = ["distill", "finish_training", "prepare_training"]

LARGEST_RATE = 1000
"""The largest rate of `distill`, in int8 steps. An int8 tensor has 255 steps, so no training needs a larger one."""
RATE, BATCH = 0.02, 32
"""The default rate and number of samples of an update, unless the states of recurrent layers are compared."""


@traces_alone
def prepare_training(
    model: Any,
    example_inputs: Any = None,
    calibration: Data | None = None,
    target: Target = "imxrt700",
    *,
    learn_ranges: bool = True,
    **options: Any,
) -> TrainableModel:
    """Returns a module whose training starts from the quantized model, with its ranges and its recovered weights.

        module = prepare_training(model.eval(), example_inputs, calibration=images, recover="auto")
        ...  # train module.parameters(), such as with torch.optim.AdamW(module.parameters(), lr=1e-4)
        program = lower(finish_training(module))

    - `model`: a float model, which is quantized first; or a result of `quantize`; or a result of `convert_pt2e`, which
      needs `example_inputs`.
    - `example_inputs`, `calibration`, `target`, `options`: those of `quantize`, for a float model. `recover` determines
      the weights from which training starts.
    - `learn_ranges`: whether the scales of activations are trained too. Scales that the NPU fixes, such as those of
      sigmoids, are not trained.

    The outputs of the module equal those of the quantized model. Batch norms are folded, and dropouts are removed. The
    weights and biases of convolutions and linears are trained, including those of LSTM, GRU and attention, and the
    parameters of operators that stay in float. Other constants, such as the weights of a layer norm, are not.

    Raises what `quantize` raises, `OptionError` for calibration data or options beside a quantized model, and
    `ModelError` for a model without a layer that is quantized and in `torch.inference_mode()`.
    """
    check_gradients("prepare_training")
    if not isinstance(learn_ranges, bool):
        raise OptionError(f"learn_ranges takes True or False, not {learn_ranges!r}.")
    if isinstance(model, TrainableModel):
        raise ModelError("This module is prepared for training already. Train it, then call finish_training().")
    quantized = _quantized(model, example_inputs, calibration, target, options)
    if next(layers_of(quantized.module), None) is None:
        raise ModelError("No layer of this model is quantized, so there is nothing to train quantized.")
    with typed_errors("Preparing the model for training"):
        return TrainableModel(quantized, learn_ranges=learn_ranges)


@traces_alone
def distill(
    module: TrainableModel,
    data: Data,
    seconds: float = 600.0,
    *,
    model: Any = None,
    steps: int | None = None,
    rate: float | None = None,
    batch: int | None = None,
    transform: Any = None,
) -> Distillation:
    """Trains `module` towards the outputs of its float model, on inputs without labels. Needs no optimizer.

        module = prepare_training(model.eval(), example_inputs, calibration=inputs, recover="auto")
        print(distill(module, inputs, seconds=600))
        program = lower(finish_training(module))

    - `data`: inputs, in the forms of `calibration` of `quantize`. Hundreds or more are needed; every eighth, up to 64,
      is held out. `transform` makes an input from each item, as for `quantize`.
    - `seconds`, `steps`: training ends when one of them is reached. `rate` decreases to 0 until then.
    - `model`: the float model, for a module of the documented flow. Otherwise, the float graph of `quantize` is used,
      and the states of recurrent layers are compared besides the outputs, which trains these layers faster.
    - `rate`: the change of a weight in one update, in int8 steps, at most 1000. `batch`: the number of samples of an
      update. By default 0.02 and 32, and 0.04 and 16 if the states of recurrent layers are compared: these need many
      updates.

    The module ends with the parameters that have the least error on the held-out inputs. These are the parameters of
    the start if no update reduces the error. Raises `OptionError` for invalid numbers, `InputError` for data that the
    model does not take, and `ModelError` for a model with state or without a float graph, for a model without an
    output of floating point that depends on trained parameters, for a float model in train mode or with outputs of
    other shapes, and in `torch.inference_mode()`.
    """
    check_gradients("distill")
    _check_is_trainable(module, "distill")
    _check_numbers(seconds, 1.0 if rate is None else rate, 1 if batch is None else batch, steps)
    if has_state(module.graph_module):
        raise ModelError("This model has state. Train it step by step with an optimizer of your own.")
    teacher = _teacher(module, model)
    with typed_errors("Reading the training data", InputError):
        samples = list(inputs_in(data, forms_of(module.graph_module), transform=transform))
    if len(samples) < 2:
        raise InputError(f"Training needs at least two samples, but the data have {len(samples)}. Give more samples.")
    with typed_errors("Training the model"):
        states = recurrent_states(module.quantized.module) if model is None else ()
        comparison = _comparison(module, teacher, samples, states)
        comparison.check_outputs()
        usual_rate, usual_batch = (RECURRENT_RATE, RECURRENT_BATCH) if states else (RATE, BATCH)
        return train_towards(
            module, comparison, seconds=min(seconds, sys.float_info.max), steps=steps,
            rate=usual_rate if rate is None else rate, batch=usual_batch if batch is None else batch,
        )  # fmt: skip


def _comparison(
    module: TrainableModel, teacher: Any, samples: Samples, states: Sequence[LayerStates]
) -> ComparedValues:
    """Compares the outputs with those of `teacher`.

    With `states`, `teacher` is the float graph of `quantize`, and the states of recurrent layers are compared as well.
    """
    if states:
        return compare_states(module, teacher, states, samples)

    def teacher_outputs(leaves: tuple[Any, ...]) -> list[Tensor]:
        arguments = arguments_of(module.graph_module, leaves)
        return floats_of(teacher(*arguments.args, **arguments.kwargs))

    with torch.no_grad():
        kept = [teacher_outputs(sample) for sample in samples]
    return ComparedValues(
        wanted=lambda chosen: [torch.stack(each) for each in zip(*(kept[one] for one in chosen), strict=True)],
        found=lambda leaves: floats_of(module.of_samples(leaves)),
        outputs=len(kept[0]),
        samples=samples,
    )


def _check_is_trainable(module: Any, function: str) -> None:
    if not isinstance(module, TrainableModel):
        raise ModelError(
            f"{function}() takes a module from prepare_training(), not {type(module).__name__}. Call "
            "prepare_training() first."
        )


def _check_numbers(seconds: float, rate: float, batch: int, steps: int | None) -> None:
    if not _is_number(seconds) or not seconds > 0:
        raise OptionError(f"seconds must be a number above 0, not {seconds!r}. Give a number such as 600.")
    if not _is_number(rate) or not 0 < rate <= LARGEST_RATE:
        raise OptionError(
            f"rate must be a number of int8 steps above 0 and at most {LARGEST_RATE}, not {rate!r}. Give a rate such "
            "as 0.02, which suits most models."
        )
    if not _is_count(batch):
        raise OptionError(f"batch must be an integer above 0, not {batch!r}. Give an integer such as 32.")
    if steps is not None and not _is_count(steps):
        raise OptionError(
            f"steps must be an integer above 0, not {steps!r}. Give an integer such as 1000, or leave steps out."
        )
    if seconds > sys.float_info.max and steps is None:
        raise OptionError("Training without a limit of seconds needs a number of steps. Give steps=...")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _teacher(module: TrainableModel, model: Any) -> Any:
    """Returns the float model: `model`, or the float graph of `quantize` if that is None."""
    teacher = module.quantized.reference if model is None else model
    if teacher is None:
        raise ModelError("The documented flow keeps no float graph. Give the float model as model=...")
    if not callable(teacher):
        raise ModelError(
            f"model=... must be the float model, not {type(teacher).__name__}. Give the module or function from which "
            "the quantized model was made."
        )
    if isinstance(teacher, nn.Module):
        check_eval(teacher, "distill")
    return teacher


@traces_alone
def finish_training(module: TrainableModel) -> QuantizedModel:
    """Returns the trained model, for `lower`. The module can be trained further afterwards.

    The float graph of the result (`reference`), with which `analyze` compares, has the trained weights. Raises
    `ModelError` for a module that `prepare_training` did not return.
    """
    _check_is_trainable(module, "finish_training")
    with typed_errors("Converting the trained model"):
        trained = replace(module.quantized, module=module.converted(), reference=module.reference())
    trained.reset()
    return trained


def _quantized(
    model: Any, example_inputs: Any, calibration: Data | None, target: Target, options: dict[str, Any]
) -> QuantizedModel:
    if isinstance(model, QuantizedModel) or (isinstance(model, GraphModule) and is_quantized(model)):
        if calibration is not None or options:
            given = ", ".join([*(["calibration"] if calibration is not None else []), *options])
            raise OptionError(f"This model is quantized already, so prepare_training() does not take {given}.")
        if isinstance(model, QuantizedModel):
            return model
        if example_inputs is None:
            raise OptionError("prepare_training() needs example_inputs for a result of convert_pt2e. Give them.")
        examples = examples_of(example_inputs, model)
        spec = NeutronTargetSpec(target)
        return QuantizedModel(
            model, examples.args, spec.name, example_kwargs=examples.kwargs, board=spec if spec.board else None
        )
    if calibration is None:
        raise OptionError("prepare_training() needs calibration data for a float model, as quantize() does.")
    return quantize(model, example_inputs, calibration, target, **options)
