"""Checks the texts that name a model, without importing torch."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openneutron.core.files import exists, is_file, is_folder
from openneutron.core.objects import parse_reference
from openneutron.errors import InputError, ModelError, OptionError

__all__ = [
    "LIBRARIES", "MODEL_FILES", "arguments_in", "check_library", "check_model", "is_model_file", "missing_library",
]  # fmt: skip

LIBRARIES = ("timm", "torchvision")
"""The packages whose models have names, such as "timm:resnet18"."""

MODEL_FILES = (".pt2", ".pt", ".pth", ".jit", ".ts", ".torchscript")
"""The suffixes of files of models: of torch.export, and of TorchScript."""
_ADVICE: Mapping[str, str] = {
    ".pte": "It is a program already. Give the model that it was made of: file.py:name, or a file of torch.export "
    "(.pt2).",
    ".safetensors": "It contains weights and no model. Give the model as file.py:name, and this file as --weights.",
}
_SHOWN = 200
"""The number of characters of a wrong text that a message shows."""
_OTHER_FILE = "Give file.py:name of a class or function, or a file of torch.export (.pt2)."


def is_model_file(model: str) -> bool:
    """Whether a text names a file, and not an object in a file of Python or in a package."""
    return bool(Path(model).suffix) and not model.rpartition(":")[0].endswith(".py") and exists(model)


def check_model(model: str) -> None:
    """Checks the text that names a model, as far as that is possible without loading the model.

    Raises `OptionError` for a text of an unknown form, `ModelError` for a file of another kind, and `InputError` for a
    package that is not installed.
    """
    library, _, name = model.partition(":")
    if library in LIBRARIES:
        if not name:
            raise OptionError(f"The model '{model}' names a package, but no model in it. Give {library}:NAME.")
        check_library(library, name)
        return
    if not is_model_file(model) or model.endswith(".py"):
        module = parse_reference(model, "The model").module
        if module is not None and is_folder(module) and not is_file(Path(module, "__init__.py")):
            raise ModelError(f"The model '{model}' is in '{module}', a folder without __init__.py. {_OTHER_FILE}")
        return
    path = Path(model)
    if is_folder(path):
        raise ModelError(f"The model '{model}' is a folder. {_OTHER_FILE}")
    if path.suffix not in MODEL_FILES:
        raise ModelError(f"'{model}' is not a model. {_ADVICE.get(path.suffix, _OTHER_FILE)}")


def check_library(library: str, name: str) -> None:
    """Raises `InputError` if the package of a model's name, such as "timm:resnet18", is not installed."""
    if library not in sys.modules and importlib.util.find_spec(library) is None:
        raise missing_library(library, name)


def missing_library(library: str, name: str) -> InputError:
    """Returns the error of a model whose package is not installed."""
    return InputError(f"{library}:{name} needs the package {library}: pip install {library}.")


def arguments_in(text: str) -> tuple[list[Any], dict[str, Any]]:
    """Returns the positional and keyword arguments in a text, such as "16, classes=10".

    Each argument is a literal of Python. Raises `OptionError` for any other text.
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):  # "1)(2" closes the call early
            raise _no_arguments(text)
        positional = [ast.literal_eval(one) for one in call.args]
        keywords = {one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg is not None}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:  # the last two: nested too deep
        raise _no_arguments(text) from error
    if len(keywords) != len(call.keywords):
        raise _no_arguments(text)
    return positional, keywords


def _no_arguments(text: str) -> OptionError:
    shown = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
    return OptionError(f"args takes literals of Python, such as \"width=16, kind='small'\", not {shown}.")
