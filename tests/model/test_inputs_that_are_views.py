"""Example inputs that are views: `export` gives torch.export a copy that owns its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openneutron.model.examples import Examples
from openneutron.model.exporting import export

VIEWS: dict[str, tuple[Callable[[], Tensor], bool]] = {
    "an image of a batch": (lambda: torch.randn(5, 4, 8, 8)[2:3], True),
    "a channels-last image of a batch": (
        lambda: torch.randn(5, 4, 8, 8).contiguous(memory_format=torch.channels_last)[2:3], True,
    ),
    "a transposed tensor": (lambda: torch.randn(8, 8, 4, 1).permute(3, 2, 0, 1), True),
    "a tensor with gaps": (lambda: torch.randn(1, 4, 8, 16)[..., ::2], False),
    "an expanded tensor": (lambda: torch.randn(1, 1, 8, 8).expand(1, 4, 8, 8), False),
    "no view": (lambda: torch.randn(1, 4, 8, 8), False),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_copied_if_the_copy_has_their_strides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, is_copied = VIEWS[name]
    value, given = make(), list[Any]()
    torch_export = torch.export.export

    def recorded(module: nn.Module, args: tuple[Any, ...], *rest: Any, **options: Any) -> Any:
        given.extend(args)
        return torch_export(module, args, *rest, **options)

    monkeypatch.setattr(torch.export, "export", recorded)
    exported = export(nn.Conv2d(4, 4, 3), Examples((value,), {}))
    (copy,) = given
    assert (copy is not value) == is_copied
    assert not is_copied or copy._base is None
    assert torch.equal(copy, value)
    (traced,) = (node.meta["val"] for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs)
    assert (traced.shape, traced.stride()) == (value.shape, value.stride())


def test_values_that_are_no_tensors_are_given_unchanged() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: float, *, mode: str | None = None) -> Tensor:
            return x * factor if mode is None else x

    image = torch.randn(5, 4)[2:3]
    exported = export(Scaled(), Examples((image, 2.0), {"mode": None}))
    assert torch.equal(exported.module()(image, 2.0, mode=None), image * 2)
