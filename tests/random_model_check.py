"""Checks a random model: it must raise a typed error no later than in `lower()`, or its `.pte` must
follow the module.
"""

from __future__ import annotations

import enum
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from tests.flow_support import convert, lower_documented
from tests.random_models import Form, RandomModel, Sample, draw_model
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from openneutron import lower, quantize, reset
from openneutron.accuracy.compare import compare_layers
from openneutron.errors import OpenNeutronError
from openneutron.ops import DECOMPOSITIONS
from openneutron.ops.functions import ERROR_AT_ZERO
from openneutron.ops.norms import APPROXIMATION
from openneutron.results.comparison import Comparison

__all__ = ["Finding", "Flow", "Outcome", "check", "check_seed", "draw_flow"]

CALIBRATION_SAMPLES = 8
FOLLOWS_DB = 40.0
"""A program with at least this SQNR to its converted module is not compared layer by layer."""
SMALLEST_NOISE = 1e-10
"""A smaller mean square counts as zero: constant zeros have the smallest possible scale, and no signal."""
MIN_DB = 10.0
"""A program with less SQNR than this counts as different, whatever its layers show. A model whose outputs change by as
much under noise has no outputs to compare.
"""
REFERENCE_DB = 30.0
"""Least SQNR of the annotated float graph to the model, because decompositions approximate some functions."""
MARGIN_DB = 6.0
"""How much larger than the effect of noise the error of a float graph must be to count as another function."""
DRAWS_OF_NOISE = 8
"""Number of runs with noise. A discontinuity is close to one value of many, so one run may miss it."""
DECLARED_NOISE = ERROR_AT_ZERO**2
"""Mean square of the error of a root at zero."""


class Outcome(enum.Enum):
    """The outcome of checking a model."""

    FOLLOWS = "the program follows the converted module"
    REFUSED = "refused with a typed error"
    UNTYPED = "an error that is not typed"
    CANNOT_RUN = "a program that cannot run was written"
    DIFFERS = "the program differs from the converted module"
    REWRITTEN = "the annotated float graph computes another function than the model"
    ILL_CONDITIONED = "noise within the declared tolerances changes the model as much"


@dataclass(frozen=True)
class Flow:
    """How a model is quantized and lowered."""

    documented: bool
    strict: bool
    recover: str | None
    channels_last: bool
    scattered: bool
    """Whether calibration data are views of tensors with other strides."""
    core_aten: bool = False
    """Whether the short flow gets the model as an exported program after `run_decompositions`."""


@dataclass(frozen=True)
class Finding:
    """An outcome, with the details that show it."""

    outcome: Outcome
    detail: str = ""
    delegates: int = 0

    @property
    def is_fault(self) -> bool:
        """Whether the outcome is a fault of OpenNeutron."""
        return self.outcome not in (Outcome.FOLLOWS, Outcome.REFUSED, Outcome.ILL_CONDITIONED)


def draw_flow(random: Random) -> Flow:
    """Draws how a model is quantized and lowered, most often by the short flow without recovery."""
    documented = random.random() < 0.25
    recover = None if documented else random.choice([None, None, None, "fast", "auto"])
    strict, channels_last, scattered = (random.random() < share for share in (0.2, 0.2, 0.3))
    return Flow(documented, strict, recover, channels_last, scattered, random.random() < 0.1)


def check_seed(seed: int) -> tuple[RandomModel, Flow, Finding]:
    """Draws the model and the flow of `seed`, and checks the model."""
    random = Random(seed)
    model, flow = draw_model(random), draw_flow(random)
    return model, flow, check(model, flow)


def check(model: RandomModel, flow: Flow) -> Finding:
    """Quantizes, lowers and runs `model`, and compares the results."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = _in_strides_that_run(model, model.samples(CALIBRATION_SAMPLES, 0), flow)
        unseen = model.samples(2, 1)
        # callers pass positional arguments to prepared modules
        documented = flow.documented and model.form is not Form.KEYWORDS
        try:
            return (_documented if documented else _short)(model, flow, samples, unseen)
        except OpenNeutronError as error:
            return Finding(Outcome.REFUSED, f"{type(error).__name__}: {error}")
        except Exception:  # the check must catch errors of any type
            is_own = not documented or _exports(model, samples[0], flow)
            return Finding(Outcome.UNTYPED if is_own else Outcome.REFUSED, traceback.format_exc())


def _exports(model: RandomModel, sample: Sample, flow: Flow) -> bool:
    """Whether torch.export takes the model. In the documented flow, the caller exports it, and gets torch's error."""
    try:
        with torch.no_grad():
            torch.export.export(model.build(), tuple(sample), strict=flow.strict)
    except Exception:  # torch's errors have many types
        return False
    return True


def _short(model: RandomModel, flow: Flow, samples: list[Sample], unseen: list[Sample]) -> Finding:
    given = _core_aten(model, samples[0], flow) if flow.core_aten else model.build()
    quantized = quantize(given, samples[0], samples, recover=flow.recover, strict=flow.strict, progress=False)
    if quantized.reference is not None:
        # run_decompositions() may lose a write to a buffer, so the decomposed program is the model then.
        build = model.build if isinstance(given, torch.nn.Module) else given.module
        rewritten = _rewritten(build, quantized.reference, unseen)
        if rewritten is not None and rewritten.is_fault:
            return rewritten
    program = lower(quantized)
    delegates = len({row.partition for row in program.placement if row.where == "npu"})
    left = [row.op for row in program.placement if row.where == "cpu"]
    layers = partial(compare_layers, quantized, program, unseen)
    held = _held(_Program(program.run, delegates, left), quantized.module, unseen, layers)
    return held if held.is_fault else rewritten or held


def _core_aten(model: RandomModel, sample: Sample, flow: Flow) -> Any:
    """Returns the exported program in core ATen operators; the module itself if torch cannot export or decompose it."""
    positional, named = ((), sample) if isinstance(sample, dict) else (sample, None)
    try:
        with torch.no_grad():
            return torch.export.export(model.build(), positional, named, strict=flow.strict).run_decompositions()
    except Exception:  # torch's errors have many types
        return model.build()


def _rewritten(
    build: Callable[[], torch.nn.Module], reference: GraphModule, unseen: list[Sample]
) -> Finding | None:
    """Returns a finding if `reference`, the annotated float graph, differs from the model; None if it does not."""
    reset(reference)
    wanted, found = _outputs(build(), unseen), _outputs(reference, unseen)
    figure = min(map(_worst_db_with_declared_noise, wanted, found))
    if figure >= REFERENCE_DB:
        return None
    noisy = min(min(map(_worst_db, wanted, _disturbed(build, unseen, seed))) for seed in range(DRAWS_OF_NOISE))
    outcome = Outcome.REWRITTEN if figure < noisy - MARGIN_DB and noisy > MIN_DB else Outcome.ILL_CONDITIONED
    return Finding(outcome, f"{figure:.1f} dB; {noisy:.1f} dB with noise")


def _documented(model: RandomModel, flow: Flow, samples: list[Sample], unseen: list[Sample]) -> Finding:
    given = [tuple(sample) for sample in samples]
    with torch.no_grad():  # torch can export an inference_mode region only in this way
        converted = convert(model.build(), given[0], strict=flow.strict, calibration=given)
    lowered = lower_documented(converted, given[0])
    program = _Program(partial(_run_flat, lowered.run), lowered.delegates, lowered.cpu)
    layers = partial(compare_layers, converted, lowered.pte, unseen, example_inputs=given[0])
    return _held(program, converted, unseen, layers)


@dataclass(frozen=True)
class _Program:
    run: Callable[..., Any]
    delegates: int
    cpu: list[str]


def _held(program: _Program, converted: GraphModule, unseen: list[Sample], layers: Callable[[], Comparison]) -> Finding:
    """Compares `program` with the converted module; `layers` compares them layer by layer."""
    try:
        found = _outputs(program.run, unseen)
    except OpenNeutronError as error:
        return Finding(Outcome.CANNOT_RUN, f"{error}; on the CPU: {program.cpu}", program.delegates)
    reset(converted)
    wanted = _outputs(converted, unseen)
    figure = min(_worst_db(want, got) for got, want in zip(found, wanted, strict=True))
    if figure >= FOLLOWS_DB:
        return Finding(Outcome.FOLLOWS, f"{figure:.1f} dB", program.delegates)
    try:
        first = layers().first
    except OpenNeutronError as error:  # the program already exists, so this error is not a rejection
        return Finding(Outcome.DIFFERS, f"{figure:.1f} dB; its layers cannot be compared: {error}", program.delegates)
    if first is None and figure > MIN_DB:
        return Finding(Outcome.FOLLOWS, f"{figure:.1f} dB", program.delegates)
    noisy = min(_worst_db(want, got) for seed in range(DRAWS_OF_NOISE)
                for want, got in zip(wanted, _off_by_one(converted, unseen, seed), strict=True))  # fmt: skip
    outcome = Outcome.DIFFERS if figure < noisy - MARGIN_DB else Outcome.ILL_CONDITIONED
    return Finding(outcome, f"{figure:.1f} dB; {noisy:.1f} dB with codes off by one; {first}", program.delegates)


def _call(function: Callable[..., Any], sample: Sample) -> Any:
    """Calls `function` with copies of the inputs, because a model may write to them.

    It runs without gradients, because autograd rejects results of an `inference_mode` region.
    """
    copied = tree_map_only(torch.Tensor, torch.Tensor.clone, sample)
    with torch.no_grad():
        return function(**copied) if isinstance(copied, dict) else function(*copied)


def _run_flat(run: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `run` with the tensors in `arguments`, because a program of the documented flow does not know their
    structure.
    """
    return run(*(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)))


def _in_strides_that_run(model: RandomModel, samples: list[Sample], flow: Flow) -> list[Sample]:
    """Returns `samples` with the strides of `flow`, or unchanged if the float model rejects such strides."""
    laid_out: list[Sample] = [_laid_out(sample, flow) for sample in samples]
    try:
        _call(model.build(), laid_out[0])
    except RuntimeError:
        return samples
    return laid_out


def _laid_out(value: Any, flow: Flow) -> Any:
    """Returns `value` with the strides of `flow` in each of its tensors."""
    return tree_map_only(torch.Tensor, lambda tensor: _in_strides(tensor, flow), value)


def _in_strides(value: torch.Tensor, flow: Flow) -> torch.Tensor:
    if flow.channels_last and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if flow.scattered and value.dim() >= 2:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    return value


class _Disturbed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds noise to each computed float value, as large as the declared approximation of decompositions."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view or function._schema.is_mutable:
            return result
        declaration = DECOMPOSITIONS.get(f"aten.{function._schema.name.partition('::')[2]}.{function._overloadname}")
        declared = ERROR_AT_ZERO if declaration is None else max(ERROR_AT_ZERO, declaration.approximation)
        return tree_map_only(torch.Tensor, partial(self._with_noise, declared), result)

    def _with_noise(self, declared: float, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point() or not value.numel():
            return value
        noise = 2 * torch.rand(value.shape, generator=self._generator) - 1
        return value + (APPROXIMATION / 2 * value.abs().max() + declared) * noise


class _OffByOne(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds -1, 0 or 1 to the codes of computed values, as kernels may within their tolerance."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is not torch.ops.quantized_decomposed.quantize_per_tensor.default:
            return result
        steps = torch.randint(-1, 2, result.shape, generator=self._generator)
        return (result.int() + steps).clamp(*args[3:5]).to(result.dtype)


def _off_by_one(converted: GraphModule, unseen: list[Sample], seed: int) -> list[Any]:
    """Returns the outputs of `converted` with the codes of `_OffByOne`, which kernels may return within their
    tolerance.
    """
    reset(converted)
    with _OffByOne(seed):
        return _outputs(converted, unseen)


def _disturbed(build: Callable[[], torch.nn.Module], unseen: list[Sample], seed: int) -> list[Any]:
    """Returns the outputs of `model` with the noise of `_Disturbed`: the change that permitted approximations cause.
    """
    module = build()
    with _Disturbed(seed):
        return _outputs(module, unseen)


def _outputs(function: Callable[..., Any], unseen: list[Sample]) -> list[Any]:
    return [_call(function, sample) for sample in unseen]


def _worst_db_with_declared_noise(wanted: Any, found: Any) -> float:
    return _worst_db(wanted, found, DECLARED_NOISE)


def _worst_db(wanted: Any, found: Any, least_noise: float = SMALLEST_NOISE) -> float:
    """Returns the smallest SQNR of the outputs in dB; minus infinity if their structures differ."""
    pairs = list(zip(_tensors(wanted), _tensors(found), strict=False))
    if len(pairs) != len(_tensors(wanted)) or len(pairs) != len(_tensors(found)):
        return -float("inf")
    return min((_db(want, got, least_noise) for want, got in pairs), default=float("inf"))


def _db(want: torch.Tensor, got: torch.Tensor, least_noise: float) -> float:
    if want.shape != got.shape or want.dtype != got.dtype:
        return -float("inf")
    if want.numel() == 0 or not want.is_floating_point():
        return float("inf")  # an index or a truth value may differ if its operands are one step apart
    noise = float((want.double() - got.double()).pow(2).mean())
    signal = float(want.double().pow(2).mean())
    if noise <= max(1e-12 * signal, least_noise):
        return float("inf")
    return 10 * torch.log10(torch.tensor(max(signal, 1e-30) / noise)).item()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in _tensors(part)] if isinstance(value, (tuple, list)) else []
