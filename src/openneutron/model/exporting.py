"""Exports modules, functions, traced or scripted modules, and exported programs with torch.export."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import lzma
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torchao.quantization.pt2e import FakeQuantizeBase, ObserverBase

from openneutron.core.archives import check_expansion
from openneutron.core.constants import attribute
from openneutron.core.files import read_file
from openneutron.core.fx import is_dequantize, placeholders
from openneutron.core.messages import first_line
from openneutron.core.sources import portable_trace
from openneutron.errors import InputError, ModelError
from openneutron.model.data import describe
from openneutron.model.examples import Examples, register_dataclasses
from openneutron.model.export_errors import export_error, has_control_flow, source_line
from openneutron.model.norm_inference import infer_norms_without_arithmetic
from openneutron.model.state import initial_states, keep_assignments

__all__ = [
    "as_module",
    "check_eval",
    "check_gradients",
    "digests",
    "export",
    "is_exported",
    "is_prepared",
    "is_quantized",
    "loaded_program",
    "outputs_of",
    "saved_program",
    "target_of_file",
]  # fmt: skip

_QUANTIZED_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
GIVE = "Give the torch.nn.Module itself, in eval mode"
_FILES = {
    ".pte": "an ExecuTorch program, which load() and openneutron.inspect() read",
    ".tflite": "a TFLite model",
    ".onnx": "an ONNX model",
    **dict.fromkeys(
        (".pt", ".pth", ".ckpt", ".bin", ".safetensors"),
        "a file of weights or a scripted module, not an exported program",
    ),
}
_TARGET = "openneutron_target"
"""The name of the extra file that holds the target."""
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError)
"""The errors of `zipfile` for damaged archives; a method of compression that it lacks is a `RuntimeError`."""
_OBSERVERS = (ObserverBase, FakeQuantizeBase)
# torch's warning for a model that assigns to a buffer.
_LOSES_STATE = re.compile(r"side effects happened.*_buffers", re.DOTALL)
# torch's errors for operators that do not support gradients.
_WANTS_NO_GRADIENTS = re.compile(
    r"Inference tensors|is a view and is being modified inplace|arguments don't support automatic differentiation"
    r"|cannot resize variables that require grad"
)


def as_module(model: Any) -> nn.Module:
    """Returns a module for a model of any form.

    A model is a module (also one wrapped by `torch.compile` or `DataParallel`), an exported program, the path of a
    saved exported program (.pt2), a traced or scripted module, or a function. Raises `ModelError` for anything else,
    and `InputError` for a file that cannot be read.
    """
    if isinstance(model, (str, os.PathLike)):
        model = loaded_program(model)
    if isinstance(model, ExportedProgram):
        return model.module()
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return as_module(model.module)
    if isinstance(model, torch._dynamo.OptimizedModule):
        return as_module(model._orig_mod)
    if isinstance(model, nn.Module):
        _check_has_float_modules(model)
        _check_has_values(model)
        return model
    if isinstance(model, type) or not callable(model):
        raise ModelError(_describe(model))
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(model, "__name__", "") in ("forward", "__call__", "_wrapped_call_impl"):
        return as_module(owner)
    return _Function(_as_function(model))


def _as_function(model: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function whose signature torch.export can read, for any callable object."""
    if inspect.isfunction(model) or inspect.ismethod(model) or isinstance(model, functools.partial):
        return model
    method: Any = model.__call__  # type: ignore[operator]
    if inspect.ismethod(method):
        return method

    def call(*values: Any) -> Any:
        return model(*values)

    return call


def _check_has_float_modules(model: nn.Module) -> None:
    """Raises `ModelError` for a model with modules that torch's eager-mode quantization made."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTIZED_MODULES):
            raise ModelError(
                f"Module '{name}' ({type(module).__module__}.{type(module).__name__}) is quantized already, by torch's "
                "eager-mode quantization. Give the float model that it was made of."
            )


def _check_has_values(model: nn.Module) -> None:
    """Raises `ModelError` for a model with parameters or buffers that have no shape, or no values."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"'{name}' has no shape yet, because its module is lazy. Call the model once with example inputs: "
                "model(*example_inputs)."
            )
        if tensor.is_meta:
            raise ModelError(
                f"'{name}' is on the device 'meta', so it has a shape and no values. Create the model on the CPU, or "
                "call model.to_empty(device='cpu'), and load its weights with load_state_dict."
            )


def loaded_program(file: str | os.PathLike[str]) -> ExportedProgram:
    """Loads an exported program from a file (.pt2).

    Raises `ModelError` for a file of another type, and `InputError` for a file that cannot be read.
    """
    path = Path(file)
    if path.suffix != ".pt2":
        kind = _FILES.get(path.suffix.lower(), "not an exported program (.pt2)")
        raise ModelError(f"'{path}' is {kind}. {GIVE}: create it, load its weights, and call eval().")
    data = read_file(path)
    check_expansion(data, f"'{path}'")
    try:
        return torch.export.load(io.BytesIO(data))
    except Exception as error:
        raise InputError(f"'{path}' cannot be loaded as an exported program: {first_line(error)}") from error


def saved_program(exported: ExportedProgram, target: str, source_root: str | os.PathLike[str] | None = None) -> bytes:
    """Returns the bytes of a file (.pt2) that holds an exported program and the name of its target.

    The bytes do not depend on the process and the folder. Removes the notes on the origin of nodes from `exported`,
    because they contain addresses of Python objects. `portable_trace` shortens the paths in stack traces.
    """
    graphs = [module.graph for module in exported.graph_module.modules() if isinstance(module, GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        node.meta.pop("from_node", None)
        if node.meta.get("stack_trace"):
            node.meta["stack_trace"] = portable_trace(node.meta["stack_trace"], source_root)
    for entry in exported.module_call_graph:
        if entry.signature is not None:
            entry.signature.out_spec = _with_plain_tuples(entry.signature.out_spec)
    file = io.BytesIO()
    torch.export.save(exported, file, extra_files={_TARGET: target})
    return file.getvalue()


def _with_plain_tuples(structure: pytree.TreeSpec) -> pytree.TreeSpec:
    """Returns the structure of outputs with tuples for named tuples, which files cannot name.

    torch.max and torch.topk return such types, too (`torch.return_types`).
    """
    return pytree.tree_structure(_plain(pytree.tree_unflatten(range(structure.num_leaves), structure)))


def _plain(value: Any) -> Any:
    def converted(one: Any) -> Any:
        return tuple(map(_plain, one)) if _is_named_tuple(one) else one

    return pytree.tree_map(converted, value, is_leaf=_is_named_tuple)


def _is_named_tuple(value: object) -> bool:
    return isinstance(value, tuple) and type(value) is not tuple


def target_of_file(file: str | os.PathLike[str]) -> str | None:
    """Returns the target in a file of `saved_program`; None for another file.

    Raises `InputError` for a file that cannot be read, and for an archive whose target cannot be read.
    """
    data = read_file(file)
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except _DAMAGE:
        return None  # it is not an archive, which `loaded_program` reports
    with archive:
        names = [name for name in archive.namelist() if name.endswith(f"extra/{_TARGET}")]
        try:
            return archive.read(names[0]).decode() if names else None
        except _DAMAGE as error:
            raise InputError(
                f"'{os.fspath(file)}' is damaged: the name of its target cannot be read "
                f"({type(error).__name__}: {first_line(error)}). Save the quantized model again."
            ) from error


def _describe(model: Any) -> str:
    if isinstance(model, type):
        return f"{model.__name__} is a class. {GIVE}: {model.__name__}(...).eval()."
    if isinstance(model, Mapping):
        return (
            f"The model is a {type(model).__name__}: a state dict or a checkpoint, which holds weights without code. "
            f"{GIVE}, with these weights: module.load_state_dict(...), module.eval()."
        )
    return f"The model is a {type(model).__name__}. {GIVE}, or the result of torch.export.export."


class _Function(nn.Module):
    """Wraps a function as a module. Modules that the function calls become submodules, so that weights have names."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.training = False
        for name, module in _modules_read_by(function):
            self.add_module(name, module)
        self.forward = function


def _modules_read_by(function: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(function, functools.partial):
        yield from _modules_read_by(function.func)
        given = enumerate(function.args), function.keywords.items()
        named: Any = [(str(name).replace(".", "_"), value) for pairs in given for name, value in pairs]
    elif inspect.ismethod(function):
        owner = function.__self__
        named = [("self", owner), *({} if isinstance(owner, nn.Module) else getattr(owner, "__dict__", {})).items()]
    elif inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        named = [*variables.nonlocals.items(), *variables.globals.items()]
    elif isinstance(function, nn.Module):
        named = [("module", function)]
    else:
        named = []
    for name, value in named:
        if isinstance(value, nn.Module):
            yield f"{name}_" if hasattr(nn.Module, name) else name, value


def digests(parameters: Iterable[torch.Tensor]) -> frozenset[str]:
    """Returns a digest of the values of each parameter. Linear in bytes."""
    return frozenset(map(_digest, parameters))


def _digest(parameter: torch.Tensor) -> str:
    values = parameter.detach().cpu().contiguous()
    header = f"{values.dtype} {tuple(values.shape)}".encode()
    return hashlib.sha256(header + values.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def is_exported(module: object) -> bool:
    """Whether `module` is a graph of torch.export."""
    if not isinstance(module, GraphModule):
        return False
    nodes = placeholders(module.graph)
    return bool(nodes) and all("val" in node.meta for node in nodes)


def is_quantized(module: object) -> bool:
    """Whether a module was converted by `convert_pt2e`, or exported from such a module."""
    return isinstance(module, GraphModule) and any(map(is_dequantize, module.graph.nodes))


def is_prepared(module: object) -> bool:
    """Whether a module was prepared by `prepare_pt2e` and not yet converted."""
    return isinstance(module, GraphModule) and any(
        node.op == "call_module" and isinstance(attribute(module, str(node.target)), _OBSERVERS)
        for node in module.graph.nodes
    )


def check_gradients(function: str) -> None:
    """Raises `ModelError` in `torch.inference_mode()`, whose tensors have no gradients later, either."""
    if torch.is_inference_mode_enabled():
        raise ModelError(
            f"{function}() needs gradients, which torch.inference_mode() turns off. Call {function}() outside of it; "
            "torch.no_grad() is accepted."
        )


def check_eval(module: nn.Module, function: str) -> None:
    """Raises `ModelError` for a module in train mode. Does not check graphs of torch.export, which have no mode."""
    if is_exported(module):
        return
    for name, part in module.named_modules():
        if not part.training or _is_identity_dropout(part):
            continue
        kind = type(part).__name__
        if module.training:
            raise ModelError(f"The model is in train mode ('{name or kind}'). Call model.eval() before {function}().")
        raise ModelError(
            f"The module '{name}' ({kind}) is in train mode, and the model itself is in eval mode. Call model.eval() "
            f"before {function}()."
        )


def _is_identity_dropout(module: nn.Module) -> bool:
    """Whether it is a dropout of probability 0, which returns its input in both modes."""
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0


def export(module: nn.Module, examples: Examples, *, strict: bool = False) -> ExportedProgram:
    """Exports a module with `torch.export.export`. torch's own error is the cause of a typed error.

    Converts a traced or scripted module first, and registers dataclasses that the model returns with torch. Raises
    `InputError` if the model does not run on `examples`, and `ModelError` if torch.export does not support the model.
    """
    if isinstance(module, torch.jit.ScriptModule):
        module = _convert_script(module, examples)
    try:
        return _export_with_or_without_gradients(module, examples, strict=strict)
    except Exception as error:
        if has_control_flow(error):
            raise export_error(error, __file__) from error
        _check_is_dense(module, error)
        returned = outputs_of(module, examples, error)
        before = _count_known_types()
        register_dataclasses(returned)
        if _count_known_types() != before:
            return export(module, examples, strict=strict)
        raise export_error(error, __file__) from error


def _check_is_dense(module: nn.Module, cause: Exception) -> None:
    """Raises `ModelError` for a sparse parameter or buffer, with which torch.export or the model itself failed."""
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        if value.layout is not torch.strided:
            raise ModelError(
                f"'{name}' is sparse ({value.layout}), and the model failed: {first_line(cause)} Give it as a dense "
                "tensor, which to_dense() returns."
            ) from cause


def _export_with_or_without_gradients(module: nn.Module, examples: Examples, *, strict: bool) -> ExportedProgram:
    """Exports a module; exports it again under no_grad if torch cannot record gradients of an operator.

    torch cannot record gradients in regions of inference_mode, of writes to an output of split, chunk or unbind, and
    of operators with out=.
    """
    try:
        return _exported(module, examples, strict=strict)
    except RuntimeError as error:
        if not _WANTS_NO_GRADIENTS.search(str(error)):
            raise
    with torch.no_grad():
        return _exported(module, examples, strict=strict)


def _exported(module: nn.Module, examples: Examples, *, strict: bool) -> ExportedProgram:
    """Exports `module` with the initial values of its states instead of the values that earlier runs left."""
    with warnings.catch_warnings(record=strict) as caught:
        if strict:
            warnings.simplefilter("always")
        keeping = nullcontext() if strict or is_exported(module) else keep_assignments(module)
        args, kwargs = pytree.tree_map_only(torch.Tensor, _without_base, (examples.args, dict(examples.kwargs)))
        with keeping, infer_norms_without_arithmetic():
            exported = torch.export.export(module, args, kwargs, strict=strict)
    for warning in caught or ():
        if _LOSES_STATE.search(str(warning.message)):
            raise ModelError(
                "With strict=True, torch.export drops the model's assignment to a buffer (self.cache = ...). Use "
                "strict=False, the default, or write to the buffer instead: self.cache.copy_(...)."
            )
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    exported.state_dict.update({name: value.clone() for name, value in initial_states(module).items()})
    return exported


def _without_base(value: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a view, such as an image of a batch, if the copy has its strides; else `value`.

    For a view, torch.export makes symbols of the sizes of the whole tensor, and imports and calls sympy for them. This
    takes a quarter of the time of the export of MobileNetV2.
    """
    if not value._is_view():
        return value
    copied = value.detach().clone().requires_grad_(value.requires_grad)
    return copied if copied.stride() == value.stride() else value


def _count_known_types() -> int:
    return len(pytree.SUPPORTED_NODES)


def _convert_script(module: torch.jit.ScriptModule, examples: Examples) -> nn.Module:
    from torch._export.converter import TS2EPConverter

    if examples.kwargs:
        raise InputError("A traced or scripted module takes example_inputs by position: give a tuple.")
    try:
        converted: nn.Module = TS2EPConverter(module, examples.args, None).convert().module()
    except Exception as error:
        outputs_of(module, examples, error)
        raise ModelError(
            f"torch cannot convert this traced or scripted module: {first_line(error)} {GIVE}, from which it was made."
        ) from error
    return converted


@torch.no_grad()
def outputs_of(module: nn.Module, examples: Examples, cause: Exception | None = None) -> Any:
    """Runs the model and returns its outputs. Raises `InputError` if the model does not run on `examples`."""
    try:
        return module(*examples.args, **examples.kwargs)
    except Exception as error:
        raise InputError(
            f"The model does not run on the example inputs {describe(examples.leaves)}: "
            f"{first_line(error).rstrip('.')}. Give an input of the right shape for each argument of "
            f"forward{_arguments_of(module)}.",
            source=source_line(error, __file__),
        ) from cause or error


def _arguments_of(module: nn.Module) -> str:
    """Returns the names of the arguments of `forward` as text, "(image, meta)"; empty if they are not known."""
    try:
        return f"({', '.join(inspect.signature(module.forward).parameters)})"
    except (TypeError, ValueError):
        return ""
