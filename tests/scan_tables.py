"""Tables of the scan of torch: each public function of torch.nn.functional, and of torch with an ATen operator.

A row is a call that must run, or must be refused by name. Functions without a row are in a set that says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "CALLED_BY_MODULES", "FUNCTIONAL", "FUNCTIONAL_WITHOUT_ROW", "REFUSED_FIRST", "RUN_NOWHERE", "TORCH",
    "TORCH_WITHOUT_ROW", "Row",
]  # fmt: skip

Row = tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]
"""A function, and the shapes of its inputs."""


def names(text: str) -> set[str]:
    """Returns the names in a text that separates them by spaces."""
    return set(text.split())


aten = torch.ops.aten
ROW, LINE, IMAGE, VOLUME, SQUARE = (2, 8), (1, 4, 16), (1, 4, 8, 8), (1, 2, 4, 6, 6), (1, 4, 4)
INDEX, COLUMNS = torch.tensor([[1, 0], [3, 2]]), torch.tensor([1, 0, 3])
MASK = torch.tensor([True, False, True, True, False, False, True, False])
GRID = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 4), indexing="ij"), -1)[None]

FUNCTIONAL: dict[str, Row] = {
    "max_pool1d_with_indices": (lambda x: F.max_pool1d_with_indices(x, (2,))[0], (LINE,)),
    "max_pool2d_with_indices": (lambda x: F.max_pool2d_with_indices(x, (2, 2))[0], (IMAGE,)),
    "max_pool3d_with_indices": (lambda x: F.max_pool3d_with_indices(x, (2, 2, 2))[0], (VOLUME,)),
    "adaptive_max_pool1d_with_indices": (lambda x: F.adaptive_max_pool1d_with_indices(x, (2,))[0], (LINE,)),
    "adaptive_max_pool2d_with_indices": (lambda x: F.adaptive_max_pool2d_with_indices(x, 2)[0], (IMAGE,)),
    "adaptive_max_pool3d_with_indices": (lambda x: F.adaptive_max_pool3d_with_indices(x, 2)[0], (VOLUME,)),
    "fractional_max_pool2d_with_indices": (
        lambda x: F.fractional_max_pool2d_with_indices(x, (2, 2), (3, 3))[0], (IMAGE,),
    ),
    "fractional_max_pool3d_with_indices": (
        lambda x: F.fractional_max_pool3d_with_indices(x, (2, 2, 2), (2, 2, 2))[0], (VOLUME,),
    ),
    "dropout": (lambda x: F.dropout(x, training=False), (ROW,)),
    "dropout1d": (lambda x: F.dropout1d(x, training=False), (LINE,)),
    "dropout2d": (lambda x: F.dropout2d(x, training=False), (IMAGE,)),
    "dropout3d": (lambda x: F.dropout3d(x, training=False), (VOLUME,)),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, training=False), (ROW,)),
    "feature_alpha_dropout": (lambda x: F.feature_alpha_dropout(x, training=False), (LINE,)),
    "gumbel_softmax": (F.gumbel_softmax, (ROW,)),
    "glu": (F.glu, (ROW,)),
    "native_channel_shuffle": (lambda x: F.native_channel_shuffle(x, 2), (IMAGE,)),
    "upsample": (lambda x: F.upsample(x, scale_factor=2), (IMAGE,)),
    "interpolate": (lambda x: F.interpolate(x, size=(5, 12), mode="bilinear"), (IMAGE,)),
    "upsample_nearest": (lambda x: F.upsample_nearest(x, scale_factor=2), (IMAGE,)),
    "upsample_bilinear": (lambda x: F.upsample_bilinear(x, scale_factor=2), (IMAGE,)),
    "grid_sample": (lambda x: F.grid_sample(x, GRID, align_corners=False), (IMAGE,)),
    "affine_grid": (lambda x: F.affine_grid(x, [1, 1, 4, 4], align_corners=False), ((1, 2, 3),)),
    "pad": (lambda x: F.pad(x, (1, 2), "reflect"), (LINE,)),
    "pdist": (F.pdist, (ROW,)),
    "one_hot": (lambda x: F.one_hot(x.argmax(1), 8) * 0.5, (ROW,)),
    "embedding": (lambda x: F.embedding((x > 0).long(), torch.tensor([[1.0, 2.0], [3.0, 0.5]])), (ROW,)),
    "embedding_bag": (lambda x: F.embedding_bag((x > 0).long(), torch.tensor([[1.0, 2.0], [3.0, 0.5]])), (ROW,)),
    "rms_norm": (lambda x: F.rms_norm(x, (8,)), (ROW,)),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention, (SQUARE, SQUARE, SQUARE)),
    "sigmoid": (F.sigmoid, (ROW,)),
    "tanh": (F.tanh, (ROW,)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (IMAGE,)),
}  # fmt: skip

CALLED_BY_MODULES = names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d avg_pool3d "
    "max_pool1d max_pool2d max_pool3d max_unpool1d max_unpool2d max_unpool3d lp_pool1d lp_pool2d lp_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d fractional_max_pool2d fractional_max_pool3d relu prelu linear bilinear batch_norm "
    "instance_norm layer_norm group_norm local_response_norm pixel_unshuffle channel_shuffle pairwise_distance "
    "cosine_similarity unfold fold multi_head_attention_forward"
)
"""Functions of torch.nn.functional that a module of the scan of torch.nn calls."""

FUNCTIONAL_WITHOUT_ROW: dict[str, str] = {
    "losses, which a program does not compute": (
        "ctc_loss nll_loss poisson_nll_loss gaussian_nll_loss kl_div cross_entropy binary_cross_entropy "
        "binary_cross_entropy_with_logits linear_cross_entropy smooth_l1_loss huber_loss l1_loss mse_loss "
        "margin_ranking_loss hinge_embedding_loss multilabel_margin_loss soft_margin_loss multilabel_soft_margin_loss "
        "cosine_embedding_loss multi_margin_loss triplet_margin_loss triplet_margin_with_distance_loss"
    ),
    "helpers of torch without an operator": (
        "boolean_dispatch handle_torch_function has_torch_function has_torch_function_unary "
        "has_torch_function_variadic assert_int_or_pair"
    ),
    "have cases in a table tests/*_cases.py": "conv_tbc",
    "products of low precision on GPUs": "grouped_mm scaled_mm scaled_grouped_mm",
}

TORCH: dict[str, Row] = {
    "affine_grid_generator": (lambda x: torch.affine_grid_generator(x, [1, 1, 4, 4], False), ((1, 2, 3),)),
    "alpha_dropout": (lambda x: torch.alpha_dropout(x, 0.5, False), (ROW,)),
    "conj": (torch.conj, (ROW,)),
    "conj_physical": (torch.conj_physical, (ROW,)),
    "embedding": (lambda x: torch.embedding(torch.tensor([[1.0, 2.0], [3.0, 0.5]]), (x > 0).long()), (ROW,)),
    "feature_alpha_dropout": (lambda x: torch.feature_alpha_dropout(x, 0.5, False), (LINE,)),
    "fill": (lambda x: torch.fill(x, 0.5) + x, (ROW,)),
    "float_power": (lambda x: torch.float_power(x, 2), (ROW,)),
    "hash_tensor": (torch.hash_tensor, (ROW,)),
    "logical_not": (torch.logical_not, (ROW,)),
    "positive": (torch.positive, (ROW,)),
    "real": (torch.real, (ROW,)),
    "resolve_conj": (torch.resolve_conj, (ROW,)),
    "resolve_neg": (torch.resolve_neg, (ROW,)),
    "addr": (lambda x: torch.addr(x[0], x[0, 0], x[0, 1]), (SQUARE,)),
    "alias_copy": (torch.alias_copy, (ROW,)),
    "allclose": (torch.allclose, (ROW, ROW)),
    "aminmax": (lambda x: torch.aminmax(x, dim=1)[0], (ROW,)),
    "any": (lambda x: torch.any(x > 0), (ROW,)),
    "argmin": (lambda x: torch.argmin(x, 1), (ROW,)),
    "argsort": (lambda x: torch.argsort(x, 1), (ROW,)),
    "argwhere": (torch.argwhere, (ROW,)),
    "as_strided": (lambda x: torch.as_strided(x, (2, 2), (8, 1)), (ROW,)),
    "as_strided_copy": (lambda x: torch.as_strided_copy(x, (2, 2), (8, 1)), (ROW,)),
    "atleast_1d": (torch.atleast_1d, (ROW,)),
    "atleast_2d": (torch.atleast_2d, (ROW,)),
    "atleast_3d": (torch.atleast_3d, (ROW,)),
    "bincount": (lambda x: torch.bincount((x[0] > 0).long(), minlength=2), (ROW,)),
    "bitwise_and": (lambda x: torch.bitwise_and(x > 0, x < 1), (ROW,)),
    "bitwise_left_shift": (lambda x: torch.bitwise_left_shift(x.to(torch.int32), 1), (ROW,)),
    "bitwise_not": (lambda x: torch.bitwise_not(x > 0), (ROW,)),
    "bitwise_or": (lambda x: torch.bitwise_or(x > 0, x < 1), (ROW,)),
    "bitwise_right_shift": (lambda x: torch.bitwise_right_shift(x.to(torch.int32), 1), (ROW,)),
    "bitwise_xor": (lambda x: torch.bitwise_xor(x > 0, x < 1), (ROW,)),
    "block_diag": (lambda x: aten.block_diag.default([x[0], x[0]]), (SQUARE,)),
    "cartesian_prod": (lambda x: torch.cartesian_prod(x[0], x[1]), (ROW,)),
    "cholesky": (lambda x: torch.cholesky(x @ x.mT + 4 * torch.eye(4)), (SQUARE,)),
    "cholesky_inverse": (torch.cholesky_inverse, (SQUARE,)),
    "cholesky_solve": (lambda x: torch.cholesky_solve(x, x), (SQUARE,)),
    "combinations": (lambda x: torch.combinations(x[0]), (ROW,)),
    "complex": (lambda x, y: torch.complex(x, y).abs(), (ROW, ROW)),
    "convolution": (
        lambda x: torch.convolution(x, torch.ones(2, 4, 3) * 0.1, None, [1], [0], [1], False, [0], 1), (LINE,),
    ),
    "corrcoef": (torch.corrcoef, (ROW,)),
    "count_nonzero": (torch.count_nonzero, (ROW,)),
    "cov": (torch.cov, (ROW,)),
    "cross": (lambda x: torch.cross(x[:, :3], x[:, 3:6], dim=1), (ROW,)),
    "cumulative_trapezoid": (torch.cumulative_trapezoid, (ROW,)),
    "detach_copy": (torch.detach_copy, (ROW,)),
    "diagonal_copy": (lambda x: torch.diagonal_copy(x[0]), (SQUARE,)),
    "digamma": (lambda x: torch.digamma(x.abs() + 1), (ROW,)),
    "equal": (torch.equal, (ROW, ROW)),
    "erfinv": (lambda x: torch.erfinv(x.tanh() * 0.9), (ROW,)),
    "expand_copy": (lambda x: torch.expand_copy(x, (3, 2, 8)), (ROW,)),
    "frexp": (lambda x: torch.frexp(x)[0], (ROW,)),
    "frobenius_norm": (lambda x: torch.frobenius_norm(x, (0, 1)), (ROW,)),
    "gcd": (lambda x: torch.gcd(x.to(torch.int32), torch.tensor(2)), (ROW,)),
    "geqrf": (lambda x: torch.geqrf(x[0])[0], (SQUARE,)),
    "gradient": (lambda x: torch.gradient(x)[0], (ROW,)),
    "grid_sampler": (lambda x: torch.grid_sampler(x, GRID, 0, 0, False), (IMAGE,)),
    "grid_sampler_2d": (lambda x: torch.grid_sampler_2d(x, GRID, 0, 0, False), (IMAGE,)),
    "grid_sampler_3d": (
        lambda x: torch.grid_sampler_3d(x, torch.zeros(1, 2, 2, 2, 3), 0, 0, False), (VOLUME,),
    ),
    "histc": (lambda x: torch.histc(x, 4, -1.0, 1.0), (ROW,)),
    "histogram": (lambda x: torch.histogram(x, 4)[0], (ROW,)),
    "histogramdd": (lambda x: torch.histogramdd(x.reshape(8, 2), [2, 2])[0], (ROW,)),
    "i0": (torch.i0, (ROW,)),
    "igamma": (lambda x, y: torch.igamma(x.abs(), y.abs()), (ROW, ROW)),
    "igammac": (lambda x, y: torch.igammac(x.abs(), y.abs()), (ROW, ROW)),
    "imag": (lambda x, y: torch.imag(torch.complex(x, y)), (ROW, ROW)),
    "inverse": (lambda x: torch.inverse(x + 4 * torch.eye(4)), (SQUARE,)),
    "isclose": (torch.isclose, (ROW, ROW)),
    "isin": (lambda x: torch.isin(x, torch.tensor([0.0, 1.0])), (ROW,)),
    "isneginf": (torch.isneginf, (ROW,)),
    "isposinf": (torch.isposinf, (ROW,)),
    "isinf": (torch.isinf, (ROW,)),
    "isreal": (torch.isreal, (ROW,)),
    "istft": (lambda x: torch.istft(torch.complex(x, x), 6), ((4, 8),)),
    "kthvalue": (lambda x: torch.kthvalue(x, 2, 1)[0], (ROW,)),
    "lcm": (lambda x: torch.lcm(x.to(torch.int32), torch.tensor(2)), (ROW,)),
    "lgamma": (lambda x: torch.lgamma(x.abs() + 1), (ROW,)),
    "logdet": (lambda x: torch.logdet(x + 4 * torch.eye(4)), (SQUARE,)),
    "lu_solve": (lambda x: torch.lu_solve(x, x, torch.ones(1, 4, dtype=torch.int32)), (SQUARE,)),
    "lu_unpack": (lambda x: torch.lu_unpack(x, torch.ones(1, 4, dtype=torch.int32))[1], (SQUARE,)),
    "masked_select": (lambda x: torch.masked_select(x, MASK), (ROW,)),
    "matrix_exp": (torch.matrix_exp, (SQUARE,)),
    "matrix_power": (lambda x: torch.matrix_power(x, 2), (SQUARE,)),
    "meshgrid": (lambda x: torch.meshgrid(x[0], x[1], indexing="ij")[0], (ROW,)),
    "mode": (lambda x: torch.mode(x, 1)[0], (ROW,)),
    "msort": (torch.msort, (ROW,)),
    "mvlgamma": (lambda x: torch.mvlgamma(x.abs() + 2, 2), (ROW,)),
    "nanmean": (torch.nanmean, (ROW,)),
    "nanmedian": (torch.nanmedian, (ROW,)),
    "nanquantile": (lambda x: torch.nanquantile(x, 0.5), (ROW,)),
    "nansum": (torch.nansum, (ROW,)),
    "narrow_copy": (lambda x: torch.narrow_copy(x, 1, 2, 3), (ROW,)),
    "native_batch_norm": (
        lambda x: torch.native_batch_norm(x, None, None, torch.zeros(4), torch.ones(4), False, 0.1, 1e-5)[0], (LINE,),
    ),
    "native_dropout": (lambda x: torch.native_dropout(x, 0.5, False)[0], (ROW,)),
    "native_group_norm": (lambda x: torch.native_group_norm(x, None, None, 1, 4, 16, 2, 1e-5)[0], (LINE,)),
    "native_layer_norm": (lambda x: torch.native_layer_norm(x, (8,), None, None, 1e-5)[0], (ROW,)),
    "nextafter": (torch.nextafter, (ROW, ROW)),
    "nonzero": (torch.nonzero, (ROW,)),
    "nonzero_static": (lambda x: torch.nonzero_static(x, size=3), (ROW,)),
    "norm_except_dim": (lambda x: torch.norm_except_dim(x, 2, 0), (ROW,)),
    "nuclear_norm": (torch.nuclear_norm, (ROW,)),
    "orgqr": (lambda x: torch.orgqr(x[0], x[0, 0]), (SQUARE,)),
    "ormqr": (lambda x: torch.ormqr(x[0], x[0, 0], x[0]), (SQUARE,)),
    "pdist": (torch.pdist, (ROW,)),
    "permute_copy": (lambda x: torch.permute_copy(x, (1, 0)), (ROW,)),
    "pinverse": (torch.pinverse, (SQUARE,)),
    "polar": (lambda x, y: torch.polar(x.abs(), y).abs(), (ROW, ROW)),
    "polygamma": (lambda x: torch.polygamma(1, x.abs() + 1), (ROW,)),
    "qr": (lambda x: torch.qr(x)[0], (SQUARE,)),
    "quantile": (lambda x: torch.quantile(x, 0.5), (ROW,)),
    "renorm": (lambda x: torch.renorm(x, 2, 0, 1.0), (ROW,)),
    "segment_reduce": (lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([1, 1])), (ROW,)),
    "select_copy": (lambda x: torch.select_copy(x, 1, 2), (ROW,)),
    "slice_copy": (lambda x: torch.slice_copy(x, 1, 2, 4), (ROW,)),
    "slice_inverse": (lambda x: torch.slice_inverse(x[:, :2], x, 1, 0, 2), (ROW,)),
    "slogdet": (lambda x: torch.slogdet(x)[1], (SQUARE,)),
    "split_copy": (lambda x: aten.split_copy.Tensor(x, 4, 1)[0], (ROW,)),
    "split_with_sizes_copy": (lambda x: aten.split_with_sizes_copy.default(x, [2, 6], 1)[0], (ROW,)),
    "squeeze_copy": (torch.squeeze_copy, (SQUARE,)),
    "stft": (lambda x: torch.view_as_real(torch.stft(x, 4, return_complex=True)), (ROW,)),
    "svd": (lambda x: torch.svd(x)[1], (SQUARE,)),
    "t_copy": (torch.t_copy, (ROW,)),
    "transpose_copy": (lambda x: torch.transpose_copy(x, 0, 1), (ROW,)),
    "trapezoid": (torch.trapezoid, (ROW,)),
    "trapz": (torch.trapz, (ROW,)),
    "triangular_solve": (lambda x: torch.triangular_solve(x, x)[0], (SQUARE,)),
    "unbind_copy": (lambda x: aten.unbind_copy.int(x)[0], (ROW,)),
    "unfold_copy": (lambda x: torch.unfold_copy(x, 1, 2, 2), (ROW,)),
    "unique_consecutive": (torch.unique_consecutive, (ROW,)),
    "unsqueeze_copy": (lambda x: torch.unsqueeze_copy(x, 1), (ROW,)),
    "vander": (lambda x: torch.vander(x[0], 3), (ROW,)),
    "view_as_complex": (lambda x: torch.view_as_complex(x.reshape(2, 4, 2)).abs(), (ROW,)),
    "view_as_real": (lambda x, y: torch.view_as_real(torch.complex(x, y)), (ROW, ROW)),
    "view_copy": (lambda x: torch.view_copy(x, (4, 4)), (ROW,)),
}  # fmt: skip

TORCH_WITHOUT_ROW: dict[str, str] = {
    "of other backends, of quantized or sparse tensors": (
        "cudnn_.* miopen_.* mkldnn_.* fbgemm_.* quantized_.* sparse_.* q_.* fake_quantize_.* quantize_.* "
        "batch_norm_(backward|elemt|gather|stats|update).* .*_indices_copy indices_copy values_copy native_norm "
        "choose_qparams_optimized dequantize int_repr qscheme fused_moving_avg_obs_fake_quant hspmm smm sspaddmm"
    ),
    "make a tensor of constants": (
        "arange as_tensor bartlett_window blackman_window empty.* eye from_file full full_like hamming_window "
        "hann_window kaiser_window linspace logspace ones ones_like range scalar_tensor tensor tril_indices "
        "triu_indices zeros zeros_like"
    ),
    "draw random numbers (tests/passes/test_refused_operators.py)": (
        "bernoulli binomial multinomial normal poisson rand rand_like randint randint_like randn randn_like randperm"
    ),
    "ask for properties, or set options": (
        "can_cast get_device get_autocast_dtype is_.* numel promote_types result_type broadcast_shapes Generator Size "
        "device initial_seed manual_seed save seed set_grad_enabled wait sym_constrain_.*"
    ),
    "losses, which a program does not compute": (
        "binary_cross_entropy_with_logits cosine_embedding_loss ctc_loss hinge_embedding_loss kl_div "
        "margin_ranking_loss poisson_nll_loss triplet_margin_loss"
    ),
    "copies of complex views": "view_as_complex_copy view_as_real_copy",
}
"""Regular expressions of names, by the reason why they have no row."""

RUN_NOWHERE = names(
    "argsort bitwise_left_shift bitwise_right_shift cholesky cholesky_inverse cholesky_solve digamma erfinv frexp gcd "
    "geqrf grid_sampler_3d hash_tensor histc histogram histogramdd i0 igamma "
    "igammac inverse kthvalue lcm lgamma logdet lu_solve lu_unpack matrix_exp mode msort mvlgamma "
    "nanmedian nanquantile nextafter nonzero_static nuclear_norm orgqr ormqr pinverse polygamma qr quantile "
    "segment_reduce slogdet svd triangular_solve vander"
)
"""Functions of `TORCH` that neither the NPU nor a CPU kernel of ExecuTorch runs. One error names all of a program."""

REFUSED_FIRST = names(
    "allclose argwhere bincount combinations corrcoef cov equal nonzero slice_inverse unique_consecutive "
    "gumbel_softmax fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices"
)
"""Functions that torch.export or the first checks refuse: random, or of a shape that depends on data."""
