"""Loads files of weights into a module."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openneutron.core.archives import check_expansion
from openneutron.core.files import bytes_of_file, check_is_file, reason_of
from openneutron.core.messages import first_line
from openneutron.errors import InputError

__all__ = ["LoadedWeights", "WeightsWarning", "load_weights", "read_checkpoint"]

_SHOWN = 8
"""The number of names in a message."""


class WeightsWarning(UserWarning):
    """A file of weights has tensors that the model does not have."""


@dataclass(frozen=True)
class LoadedWeights:
    """How `load_weights` matched the names of a file to the names of a model."""

    key: str
    """The entry of the checkpoint that holds the state dict, such as "state_dict"; empty for a bare state dict."""
    prefix: str
    """The text that was removed from the beginning of the names, such as "module."."""
    unexpected: tuple[str, ...]
    """The names in the file that the model does not have."""


def load_weights(module: nn.Module, file: str | os.PathLike[str], *, unsafe: bool = False) -> LoadedWeights:
    """Copies the weights of a file into `module`.

    The file is a state dict or a checkpoint that contains state dicts, in the format of torch.save or of safetensors.
    If there are several state dicts, such as of a model and of its moving average, the one with the most names of the
    module is used; on a tie, the first. A prefix that all names have, such as "module." of DataParallel, is removed.
    `unsafe` unpickles files with more than tensors, which can run any code.

    Raises `InputError` for a file that cannot be read, for parameters that the file does not have, and for tensors of
    other shapes. Warns with a `WeightsWarning` about tensors that the module does not have. Linear in the names.
    """
    wanted = module.state_dict()
    checkpoint = read_checkpoint(file, unsafe=unsafe)
    candidates = list(_state_dicts(checkpoint))
    if not candidates:
        raise InputError(
            f"'{file}' contains no state dict (a mapping from names to tensors). Save one: "
            "torch.save(model.state_dict(), file)."
        )
    aligned = [(key, *_align(state, wanted)) for key, state in candidates]
    key, prefix, state = max(aligned, key=lambda one: len(wanted.keys() & one[2].keys()))
    _check(wanted, state, file)
    unexpected = tuple(name for name in state if name not in wanted)
    module.load_state_dict({name: state.get(name, wanted[name]) for name in wanted})
    if unexpected:
        warnings.warn(
            f"'{file}' has {len(unexpected)} tensors that the model does not have, and these are not used: "
            f"{_shown(unexpected)}.",
            WeightsWarning,
            stacklevel=2,
        )
    return LoadedWeights(key, prefix, unexpected)


def read_checkpoint(file: str | os.PathLike[str], *, unsafe: bool = False) -> Any:
    """Returns the content of a file of weights, on the CPU. Raises `InputError` if it cannot be read."""
    path = Path(file)
    try:
        check_is_file(path)
        check_expansion(path, f"'{path}'")
        if path.suffix == ".safetensors":
            return _safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=not unsafe)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"Cannot read '{path}': {reason_of(error)}.") from error
    except pickle.UnpicklingError as error:
        if unsafe or "weights_only" not in str(error).lower():
            raise _no_weights(path, first_line(error)) from error
        raise InputError(
            f"'{path}' contains more than tensors, and unpickling it can run any code. If you trust its source, give "
            "--unsafe (unsafe=True in Python). Otherwise save its state dict: torch.save(model.state_dict(), file)."
        ) from error
    except Exception as error:  # torch.load raises errors of many types for damaged files
        raise _no_weights(path, f"{type(error).__name__}: {first_line(error)}") from error


def _no_weights(path: Path, reason: str) -> InputError:
    return InputError(
        f"'{path}' is not a file of weights ({reason}). Save the weights with torch.save(model.state_dict(), file) or "
        "as .safetensors."
    )


def _safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise InputError("Reading .safetensors needs the package safetensors: pip install safetensors.") from error
    found: Mapping[str, Tensor] = load(bytes_of_file(path))
    return found


def _state_dicts(checkpoint: Any, key: str = "", depth: int = 2) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Returns the state dicts in a checkpoint, with their keys, to a depth of `depth` mappings."""
    if isinstance(checkpoint, nn.Module):
        yield key, checkpoint.state_dict()
        return
    if not isinstance(checkpoint, Mapping):
        return
    tensors = {name: value for name, value in checkpoint.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield key, tensors
    if depth:
        for name, value in checkpoint.items():
            yield from _state_dicts(value, f"{key}.{name}" if key else str(name), depth - 1)


def _align(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
    """Returns the removed prefix and `state` with the names of the module, as far as one prefix is the difference."""
    removable = dict.fromkeys(("", *_prefixes(state)))
    addable = dict.fromkeys(("", *_prefixes(wanted)))
    pairs = [(prefix, "") for prefix in removable] + [("", prefix) for prefix in addable]
    renamed = [(removed, _renamed(state, removed, added)) for removed, added in pairs]
    return max(renamed, key=lambda one: len(wanted.keys() & one[1].keys()))


def _prefixes(names: Iterable[str]) -> Iterator[str]:
    """Returns the beginnings, up to a dot, that all names have in common."""
    parts = [name.split(".")[:-1] for name in names]
    prefix = ""
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            return
        prefix += f"{same[0]}."
        yield prefix


def _renamed(state: Mapping[str, Tensor], removed: str, added: str) -> Mapping[str, Tensor]:
    return {added + name.removeprefix(removed): value for name, value in state.items()}


def _check(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], file: str | os.PathLike[str]) -> None:
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        extra = [name for name in state if name not in wanted]
        has = f" It has these names, which the model does not have: {_shown(extra)}." if extra else ""
        raise InputError(
            f"'{file}' lacks {len(missing)} of the model's {len(wanted)} tensors: {_shown(missing)}.{has} Check that "
            "the model is built with the arguments that it was trained with."
        )
    differ = [
        f"{name} has {tuple(state[name].shape)} in the file and {tuple(value.shape)} in the model"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if differ:
        raise InputError(f"'{file}' does not fit the model: {_shown(differ)}.")


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    rest = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
