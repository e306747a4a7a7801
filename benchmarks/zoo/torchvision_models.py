"""torchvision's networks, if it is installed. Its compiled operators are not needed."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

__all__ = ["MissingTorchvisionError", "torchvision_models"]

# Operators that torchvision's import looks up. torchvision's binary defines them, but loads only with the torch version
# it was built for.
_WANTED = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
           "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # fmt: skip


class MissingTorchvisionError(ImportError):
    """A network needs torchvision, which is not installed."""


@cache
def torchvision_models() -> Any:
    """Return the module `torchvision.models`. Raises `MissingTorchvisionError` if torchvision is not installed."""
    try:
        return importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        raise MissingTorchvisionError(
            "torchvision is missing. `make suite` and `make test` install it; by hand, `pip install --no-deps "
            "torchvision==0.28.0`."
        ) from error
    except RuntimeError:  # an operator does not exist
        _declare()
        return importlib.import_module("torchvision.models")


@cache
def _declare() -> torch.library.Library:
    """Declare the operators for torchvision's import. Cached, because deleting the library removes the declarations."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _WANTED:
        library.define(schema)  # type: ignore[no-untyped-call]
    return library
