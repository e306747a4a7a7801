"""Statements of random models for operators of the support table that no statement of `random_statements` computes.

`{v}` and `{w}` are values, `{d}` and `{e}` dimensions, `{n}` the name of the result, and `self.m{part}` a module. `{f}`
is the last size of `{v}`, and `{c}` the second one.
"""

from __future__ import annotations

__all__ = ["EXPRESSIONS", "IN_PLACE", "MODULES"]

_POINTWISE = (
    "torch.absolute({v})", "torch.negative({v})", "torch.clamp({v}, min={w})", "torch.clamp({v}, max={w})",
    "torch.clip({v}, -1, 1)", "torch.clip({v}, min={w})", "torch.clamp_max({v}, 0.5)", "torch.clamp_min({v}, 0.5)",
    "torch.clamp_min({v}, {w})", "torch.clamp_max({v}, {w})", "torch.copysign({v}, -1.0)", "torch.copysign({v}, {w})",
    "torch.deg2rad({v})", "torch.rad2deg({v})", "torch.div({v}, 2.0, rounding_mode='floor')",
    "torch.div({v}, 0.7, rounding_mode='trunc')", "torch.div({v}, {w}.abs() + 1, rounding_mode='floor')",
    "torch.divide({v}, {w}.abs() + 1)", "torch.divide({v}, {w}.abs() + 1, rounding_mode='trunc')",
    "torch.true_divide({v}, {w}.abs() + 1)", "torch.erfc({v})", "torch.exp2({v}.clamp(-3, 3))", "torch.fix({v})",
    "torch.trunc({v})", "torch.frac({v})", "torch.floor_divide({v}, 0.5)", "torch.floor_divide({v}, {w}.abs() + 0.5)",
    "torch.fmax({v}, {w})", "torch.fmin({v}, {w})", "torch.fmod({v}, {w}.abs() + 1)", "torch.heaviside({v}, {w})",
    "torch.ldexp({v}, torch.tensor(2))", "torch.lerp({v}, {w}, {v}.sigmoid())", "torch.log10({v}.abs() + 0.1)",
    "torch.log2({v}.abs() + 0.1)", "torch.logaddexp({v}, {w})", "torch.logaddexp2({v}, {w})",
    "torch.multiply({v}, {w})", "torch.subtract({v}, {w})", "2.0 ** {v}.clamp(-2, 2)",
    "({v}.abs() + 0.5) ** {w}.clamp(-1, 1)", "{v}.remainder(0.7)", "torch.remainder({v}, {w}.abs() + 1)",
    "torch.rsub({v}, {w})", "torch.round({v}, decimals=1)", "torch.sgn({v})", "torch.special.expit({v})",
    "torch.where({v} > 0, 0.5, {v})", "torch.where({v} > 0, {v}, 0.25)", "torch.where({v} > 0, 1.0, 0.5)",
    "{v}.masked_fill({v} > 0, torch.tensor(0.5))", "F.rrelu({v})", "torch.angle({v})",
    "torch.bucketize({v}, torch.tensor([-0.5, 0.0, 0.5])).float()",
    "torch.searchsorted(torch.tensor([-0.5, 0.0, 0.5]), {v}).float()", "{v}.to({w})", "{v}.type_as({w})",
    "{v}.to('cpu')", "torch.max({v}, {w})", "torch.min({v}, {w})",
)  # fmt: skip
_REDUCTIONS = (
    "{v}.cummax({d})[0]", "{v}.cummin({d})[0]", "{v}.cumprod({d})", "{v}.logcumsumexp({d})", "{v}.std()", "{v}.var()",
    "{v}.std({d}, correction=0)", "{v}.var({d}, correction=2)", "torch.std_mean({v})[0]", "torch.std_mean({v}, {d})[1]",
    "torch.std_mean({v}, {d}, correction=0)[0]", "torch.var_mean({v})[1]", "torch.var_mean({v}, {d}, correction=0)[0]",
    "{v}.min()", "torch.trace({v})",
)  # fmt: skip
_MOVES = (
    "{v}.adjoint()", "{v}.mH", "{v}.H", "{v}.t()", "torch.broadcast_tensors({v}, {w})[0]",
    "{v}[..., :1].broadcast_to({v}.shape)", "torch.column_stack([{v}, {w}])", "torch.concat([{v}, {w}], {d})",
    "torch.concatenate([{w}, {v}], {d})", "torch.diag({v})", "torch.diag_embed({v})",
    "torch.diagflat({v}.flatten()[:6])", "torch.diagonal_scatter({v}, 2 * {v}.diagonal())", "torch.dsplit({v}, 2)[0]",
    "torch.dsplit({v}, [1])[-1]", "torch.hsplit({v}, 2)[0]", "torch.hsplit({v}, [1])[-1]", "torch.vsplit({v}, 2)[0]",
    "torch.vsplit({v}, [1])[-1]", "torch.dstack([{v}, {w}])", "torch.hstack([{v}, {w}])", "torch.vstack([{v}, {w}])",
    "torch.row_stack([{v}, {w}])", "torch.fft.fftshift({v})", "torch.fft.ifftshift({v}, ({d},))", "torch.fliplr({v})",
    "torch.flipud({v})", "torch.moveaxis({v}, {d}, {e})", "torch.moveaxis({v}, (0, -1), (-1, 0))",
    "torch.movedim({v}, (0, 1), (1, 0))", "{v}.ravel()", "{v}.flatten().reshape_as({w})", "{v}.view_as({w})",
    "torch.select_scatter({v}, 2 * {v}.select({d}, 0), {d}, 0)",
    "torch.slice_scatter({v}, 2 * {v}[..., :1], -1, 1, 2)",
    "torch.as_strided_scatter({v}, {v}.flatten()[1:3], (2,), (1,))", "{v}.split([1, {v}.shape[{d}] - 1], {d})[1]",
    "torch.split_with_sizes({v}, [1, {v}.shape[{d}] - 1], {d})[0]", "{v}.squeeze((0, 1))",
    "torch.swapdims({v}, {d}, {e})", "torch.take({v}, torch.tensor([0, 1]))",
    "torch.take_along_dim({v}, torch.zeros_like({v}, dtype=torch.long), {d})", "torch.tensor_split({v}, 2, {d})[0]",
    "torch.tensor_split({v}, (1,), {d})[1]", "torch.unsafe_chunk({v}, 2, {d})[0]", "torch.unsafe_split({v}, 2, {d})[0]",
    "torch.unsafe_split_with_sizes({v}, [1, {v}.shape[{d}] - 1], {d})[0]", "torch.native_channel_shuffle({v}, 2)",
)  # fmt: skip
_FIRST = "torch.zeros_like({v}.narrow({d}, 0, 1), dtype=torch.long)"
_WRITES = (
    "{v}.index_add({d}, torch.tensor([0]), {w}.narrow({d}, 0, 1))",
    "{v}.index_copy({d}, torch.tensor([0]), 2 * {w}.narrow({d}, 0, 1))",
    "{v}.index_fill({d}, torch.tensor([0]), 0.5)", "{v}.index_fill({d}, torch.tensor([0]), torch.tensor(0.5))",
    "{v}.index_put((torch.tensor([0]),), 2 * {w}[-1])",
    "{v}.index_reduce({d}, torch.tensor([0]), {w}.narrow({d}, 0, 1), 'amax')",
    "{v}.masked_scatter(torch.arange({f}) > 0, {w})", "{v}.put(torch.tensor([0]), {w}.flatten()[1:2])",
    f"{{v}}.scatter({{d}}, {_FIRST}, {{w}}.narrow({{d}}, 0, 1))", f"{{v}}.scatter({{d}}, {_FIRST}, 0.5)",
    f"{{v}}.scatter({{d}}, {_FIRST}, {{w}}.narrow({{d}}, 0, 1), reduce='add')",
    f"{{v}}.scatter({{d}}, {_FIRST}, 0.5, reduce='multiply')",
    f"{{v}}.scatter_add({{d}}, {_FIRST}, {{w}}.narrow({{d}}, 0, 1))",
    f"{{v}}.scatter_reduce({{d}}, {_FIRST}, {{w}}.narrow({{d}}, 0, 1), 'amax')",
    f"{{v}}.scatter_reduce({{d}}, {_FIRST}, {{w}}.narrow({{d}}, 0, 1), 'mean', include_self=False)",
)  # fmt: skip
_PRODUCTS = (
    "torch.addmm({v} @ {v}.T, {v}, {w}.T)", "torch.addmm({v}[0, 0], {v}, {w}.T, beta=0.5, alpha=2)",
    "torch.addmv({v}[:, 0], {v}, {w}[0])", "torch.baddbmm({v} @ {v}.mT, {v}, {w}.mT)",
    "torch.addbmm({v}[0] @ {v}[0].mT, {v}, {w}.mT)", "torch.chain_matmul({v}, {w}.T, {v})",
    "torch.linalg.multi_dot([{v}, {w}.T, {v}])", "torch.dot({v}.flatten(), {w}.flatten())",
    "torch.vdot({v}.flatten(), {w}.flatten())", "torch.einsum('...i,...i->...', {v}, {w})",
    "torch.einsum('...ij,...kj->...ik', {v}, {w})", "torch.einsum('abc,acd->bd', {v}, {w}.mT)",
    "torch.ger({v}.flatten()[:6], {w}.flatten()[:5])", "torch.inner({v}, {w})", "torch.linalg.vecdot({v}, {w})",
    "torch.mm({v}, {w}.T)", "torch.mv({v}, {w}[0])", "torch.tensordot({v}, {w}.mT, dims=1)",
    "torch.bmm({v}, {w}.mT)", "F.scaled_dot_product_attention({v}, {w}, {v})",
    "F.scaled_dot_product_attention({v}, {v}, {w}, is_causal=True)",
    "F.scaled_dot_product_attention({v}, {w}, {w}, attn_mask=torch.ones({c}, {c}).tril().bool())",
)  # fmt: skip
_WINDOWS = (
    "F.max_pool1d({v}, 2, return_indices=True)[0]", "F.max_pool2d({v}, 2, return_indices=True)[0]",
    "F.max_pool3d({v}, (1, 2, 2), return_indices=True)[0]", "F.adaptive_max_pool1d({v}, 2)",
    "F.adaptive_max_pool3d({v}, (2, 2, 2))", "F.pad({v}, (1, 1, 2, 0), mode='reflect')",
    "F.pad({v}, (1, 0, 0, 1, 1, 1), mode='reflect')", "F.pad({v}, (1, 1, 2, 0), mode='replicate')",
    "F.pad({v}, (1, 0, 0, 1, 1, 1), mode='replicate')", "F.pad({v}, (1, 2), mode='replicate')",
    "torch.constant_pad_nd({v}, (1, 0), 0.25)", "F.interpolate({v}, size=5)", "F.interpolate({v}, size=(5, 7))",
    "F.interpolate({v}, scale_factor=1.5)", "F.interpolate({v}, scale_factor=2, mode='linear')",
    "F.interpolate({v}, size=7, mode='linear', align_corners=True)",
    "F.interpolate({v}, size=(5, 7), mode='bilinear', align_corners=True)",
    "F.interpolate({v}, scale_factor=2, mode='bicubic')", "F.interpolate({v}, size=(5, 6), mode='bicubic')",
    "F.interpolate({v}, size=(4, 4), mode='bilinear', antialias=True)",
    "F.interpolate({v}, size=(4, 4), mode='bicubic', antialias=True)",
    "F.interpolate({v}, size=5, mode='nearest-exact')", "F.interpolate({v}, size=(5, 7), mode='nearest-exact')",
    "F.interpolate({v}, scale_factor=2, mode='nearest-exact')", "F.interpolate({v}, scale_factor=2, mode='trilinear')",
    "F.fold(F.unfold({v}, 2), {v}.shape[-2:], 2)", "F.fold(F.unfold({v}, 2, stride=2), (8, 8), 2, stride=2)",
)  # fmt: skip
EXPRESSIONS = (*_POINTWISE, *_REDUCTIONS, *_MOVES, *_WRITES, *_PRODUCTS, *_WINDOWS)
"""Expressions of one value each."""

IN_PLACE = tuple(
    f"{{n}}.{call}"
    for call in (
        "abs_()", "clamp_max_(0.5)", "clamp_min_(0.5)", "exp_()", "neg_()", "sgn_()", "sigmoid_()", "sign_()",
        "sub_({w})", "tanh_()", "square_().add_(0.1).log_()", "abs_().add_(0.1).rsqrt_()",
    )
) + tuple(
    f"F.{call}"
    for call in (
        "hardswish({n}, inplace=True)", "hardtanh_({n})", "leaky_relu_({n})", "relu6({n}, inplace=True)",
        "dropout({n}, 0.5, False, inplace=True)",
    )
)  # fmt: skip
"""Statements that write to `{n}`, which is a copy of a value."""

MODULES = (
    ("self.m{part}({v}, {w})", "nn.Bilinear({f}, {f}, 4)"),
    ("self.m{part}({v})", "nn.Conv2d({c}, 4, 3, padding='same')"),
    ("self.m{part}({v})", "nn.Conv3d({c}, 4, 3, padding='same')"),
    ("self.m{part}({v})", "nn.ConvTranspose3d({c}, 4, (1, 2, 2), stride=(1, 2, 2))"),
    ("torch.conv_tbc({v}, self.m{part}.weight.permute(2, 1, 0), self.m{part}.bias)", "nn.Conv1d({f}, 4, 3)"),
    ("self.m{part}({v}, {w})", "nn.GRUCell({f}, {f})"),
    ("self.m{part}({v}, ({w}, {v}))[0]", "nn.LSTMCell({f}, {f})"),
    ("self.m{part}({v})", "nn.RNNCell({f}, 5)"),
    ("self.m{part}({v}, {w})", "nn.RNNCell({f}, {f}, nonlinearity='relu')"),
    ("self.m{part}({v})[0]", "nn.RNN({f}, 4)"),
    ("self.m{part}({v})[0]", "nn.RNN({f}, 4, nonlinearity='relu', bidirectional=True)"),
    ("self.m{part}({v})[0]", "nn.LSTM({f}, 4, num_layers=2, bidirectional=True, batch_first=True)"),
    ("self.m{part}({v})[1][0]", "nn.LSTM({f}, 4, proj_size=3)"),
    ("self.m{part}(({v} > 0).long())", "nn.EmbeddingBag(2, 4, mode='sum')"),
    ("self.m{part}(({v} > 0).long())", "nn.EmbeddingBag(2, 4, mode='mean', padding_idx=0)"),
    ("self.m{part}(({v}.flatten()[:6] > 0).long())", "nn.Embedding(2, 4)"),
    ("self.m{part}({v})", "nn.TransformerEncoderLayer({f}, 1, 8, batch_first=True)"),
    ("self.m{part}({v}, {w})", "nn.TransformerDecoderLayer({f}, 1, 8, batch_first=True)"),
    ("self.m{part}(self.m{part}({v}))", "nn.Linear({f}, {f})"),
    ("self.m{part}({v}) + self.m{part}({w})", "nn.Conv2d({c}, 3, 3)"),
    ("self.m{part}({v})", "nn.utils.parametrizations.weight_norm(nn.Linear({f}, 4))"),
    ("self.m{part}({v})", "nn.utils.parametrizations.spectral_norm(nn.Linear({f}, 4))"),
    ("F.linear({v}, torch.tanh(self.m{part}.weight), self.m{part}.bias * 2)", "nn.Linear({f}, 4)"),
    ("F.conv2d({v}, self.m{part}.weight - self.m{part}.weight.mean(), groups=1)", "nn.Conv2d({c}, 4, 3)"),
)
"""Pairs of an expression and the module that it calls."""
