"""torchvision's networks, where it is installed; of its compiled operators none is needed."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

__all__ = ["MissingTorchvisionError", "torchvision_models"]

# What torchvision's import looks up; its binary defines them, and that loads only with the torch it was built against.
_WANTED = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
           "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # fmt: skip


class MissingTorchvisionError(ImportError):
    """A network is torchvision's, which is not installed."""


@cache
def torchvision_models() -> Any:
    """The module `torchvision.models`. Raises `MissingTorchvisionError`."""
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
    """Declare what its import wants; cached, as declarations go with their library."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _WANTED:
        library.define(schema)  # type: ignore[no-untyped-call]
    return library
