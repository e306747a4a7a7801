"""Detectors that return boxes and scores in one tensor, as exported detectors do, or in two tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .dense import Yolo

STRIDES = (8, 16, 32)
CALM = 0.5
"""Factor that scales random logits to the size of those of an untrained detection head."""


def _grid(height: int, width: int) -> Tensor:
    """Return the coordinates x and y of each cell, in cells: [1, 2, height, width]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((x, y)).float()[None]


class YoloV5(nn.Module):
    """A detector with three anchors per cell. Decodes centre, size, objectness and classes per level; boxes in pixels.

    Returns [1, boxes, 5 + classes]; with `apart`, the boxes [1, boxes, 4] and the scores [1, boxes, 1 + classes].
    """

    def __init__(self, size: int, classes: int = 20, *, apart: bool = False) -> None:
        super().__init__()
        self.trunk = Yolo(classes=3 * (5 + classes) - 4, boxes=1)
        self.values, self.apart = 5 + classes, apart
        for level, stride in enumerate(STRIDES):
            self.register_buffer(f"grid{level}", _grid(size // stride, size // stride)[:, None].movedim(2, -1) - 0.5)
            anchors = torch.tensor([[1.25, 1.625], [2.0, 3.75], [4.125, 2.875]]) * stride
            self.register_buffer(f"anchors{level}", anchors.view(1, 3, 1, 1, 2))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        levels = []
        for level, (stride, logits) in enumerate(zip(STRIDES, self.trunk(x), strict=True)):
            features = logits * CALM
            batch, _, height, width = features.shape
            cells = features.view(batch, 3, self.values, height, width).permute(0, 1, 3, 4, 2).sigmoid()
            centre, size, scores = cells.split((2, 2, self.values - 4), -1)
            centre = (centre * 2 + getattr(self, f"grid{level}")) * stride
            size = (size * 2) ** 2 * getattr(self, f"anchors{level}")
            boxes = torch.cat((centre, size), -1)
            parts = (boxes, scores) if self.apart else (torch.cat((boxes, scores), -1),)
            levels.append([part.reshape(batch, -1, part.shape[-1]) for part in parts])
        joined = tuple(torch.cat(parts, 1) for parts in zip(*levels, strict=True))
        return joined if self.apart else joined[0]


class YoloV8(nn.Module):
    """A detector without anchors. Distances to the four sides are expectations of softmaxes, decoded for all levels.

    Returns [1, 4 + classes, boxes]; with `apart`, the boxes [1, 4, boxes] and the scores [1, classes, boxes].
    """

    def __init__(self, size: int, classes: int = 20, bins: int = 16, *, apart: bool = False) -> None:
        super().__init__()
        self.trunk = Yolo(classes=classes, boxes=bins)
        self.bins, self.classes, self.apart = bins, classes, apart
        grids = [_grid(size // stride, size // stride).flatten(2) + 0.5 for stride in STRIDES]
        self.centres: Tensor
        self.steps: Tensor
        self.distances: Tensor
        self.register_buffer("centres", torch.cat(grids, 2))
        steps = [torch.full((1, 1, grid.shape[2]), float(stride)) for stride, grid in zip(STRIDES, grids, strict=True)]
        self.register_buffer("steps", torch.cat(steps, 2))
        self.register_buffer("distances", torch.arange(bins).float().view(1, bins, 1, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        levels = [(logits * CALM).flatten(2) for logits in self.trunk(x)]
        sides, classes = torch.split(torch.cat(levels, 2), [4 * self.bins, self.classes], 1)
        bins = sides.reshape(len(x), 4, self.bins, -1).transpose(2, 1).softmax(1)
        before, after = functional.conv2d(bins, self.distances).reshape(len(x), 4, -1).chunk(2, 1)
        start, end = self.centres - before, self.centres + after
        boxes = torch.cat(((start + end) / 2, end - start), 1) * self.steps
        scores = classes.sigmoid()
        return (boxes, scores) if self.apart else torch.cat((boxes, scores), 1)
