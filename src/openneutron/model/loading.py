"""Loads models that a text names: a class in a file, an exported program, a TorchScript file, a model of a package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from openneutron.core.files import check_is_file
from openneutron.core.messages import did_you_mean, first_line
from openneutron.core.objects import load_object
from openneutron.core.user_code import code_of_user
from openneutron.errors import InputError, ModelError, OptionError
from openneutron.model.exporting import loaded_program
from openneutron.model.weights import load_weights, read_checkpoint
from openneutron.settings.model_texts import LIBRARIES, arguments_in, check_model, is_model_file, missing_library

__all__ = ["load_model"]

NO_WEIGHTS = "none"
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load_model(
    model: str, *, args: str | None = None, weights: str | None = None, unsafe: bool = False
) -> nn.Module | ExportedProgram:
    """Returns the model that a text names, in eval mode.

    - `model`: "file.py:name" or "package.module:name" of a class, a function that returns a module, or a module; a
      file of torch.export (.pt2) or of TorchScript; "timm:name" or "torchvision:name".
    - `args`: the arguments of the class or function as text, such as "width=16, classes=10".
    - `weights`: a file for `load_weights`. A model of timm or torchvision has the pretrained weights of its package
      without it, and random weights with "none".
    - `unsafe`: whether files may be unpickled that contain more than tensors.

    Random weights are those of the seed 0, so that each call returns the same model.

    Raises `InputError` for a file or a name that does not exist, `OptionError` for wrong arguments, and `ModelError`
    for an object that is not a model.
    """
    check_model(model)
    library, _, name = model.partition(":")
    positional, keywords = arguments_in(args or "")
    if library in LIBRARIES:
        if positional:
            raise OptionError(f"args of {library}:{name} takes keyword arguments only, such as 'num_classes=10'.")
        with _seeded():
            module = _MAKERS[library](name, weights is None, keywords)
    elif is_model_file(model):
        read = _file(Path(model), unsafe=unsafe)
        if isinstance(read, ExportedProgram):
            _refuse_changes(model, args, weights)
            return read
        module = read
    else:
        with _seeded():  # the first call imports the file, which may draw numbers, too
            found = load_object(model, "The model")
        with _seeded():
            module = _made(found, model, positional, keywords)
    if weights is not None and weights != NO_WEIGHTS:
        load_weights(module, weights, unsafe=unsafe)
    return module.eval()


@contextmanager
def _seeded() -> Iterator[None]:
    """Seeds torch's random numbers in the block, and restores their state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _refuse_changes(model: str, args: str | None, weights: str | None) -> None:
    for name, given in (("args", args), ("weights", weights)):
        if given is not None:
            raise OptionError(f"'{model}' is an exported program, which holds its weights. Leave out {name}.")


def _file(path: Path, *, unsafe: bool) -> nn.Module | ExportedProgram:
    if path.suffix == ".pt2":
        return loaded_program(path)
    check_is_file(path)
    try:
        return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-any-return]
    except RuntimeError as error:
        if path.suffix not in {".pt", ".pth"}:
            raise InputError(f"'{path}' is not a TorchScript file: {first_line(error)}") from error
    found = read_checkpoint(path, unsafe=unsafe)
    if isinstance(found, nn.Module):
        return found
    raise ModelError(
        f"'{path}' contains weights and no model. Give the model as file.py:name, and this file as weights."
    )


def _made(found: Any, model: str, positional: list[Any], keywords: Mapping[str, Any]) -> nn.Module:
    """Returns `found` if it is a module, else the module that `found` returns when it is called."""
    if isinstance(found, nn.Module):
        if positional or keywords:
            raise OptionError(f"'{model}' is a module already. Leave out args.")
        return found
    if not callable(found):
        raise ModelError(f"'{model}' is of type {type(found).__name__}. Give a class, a function or a module.")
    _check_arguments(found, model, positional, keywords)
    with code_of_user(f"'{model}'", ModelError):
        made = found(*positional, **keywords)
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"'{model}' returns an object of type {type(made).__name__}. Give a function that returns a module."
        )
    return made


def _check_arguments(found: Any, model: str, positional: list[Any], keywords: Mapping[str, Any]) -> None:
    """Raises `OptionError` if a class or function does not take these arguments."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # some classes of C have none
        return
    try:
        signature.bind(*positional, **keywords)
    except TypeError as error:
        unknown, known = _unknown_keyword(signature, keywords), _names_of(signature, *_BY_KEYWORD)
        reason = first_line(error) if unknown is None else f"got an unexpected keyword argument '{unknown}'"
        hint = "" if unknown is None else did_you_mean(unknown, known)
        raise OptionError(
            f"'{model}' cannot be called with these arguments: {reason}.{hint} Give args, such as 'width=16'. It "
            f"takes {signature}."
        ) from error


def _unknown_keyword(signature: inspect.Signature, keywords: Mapping[str, Any]) -> str | None:
    """Returns the first of `keywords` that no parameter has; None if there is none, or if all keywords are accepted."""
    if _names_of(signature, inspect.Parameter.VAR_KEYWORD):
        return None
    known = _names_of(signature, *_BY_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return next((name for name in keywords if name not in known), None)


def _names_of(signature: inspect.Signature, *kinds: Any) -> list[str]:
    return [name for name, parameter in signature.parameters.items() if parameter.kind in kinds]


def _timm(name: str, pretrained: bool, keywords: Mapping[str, Any]) -> nn.Module:
    with _importing("timm", name):
        import timm
    if ":" not in name:  # a name such as "hf-hub:timm/resnet18.a1_in1k" is known to a server only
        _check_is_known("timm", name.partition(".")[0], timm.list_models())
    return _of_library("timm", name, lambda: timm.create_model(name, pretrained=pretrained, **keywords))


def _torchvision(name: str, pretrained: bool, keywords: Mapping[str, Any]) -> nn.Module:
    with _importing("torchvision", name):
        from torchvision import models
    _check_is_known("torchvision", name, models.list_models())
    weights = "DEFAULT" if pretrained else None
    return _of_library("torchvision", name, lambda: models.get_model(name, weights=weights, **keywords))


@contextmanager
def _importing(library: str, name: str) -> Iterator[None]:
    """Raises `InputError` if the package of a model's name is not installed, or does not fit the installed torch."""
    try:
        yield
    except Exception as error:  # compiled operators of another release of torch raise errors of many types
        if isinstance(error, ModuleNotFoundError) and error.name == library:
            raise missing_library(library, name) from error
        raise InputError(
            f"{library}:{name} needs the package {library}, but its import failed: {type(error).__name__}: "
            f"{first_line(error)}. Install the release of {library} that was made for torch {torch.__version__}."
        ) from error


def _check_is_known(library: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise OptionError(f"{library} has no model '{name}'.{did_you_mean(name, known)}")


def _of_library(library: str, name: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except Exception as error:  # wrong arguments and downloads raise errors of many types
        raise InputError(
            f"{library} cannot make '{name}': {type(error).__name__}: {first_line(error)}. If the pretrained weights "
            "cannot be downloaded, give a file as weights, or 'none' for random weights."
        ) from error


_MAKERS: Mapping[str, Callable[[str, bool, Mapping[str, Any]], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
}
"""The functions of `LIBRARIES`. A function gets the name, whether to load pretrained weights, and arguments."""
