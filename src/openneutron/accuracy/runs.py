"""Objects that can be evaluated (modules, quantized models, programs): their calls, inputs, state and pickling."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_unflatten

from openneutron.calibration.bare_graph import bare_graph
from openneutron.core.fx import output_node, placeholders
from openneutron.core.messages import as_sentence
from openneutron.errors import ModelError, OptionError
from openneutron.model.arguments import MISSING, Leaf, leaves_at
from openneutron.model.data import InputForm, forms_of
from openneutron.model.examples import leaves_of, register_dataclasses_of
from openneutron.model.state import has_state, initial_states, reset
from openneutron.neutron_program import NeutronProgram
from openneutron.quantized_model import QuantizedModel
from openneutron.runtime.native import native_module
from openneutron.runtime.program import HostProgram, TensorInfo, load

__all__ = [
    "RunReset", "as_runnable", "batch_size", "carries_state", "input_forms", "pickle_runs", "state_needs_one_job",
    "to_call",
]  # fmt: skip

Run = Callable[..., Any]


def as_runnable(run: Any) -> Any:
    """Returns a module, a `QuantizedModel` or a `HostProgram`. A file runs in a process of its own (see `load`).

    Raises `OptionError` for what cannot be run, and `NativeModuleError` for a program if the native module is not
    installed.
    """
    if isinstance(run, NeutronProgram):
        run = HostProgram(run.portable, leaves=run.leaves)
    elif isinstance(run, (str, bytes, os.PathLike)):
        run = load(run, isolated=not isinstance(run, bytes))
    elif isinstance(run, ExportedProgram):
        run = run.module()
    if isinstance(run, HostProgram):
        native_module()
    elif not callable(run):
        raise OptionError(f"run must be a module, a NeutronProgram or a loaded .pte, not {run!r}.")
    return run


def to_call(run: Any) -> Run:
    """Returns a function of the inputs of a result of `as_runnable`."""
    return _FloatProgram(run) if isinstance(run, HostProgram) else run


@dataclass(frozen=True)
class _FloatProgram:
    """Runs a program. Float values for quantized inputs are quantized, and then its quantized outputs are dequantized.

    Integers and the outputs for them are not converted.
    """

    program: HostProgram

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        infos = self.program.inputs
        if not any(_is_quantized(info) for info in infos):
            return self.program.run(*inputs, **named)
        flat = self.program.values_of(*inputs, **named)
        if not any(_is_quantized(info) and _is_float(value) for info, value in zip(infos, flat, strict=False)):
            return self.program.run(*inputs, **named)
        pairs = zip(infos, flat, strict=False)
        codes = [info.quantize(value) if _is_quantized(info) and _is_float(value) else value for info, value in pairs]
        outputs = self.program.run(*codes)
        values = outputs if isinstance(outputs, tuple) else (outputs,)
        floats = tuple(
            info.dequantize(value) if _is_quantized(info) else value
            for info, value in zip(self.program.outputs, values, strict=True)
        )
        return floats if isinstance(outputs, tuple) else floats[0]


def _is_quantized(info: Any) -> bool:
    return isinstance(info, TensorInfo) and info.scale is not None


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def input_forms(run: Any) -> tuple[InputForm, ...] | None:
    """Returns the forms of the inputs of a result of `as_runnable`; None for a module that is not exported.

    The form of a quantized input of a program is the float32 tensor that `to_call` quantizes.
    """
    if isinstance(run, HostProgram):
        leaves = run.leaves or [Leaf((f"input{index}",)) for index in range(len(run.inputs))]
        return tuple(map(_form_of_info, run.inputs, leaves))
    module = run.module if isinstance(run, QuantizedModel) else run
    return forms_of(module) if isinstance(module, GraphModule) else None


def _form_of_info(info: Any, leaf: Leaf) -> InputForm:
    if not isinstance(info, TensorInfo):
        return InputForm(leaf.name, (), None, leaf.path, info.value)
    return InputForm(leaf.name, info.shape, torch.float32 if info.scale is not None else info.dtype, leaf.path)


def batch_size(run: Any) -> int | None:
    """Returns the batch size of a result of `as_runnable`; None if it is not fixed."""
    if isinstance(run, HostProgram):
        inputs: Sequence[Any] = run.inputs
    elif isinstance(run, QuantizedModel):
        inputs = run.examples.leaves
    elif isinstance(run, GraphModule):
        inputs = [node.meta.get("val") for node in placeholders(run.graph)]
    else:
        return None
    sizes = next((value.shape for value in inputs if isinstance(value, (TensorInfo, torch.Tensor))), ())
    return sizes[0] if sizes and isinstance(sizes[0], int) else None


def carries_state(run: Any) -> bool:
    """Whether an exported module or a program keeps state from one call to the next."""
    module = run.module if isinstance(run, QuantizedModel) else run
    if isinstance(module, GraphModule):
        return has_state(module)
    return isinstance(run, HostProgram) and run.has_state


class RunReset:
    """Resets the state of a run before each stream.

    The initial state of a float module is the content of its buffers at the first call.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._buffers: dict[str, Tensor] | None = None

    def __call__(self) -> None:
        """Resets the state."""
        run = self._run
        if isinstance(run, HostProgram):
            if run.has_state:  # else a reset after an interruption would start the process of the program again
                run.reset()
        elif isinstance(run, QuantizedModel):
            run.reset()
        elif isinstance(run, GraphModule) and initial_states(run):
            reset(run)
        elif isinstance(run, torch.nn.Module):
            self._reset_buffers(run)

    @torch.no_grad()
    def _reset_buffers(self, module: torch.nn.Module) -> None:
        if self._buffers is None:
            self._buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        for name, buffer in module.named_buffers():
            buffer.copy_(self._buffers[name])


def state_needs_one_job() -> OptionError:
    """Returns the error of a model with state in several processes."""
    return OptionError("The model carries state from one sample to the next, which processes cannot share. Use jobs=1.")


@dataclass(frozen=True)
class _Program:
    """A picklable `.pte`. The process that runs it loads it on the first call."""

    buffer: bytes
    leaves: tuple[Leaf, ...] | None
    is_isolated: bool

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self._loaded(*inputs, **named)

    @functools.cached_property
    def _loaded(self) -> _FloatProgram:
        return _FloatProgram(HostProgram(self.buffer, leaves=self.leaves, isolated=self.is_isolated))


class _Exported(torch.nn.Module):
    """An exported module without its unpicklable parts."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.bare = bare_graph(module)
        self.paths = [leaf.path for leaf in leaves_of(module)]
        info = getattr(module.graph._codegen, "pytree_info", None)
        self.form = None if info is None else info.out_spec
        returned = tree_leaves(output_node(module.graph).args[0])
        self.constants = [MISSING if isinstance(leaf, Node) else leaf for leaf in returned]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Returns the outputs in the structure of the exported module."""
        outputs = list(self.bare(*leaves_at(self.paths, inputs, named)))
        if self.form is None:
            return outputs[0]
        tensors = iter(outputs)
        leaves = [next(tensors) if constant is MISSING else constant for constant in self.constants]
        register_dataclasses_of(self.form)
        return tree_unflatten(leaves, self.form)


def pickle_runs(runs: Sequence[Any], metric: Any) -> bytes:
    """Pickles runs and a metric for another process: a program by its bytes, an exported module without its guards.

    Raises `ModelError` for a module, and `OptionError` for a metric that cannot be pickled.
    """
    picklable = [_picklable(run) for run in runs]
    for run, made in zip(runs, picklable, strict=True):
        _dumped(made, ModelError, f"This {type(run).__name__}")
    _dumped(metric, OptionError, "The metric")
    return _dumped((picklable, metric), ModelError, "The models")


def _picklable(run: Any) -> Any:
    run = run.module if isinstance(run, QuantizedModel) else run
    if isinstance(run, HostProgram):
        return _Program(run.buffer, run.leaves, run.is_isolated)
    return _Exported(run) if isinstance(run, GraphModule) else run


def _dumped(value: Any, kind: type[ModelError] | type[OptionError], what: str) -> bytes:
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(value))
    except (TypeError, AttributeError, RuntimeError, pickle.PicklingError) as error:
        raise kind(f"{what} cannot be pickled for other processes: {as_sentence(error)} Use jobs=1.") from error
