"""The arguments of ExecuTorch's CPU kernels, from the schemas of their operators."""

from __future__ import annotations

import functools
from typing import Any

import torch

from openneutron.formats.pte import ValueKind
from openneutron.formats.pte_check import KernelSignature

__all__ = ["signature_of"]

_QUANTIZE = "quantized_decomposed::quantize_per_tensor.out"
_DEQUANTIZE = "quantized_decomposed::dequantize_per_tensor.out"
# Operators that ExecuTorch registers in torch only for export (exir/passes/dim_order_ops_registry.py,
# exir/passes/_quant_patterns_and_replacements.py, kernels/prim_ops).
_SCHEMAS = {
    schema.partition("(")[0]: schema.replace(".default(", "(", 1)  # torch writes the overload "default" as no overload
    for schema in (
        f"{_QUANTIZE}(Tensor input, float scale, int zero_point, int quant_min,"
        " int quant_max, ScalarType dtype, *, Tensor(a!) out) -> Tensor(a!)",
        f"{_DEQUANTIZE}(Tensor input, float scale, int zero_point, int quant_min,"
        " int quant_max, ScalarType dtype, *, ScalarType? out_dtype=None, Tensor(a!) out) -> Tensor(a!)",
        "quantized_decomposed::quantize_per_channel.out(Tensor input, Tensor scales, Tensor zero_points, int axis,"
        " int quant_min, int quant_max, ScalarType dtype, *, Tensor(a!) out) -> Tensor(a!)",
        "quantized_decomposed::dequantize_per_channel.out(Tensor input, Tensor scales, Tensor? zero_points, int axis,"
        " int quant_min, int quant_max, ScalarType dtype, *, ScalarType? out_dtype=None, Tensor(a!) out) -> Tensor(a!)",
        "dim_order_ops::_to_dim_order_copy.out(Tensor self, *, bool non_blocking=False, int[]? dim_order=None,"
        " Tensor(a!) out) -> Tensor(a!)",
        "dim_order_ops::_clone_dim_order.out(Tensor self, *, bool non_blocking=False, int[]? dim_order=None,"
        " Tensor(a!) out) -> Tensor(a!)",
        "dim_order_ops::_empty_dim_order.out(int[] size, *, int[]? dim_order=None, Tensor(a!) out) -> Tensor(a!)",
        "executorch_prim::et_view.default(Tensor self, int[] size, Tensor out) -> Tensor",
        "executorch_prim::et_copy_index.tensor(Tensor(a!) copy_to, Tensor to_copy, int index) -> Tensor(a!)",
    )
}

_NUMBERS = frozenset({ValueKind.INT, ValueKind.DOUBLE, ValueKind.BOOL})
# Kinds of values by the kinds of torch's types. The runtime stores enumerations such as dtypes as integers.
_KINDS: dict[str, frozenset[int]] = {
    "TensorType": frozenset({ValueKind.TENSOR}),
    "IntType": frozenset({ValueKind.INT}),
    "SymIntType": frozenset({ValueKind.INT}),
    "ScalarTypeType": frozenset({ValueKind.INT}),
    "MemoryFormatType": frozenset({ValueKind.INT}),
    "FloatType": frozenset({ValueKind.DOUBLE}),
    "BoolType": frozenset({ValueKind.BOOL}),
    "StringType": frozenset({ValueKind.STRING}),
    "NumberType": _NUMBERS,
}
_LIST_KINDS = {
    "TensorType": ValueKind.TENSOR_LIST,
    "OptionalType": ValueKind.OPTIONAL_TENSOR_LIST,
    "IntType": ValueKind.INT_LIST,
    "SymIntType": ValueKind.INT_LIST,
    "FloatType": ValueKind.DOUBLE_LIST,
    "BoolType": ValueKind.BOOL_LIST,
}


@functools.cache
def signature_of(name: str) -> KernelSignature | None:
    """Returns the signature of the kernel `name` ("aten::add.out"); None if its schema is unknown."""
    schema = _schema_of(name)
    if schema is None:
        return None
    kinds = [_kinds_of(argument.real_type) for argument in schema.arguments]
    if any(not kind for kind in kinds):
        return None
    written = (i for i, argument in enumerate(schema.arguments) if argument.is_write)
    return KernelSignature(tuple(kinds), frozenset(written), _quantized_argument(name, len(kinds)))


def _quantized_argument(name: str, count: int) -> int | None:
    """Returns the position of the integer tensor of a kernel that quantizes or dequantizes per tensor."""
    return {_QUANTIZE: count - 1, _DEQUANTIZE: 0}.get(name)


def _schema_of(name: str) -> Any:
    if name in _SCHEMAS:
        return torch._C.parse_schema(_SCHEMAS[name])
    space, _, operator = name.partition("::")
    operator, _, overload = operator.partition(".")
    packet = getattr(getattr(torch.ops, space), operator, None) if space == "aten" else None
    if not isinstance(packet, torch._ops.OpOverloadPacket) or (overload or "default") not in packet.overloads():
        return None
    return getattr(packet, overload or "default")._schema


def _kinds_of(kind: Any) -> frozenset[int]:
    """Returns the kinds of values that an argument of a torch type accepts; empty if the type is unknown."""
    name = kind.kind()
    if name == "OptionalType":
        inner = _kinds_of(kind.getElementType())
        return inner | {ValueKind.NULL} if inner else inner
    if name == "ListType":
        number = _LIST_KINDS.get(kind.getElementType().kind())
        return frozenset() if number is None else frozenset({number})
    return _KINDS.get(name, frozenset())
