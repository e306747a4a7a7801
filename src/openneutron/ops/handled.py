"""Declarations of operators without a lowering: passes replace or remove them, or the CPU computes them."""

from __future__ import annotations

from openneutron.ops.facts import Facts, Movement
from openneutron.ops.spec import HandledOperator

__all__ = ["HANDLED"]


def _overloads(*names: str, overloads: tuple[str, ...] = ("Tensor", "Scalar")) -> tuple[str, ...]:
    return tuple(f"aten.{name}.{overload}" for name in names for overload in overloads)


_MASK = Facts(computes_masks=True)

HANDLED = (
    HandledOperator(
        "batch_norm", ("aten.batch_norm.default",), Facts(is_continuous=True, training_argument="training")
    ),
    HandledOperator("convolution of any dimensions", ("aten.convolution.default",)),
    HandledOperator(
        "dropout of another kind",
        ("aten.alpha_dropout.default", "aten.feature_alpha_dropout.default"),
        Facts(training_argument="train"),
    ),
    HandledOperator(
        "identity of real numbers",
        tuple(
            f"aten.{name}.default"
            for name in ("positive", "real", "conj", "_conj", "conj_physical", "resolve_conj", "resolve_neg")
        ),
    ),
    HandledOperator("reshape with strides", ("aten._reshape_alias.default",), Facts(movement=Movement.RESHAPE)),
    HandledOperator("erf", ("aten.erf.default",)),
    HandledOperator("product with a sparse matrix", ("aten._sparse_mm.default",)),
    HandledOperator(
        "conversion of the layout",
        (
            "aten.to_dense.default",
            "aten._to_dense.default",
            "aten.coalesce.default",
            "aten._coalesce.default",
            "aten.to_sparse.default",
            "aten.to_sparse.sparse_dim",
            "aten.to_sparse_csr.default",
            "aten.to_sparse_csc.default",
        ),
    ),
    HandledOperator("assertion", ("aten._assert_tensor_metadata.default",)),
    HandledOperator("assertion of a number", ("aten._assert_scalar.default",)),
    HandledOperator("embedding", ("aten.embedding.default",)),
    HandledOperator("clip of embeddings", ("aten.embedding_renorm_.default",)),
    HandledOperator("copy_", ("aten.copy_.default",)),
    HandledOperator("fill_", ("aten.fill_.Tensor",)),
    HandledOperator("fill_diagonal_", ("aten.fill_diagonal_.default",)),
    HandledOperator("zero_", ("aten.zero_.default",)),
    HandledOperator("selection by truth values", ("aten.index.Tensor", "aten.masked_select.default")),
    HandledOperator("comparison", _overloads("eq", "ne", "lt", "le", "gt", "ge"), _MASK),
    HandledOperator(
        "logic",
        (
            *_overloads(
                "logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_not", overloads=("default",)
            ),
            *_overloads("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__"),
        ),
        _MASK,
    ),
    HandledOperator("any, all", _overloads("any", "all", overloads=("dim",)), _MASK),
    HandledOperator(
        "constant of a shape",
        _overloads("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", overloads=("default",)),
        Facts(computes_masks=True, reads_values=False),
    ),
    HandledOperator("fill", ("aten.fill.Scalar",), Facts(reads_values=False)),
)
