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
from openneutron.page.content import AnalysisRows, ProfileRows
from openneutron.page.differences import Difference, Move
from openneutron.profiling import CostFit
from openneutron.report.contents import Report
from openneutron.results.validation import OutputDifference, Validation
from openneutron.targets import Board, NeutronTarget
from openneutron.workflow.runs import FileRun

Schema = dict[str, Any]
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
    if dataclasses.is_dataclass(kind):
        hints, meanings = typing.get_type_hints(kind), _meanings(kind)
        found = {field.name: schema_of(hints[field.name]) for field in dataclasses.fields(kind)}
        return an_object({
            name: {**one, "description": meanings[name]} if name in meanings else one for name, one in found.items()
        })
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


def _meanings(kind: Any) -> dict[str, str]:
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


TEXT, NUMBER, TRUTH = _PLAIN[str], _PLAIN[int], _PLAIN[bool]


def _summary() -> Schema:
    found = schema_of(Summary)
    properties = {**found["properties"], "format_version": NUMBER}
    return {**found, "properties": properties, "required": list(properties)}


def _report() -> Schema:
    sums = {"scratch_bytes": NUMBER, "weight_bytes": NUMBER, "cycles": _PLAIN[float]}
    return an_object({**schema_of(Report)["properties"], **sums})


def _validation() -> Schema:
    return an_object({**schema_of(Validation)["properties"], "passed": TRUTH})


SCHEMAS: dict[str, Schema] = {
    "build": _summary(),
    "quantize": an_object({"file": TEXT, "target": TEXT}),
    "lower": an_object({
        "file": TEXT, "bytes": NUMBER, "target": TEXT, "is_device": TRUTH, "on_npu": NUMBER, "on_cpu": NUMBER,
    }),
    "analyze": schema_of(AnalysisRows),
    "run": an_object({"runs": a_list(schema_of(FileRun))}),
    "evaluate": an_object({"accuracy": a_list(schema_of(AccuracyRow))}),
    "validate": _validation(),
    "validate --against": an_object({**schema_of(BoardValidation)["properties"], "passed": TRUTH}),
    "report": {**an_object({"file": TEXT, "verdict": TEXT, "csv": TEXT}), "required": ["file", "verdict"]},
    "compare": an_object({
        "differences": a_list(schema_of(Difference)),
        "moves": a_list(schema_of(Move)),
        "outputs": a_list(schema_of(OutputDifference)),
    }),
    "inspect": _report(),
    "profile": an_object({**schema_of(ProfileRows)["properties"], "cycles": NUMBER, "estimated": NUMBER}),
    "fit-costs": an_object({"file": TEXT, **schema_of(CostFit)["properties"]}),
    "extract": an_object({"files": a_list(TEXT)}),
    "operators": an_object({"operators": a_list(schema_of(SupportedOperator))}),
    "targets": an_object({
        "targets": a_list(schema_of(NeutronTarget)), "boards": a_list(schema_of(Board)), "converters": a_list(TEXT),
    }),
    "targets show": schema_of(NeutronTarget),
    "targets show --output": an_object({"file": TEXT}),
    "package": an_object({"folder": TEXT, "files": a_list(TEXT), "payload": TEXT, "vectors": NUMBER}),
    "compile": an_object({"file": TEXT, "bytes": NUMBER, "device_payloads": NUMBER}),
    "doctor": an_object({"passed": TRUTH, "report": TEXT}),
    "init": an_object({"file": TEXT}),
}  # fmt: skip
"""The schema of each verb, and of forms of it that print another document."""
