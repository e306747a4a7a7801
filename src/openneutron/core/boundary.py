"""Converts errors of torch, torchao and ExecuTorch into errors of OpenNeutron at its public functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from torch.fx import Node

from openneutron.core.fx import is_library, op_name, source_of
from openneutron.core.messages import first_line
from openneutron.core.user_code import line_of_user
from openneutron.errors import ModelError, OpenNeutronError

__all__ = ["error_at", "frame_of_user", "typed_errors"]

Error = TypeVar("Error", bound=OpenNeutronError)
# Names of the local variable that holds the current node in loops over graphs, in torch and here.
_NODE_NAMES = ("node", "n")


@contextmanager
def typed_errors(step: str, kind: type[OpenNeutronError] = ModelError) -> Iterator[None]:
    """Converts exceptions in the block to errors of `kind`, which name the `step` and, if known, the node.

    Without a node, they name the user's line, if code of the user raised the exception. Errors of OpenNeutron, raised
    warnings and `MemoryError` pass unchanged. The original exception is the cause of the new one.
    """
    try:
        yield
    except (OpenNeutronError, Warning, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        node = _node_of(error.__traceback__)
        message = f"{step} failed: {type(error).__name__}: {first_line(error)}{_advice(error, kind)}"
        if node is None:
            raise kind(message, source=line_of_user(error.__traceback__)) from error
        raise error_at(node, message, kind) from error


def _advice(error: BaseException, kind: type[OpenNeutronError]) -> str:
    """Returns what to do about an index of the data that is out of range; an empty text for another error."""
    if not isinstance(error, IndexError) or kind is ModelError:
        return ""
    return (
        ". An index in the inputs is negative or not smaller than the size of the dimension that it selects from, such "
        "as the number of rows of an embedding. Check the integers in the data."
    )


def error_at(node: Node, message: str, kind: type[Error] = ModelError) -> Error:  # type: ignore[assignment]
    """Returns an error of `kind` about `node`, with its operator and the user's source line."""
    return kind(message, node=node.name, op=op_name(node), source=source_of(node))


def _node_of(traceback: TracebackType | None) -> Node | None:
    """Returns the current node of the innermost loop over a graph; None if no frame of `traceback` has one."""
    found: Node | None = None
    while traceback is not None:
        values: dict[str, Any] = traceback.tb_frame.f_locals
        nodes = [values[name] for name in _NODE_NAMES if isinstance(values.get(name), Node)]
        found = nodes[0] if nodes else found
        traceback = traceback.tb_next
    return found


def frame_of_user(traceback: TracebackType | None) -> str | None:
    """Returns "file:line" of the innermost frame outside torch, torchao, ExecuTorch and OpenNeutron."""
    found = None
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not is_library(file):
            found = f"{file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found
