"""Converts errors of torch.export to typed errors that say what to change in the model."""

from __future__ import annotations

import re

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from openneutron.core.boundary import frame_of_user
from openneutron.core.fx import is_library
from openneutron.core.messages import as_sentence, first_line
from openneutron.errors import ModelError

__all__ = ["export_error", "has_control_flow", "source_line"]

_DATA_DEPENDENT = re.compile(r"data[- ]dependent|dynamic control flow", re.IGNORECASE)
_SCAN_ON_CPU = re.compile(r"combine_mode='pointwise'")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_DATA_DEPENDENCE = (
    "The model uses the values of a tensor for a branch, a loop, a size or a number (.item()), but a program runs "
    "the same operators for all inputs. Compute both branches and select with torch.where, or decide outside of "
    "the model. A number that depends on buffers alone can be computed once, in __init__."
)
_SCAN = (
    "The control flow of torch.associative_scan is not exported on a CPU. Unroll it to a fixed number of "
    "steps, or write the scan with cumsum or a matrix product."
)
_KEPT_INPUT = (
    "torch.export does not support a model that assigns an input or a buffer to another buffer without a "
    "copy (self.last = x). Write the value to the buffer instead: self.last.copy_(x)."
)
_NUMPY = (
    "The model converts a tensor to a numpy array, and torch.export records only operators of torch. Compute this with "
    "torch, or outside of the model."
)
_PACKED = (
    "The model uses the values of a tensor as a size, as pack_padded_sequence does, but a program has fixed shapes. "
    "Give the padded sequences to the recurrent layer, and mask its outputs with torch.where."
)
_OUTPUT = (
    "The model returns a {0}, which torch.export does not support. Return tensors, also in tuples, lists, dicts, named "
    "tuples or dataclasses."
)
_TRUTH_VALUE = (
    "The model calls {0} on tensors, whose result depends on their values (torch.cov and torch.corrcoef call it "
    "inside), but a program runs the same operators for all inputs. Write the comparison with torch.isclose, "
    "and the covariance with products: x = x - x.mean(1, keepdim=True); x @ x.T / (x.shape[1] - 1)."
)
_RESULT = (
    "torch.export does not support the operator {0}, because its result depends on the values of a tensor. Compute it "
    "outside of the model; a program needs no losses and metrics."
)
_SHAPE = (
    "A shape in the model depends on the values of a tensor (torch.combinations, a mask as index, nonzero, unique), "
    "and the NPU runs static shapes only. Select values with constant indices, such as those of torch.triu_indices, or "
    "compute with torch.where over the whole tensor."
)
_SPARSE = (
    "torch.export does not support sparse tensors in this model. Compute with dense tensors: call to_dense() before "
    "the export."
)
_CAUSES = (
    (re.compile(r"\Aaten\.(equal|allclose)\.\w+\s*(?:\n|\Z)"), _TRUTH_VALUE),
    (re.compile(r"\A(aten\.\w+\.\w+)\s*(?:\n|\Z)"), _RESULT),
    (re.compile(r"Pending unbacked symbols"), _SHAPE),
    (re.compile(r"Sparse \w+ tensors do not have strides"), _SPARSE),
    (_SCAN_ON_CPU, _SCAN),
    (re.compile(r"copy__default\w* of type call_function is missing nn_module_stack"), _KEPT_INPUT),
    (re.compile(r"\.numpy\(\) is not supported"), _NUMPY),
    (re.compile(r"must be tuple of ints,\s?but got FakeTensor"), _PACKED),
    (re.compile(r"Found <class '(?:builtins\.)?([\w.]+)'> in output, which is not a known type"), _OUTPUT),
)
"""Texts of torch's errors, and the message for each. "{0}" becomes the first group of the pattern."""


def has_control_flow(error: Exception) -> bool:
    """Whether torch.export failed because of a branch, a loop, a size or a number that depends on a tensor's values."""
    guards = isinstance(error, GuardOnDataDependentSymNode) or isinstance(error.__cause__, GuardOnDataDependentSymNode)
    return guards or bool(_DATA_DEPENDENT.search(first_line(error)) or _SCAN_ON_CPU.search(str(error)))


def export_error(error: Exception, above: str) -> ModelError:
    """Returns the typed error for an error of torch.export. `above` is the file of the caller of torch.export."""
    return ModelError(_message(error), source=source_line(error, above))


def _message(error: Exception) -> str:
    for pattern, message in _CAUSES:
        if (found := pattern.search(str(error))) is not None:
            return message.format(*found.groups())
    if has_control_flow(error):
        return _DATA_DEPENDENCE
    return (
        f"torch.export does not support this model: {as_sentence(first_line(error))} Write this part of the model with "
        "operators that torch.export supports, or compute it outside of the model."
    )


def source_line(error: Exception, above: str) -> str | None:
    """Returns the user's line in an error of torch.export: from the traceback, or from the text of the error.

    A strict export writes the line into the text. The first frames are skipped: they belong to the file `above` and to
    the caller of quantize().
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == above:
        traceback = traceback.tb_next
    frames = [f"{file}:{line}" for file, line in _FRAME.findall(str(error)) if not is_library(file)]
    return frame_of_user(traceback) or (frames[-1] if frames else None)
