"""JSON schemas of what the verbs print with `--json`, from the dataclasses of the results."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import inspect
import textwrap
import types
import typing
from itertools import pairwise
from typing import Any

from openneutron.accuracy.board_outputs import BoardValidation
from openneutron.ops.support import SupportedOperator
from openneutron.page import AccuracyRow, Summary
from openneutron.page.content import (
    AnalysisRows,
    LayerAccuracyRow,
    LayerRow,
    Memory,
    ProfileRows,
    RecurrentRow,
    TargetRow,
)
from openneutron.page.differences import Difference, Move
from openneutron.partition.placing import Placement
from openneutron.profiling import CostFit
from openneutron.recovery.recipes import Recipe
from openneutron.report.contents import Report
from openneutron.report.estimate import Estimate, Fit, LayerEstimate
from openneutron.report.runtime_memory import RuntimeMemory
from openneutron.results.layerwise_accuracy import LayerAccuracy, LayerwiseAccuracy, RecurrentAccuracy
from openneutron.results.validation import OutputDifference, Validation
from openneutron.targets import Board, NeutronTarget
from openneutron.workflow.runs import FileRun

Schema = dict[str, Any]
_COPIED_FROM = {
    AnalysisRows: (LayerwiseAccuracy,),
    LayerAccuracyRow: (LayerAccuracy,),
    RecurrentRow: (RecurrentAccuracy,),
    LayerRow: (LayerEstimate,),
    Memory: (RuntimeMemory, Estimate, Fit),
    TargetRow: (NeutronTarget,),
}
"""The dataclasses that the rows of a summary are copied from. A key of the same name has the same meaning."""
_EVERYWHERE = {
    "node": "Name of its node in the quantized graph.",
    "op": "Its ATen operator.",
    "module": "Name of the module of the model that calls it; None if unknown.",
    "source": "The line of the user's sources that calls it, as \"file:line\"; None if unknown.",
}
"""The meanings of keys without a text of their own, in all results."""
_PLAIN: dict[Any, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    # Infinite numbers are null.
    float: {"type": ["number", "null"]},
    type(None): {"type": "null"},
    Any: {},
}


def schema_of(kind: Any) -> Schema:
    """Returns the schema of a type: a plain type, a union, a tuple, a mapping or a dataclass."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints, meanings = typing.get_type_hints(kind), meanings_of(kind)
        found = {field.name: schema_of(hints[field.name]) for field in dataclasses.fields(kind)}
        described = {name: a_key(one, meanings.get(name, "")) for name, one in found.items()}
        first = (inspect.getdoc(kind) or "").partition("\n\n")[0]
        # A key with this type adds its own description, so the description of the type needs another name.
        return {"title": kind.__name__, "$comment": " ".join(first.split()), **an_object(described)}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [schema_of(one) for one in arguments]}
    if origin is tuple and arguments[-1] is not Ellipsis:
        return {"type": "array", "prefixItems": [schema_of(one) for one in arguments], "minItems": len(arguments)}
    if origin in (tuple, list, frozenset, collections.abc.Sequence):
        return a_list(schema_of(arguments[0]))
    if origin in (dict, collections.abc.Mapping):
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    if isinstance(kind, type) and issubclass(kind, int):  # an IntEnum
        return {"type": "integer"}
    raise TypeError(f"no schema of {kind!r}")


def a_key(schema: Schema, meaning: str) -> Schema:
    """Returns the schema with this meaning in place of its own."""
    return {**schema, "description": meaning}


def meanings_of(kind: Any) -> dict[str, str]:
    """Returns the meanings of the fields of a dataclass: those of its own texts, of its source, and of all results."""
    sources = [_texts_of(one) for one in (kind, *_COPIED_FROM.get(kind, ()))]
    return {name: text for texts in (_EVERYWHERE, *reversed(sources)) for name, text in texts.items()}


def _texts_of(kind: Any) -> dict[str, str]:
    """Returns the texts below the fields of a dataclass, by the names of the fields."""
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    body = declared.body if isinstance(declared, ast.ClassDef) else []
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }  # fmt: skip


def an_object(properties: dict[str, Schema]) -> Schema:
    """Returns the schema of an object that has these keys and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def a_list(items: Schema) -> Schema:
    """Returns the schema of a list."""
    return {"type": "array", "items": items}


def _text(meaning: str) -> Schema:
    return a_key(_PLAIN[str], meaning)


def _number(meaning: str) -> Schema:
    return a_key(_PLAIN[int], meaning)


def _truth(meaning: str) -> Schema:
    return a_key(_PLAIN[bool], meaning)


def _rows(kind: Any, meaning: str) -> Schema:
    return a_key(a_list(schema_of(kind)), meaning)


def _texts(meaning: str) -> Schema:
    return a_key(a_list(_PLAIN[str]), meaning)


def _with(kind: Any, properties: dict[str, Schema]) -> Schema:
    """Returns the schema of a dataclass with more keys."""
    found = schema_of(kind)
    return {**found, **an_object({**found["properties"], **properties})}


_FILE = _text("Path of the file that was written.")
_BYTES = _number("Size of the file.")
_TARGET = _text("Name of the target.")
_PASSED = _truth("Whether all limits hold.")
_MACS = _number("Multiply-accumulates of the NPU.")

_VALUES = a_list({
    **an_object({
        "name": _text("Its name."),
        "dtype": _text('Its dtype, such as "float32"; the type of a value that is not a tensor.'),
        "shape": a_key(a_list(_PLAIN[int]), "Its shape."),
        "value": a_key(
            _PLAIN[Any],
            'The value, if it is not a tensor, with "inf", "-inf" and "nan" for numbers that are not finite. None for '
            "a tensor.",
        ),
    }),
    "title": "InputOrOutput",
    "$comment": "One input or output of a model or a program.",
})  # fmt: skip

SCHEMAS: dict[str, Schema] = {
    "build": _with(Summary, {
        "format_version": _number("Version of the format of `summary.json`."), "macs": _MACS,
    }),
    "quantize": an_object({
        "file": _FILE, "target": _TARGET,
        "int8_operators": _number("Number of operators in int8."),
        "operators": _number("Number of all operators."),
        "inputs": a_key(_VALUES, "The inputs of the model."),
        "recipe": a_key({"anyOf": [schema_of(Recipe), _PLAIN[type(None)]]}, "The methods that recovered accuracy."),
    }),
    "lower": an_object({
        "file": _FILE, "bytes": _BYTES, "target": _TARGET,
        "is_device": _truth("Whether the program contains microcode, and runs on the board only."),
        "on_npu": _number("Number of operators on the NPU."),
        "on_cpu": _number("Number of operators on the CPU."),
        "delegates": _number("Number of delegates."),
        "inputs": a_key(_VALUES, "The inputs of the program."),
        "outputs": a_key(_VALUES, "The outputs of the program."),
        "placement": _rows(Placement, "Where each operator runs, in graph order."),
    }),
    "analyze": schema_of(AnalysisRows),
    "run": an_object({"runs": _rows(FileRun, "The runs, in the order of the files.")}),
    "evaluate": an_object({"accuracy": _rows(AccuracyRow, "The accuracy of each form of the model.")}),
    "validate": _with(Validation, {"passed": _PASSED}),
    "validate --against": _with(BoardValidation, {"passed": _PASSED}),
    "report": {
        **an_object({
            "file": _FILE, "verdict": _text("The verdict in one sentence."),
            "csv": _text("Path of the file with one row for each layer; only with `--csv`."),
        }),
        "required": ["file", "verdict"],
    },
    "compare": an_object({
        "differences": a_key(a_list(_with(Difference, {
            "change": a_key(_PLAIN[float], "This minus other; None if one of them is unknown."),
            "text": _text("The change with its unit, and in percent for sizes and times."),
        })), "The numbers of both programs."),
        "moves": _rows(Move, "The operators that run elsewhere in the second program, or that only one has."),
        "outputs": _rows(OutputDifference, "The differences of the outputs on the same inputs."),
    }),
    "inspect": _with(Report, {
        "scratch_bytes": _number("Memory for the intermediate tensors of the NPU."),
        "weight_bytes": _number("Bytes of the constants in the NPU's format."),
        "cycles": a_key(_PLAIN[float], "Estimated cycles of the NPU; None if a delegate is compiled."),
        "macs": _MACS,
    }),
    "profile": _with(ProfileRows, {
        "cycles": _number("The measured cycles of all kernels."),
        "estimated": _number("The estimated cycles of the operators whose kernels are known."),
    }),
    "fit-costs": _with(CostFit, {"file": _FILE}),
    "extract": an_object({"files": _texts("Paths of the files that were written.")}),
    "operators": an_object({"operators": _rows(SupportedOperator, "The operators that run on the NPU.")}),
    "targets": an_object({
        "targets": _rows(NeutronTarget, "The chips."),
        "boards": _rows(Board, "The boards."),
        "converters": _texts("Versions of NXP's converter that are installed."),
    }),
    "targets show": _with(NeutronTarget, {"assumptions": _texts("What the estimates assume of the NPU's array.")}),
    "targets show --output": an_object({"file": _FILE}),
    "package": an_object({
        "folder": _text("Path of the package."),
        "files": _texts("Paths of its files."),
        "payload": _text('"portable", "device" (microcode) or "no delegates".'),
        "vectors": _number("Number of test vectors."),
    }),
    "compile": an_object({
        "file": _FILE, "bytes": _BYTES, "device_payloads": _number("Number of payloads with microcode in the file."),
    }),
    "doctor": an_object({
        "passed": _truth("Whether every check passed."),
        "report": _text("The report, as text."),
    }),
    "init": an_object({"file": _FILE}),
}  # fmt: skip
"""The schema of each verb, and of forms of it that print another document."""
