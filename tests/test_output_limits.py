"""`benchmarks.output_limits`: which values of a network limit the SQNR of its outputs."""

from __future__ import annotations

import torch
from benchmarks.output_limits import limits_of, returned_layers
from tests.flow_support import seeded
from torch import Tensor, nn

from openneutron import quantize
from openneutron.accuracy.quantized_layers import find_layers


class Heads(nn.Module):
    """Two heads whose outputs for two levels are concatenated, after a trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.down = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2)
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns boxes [1, N, 4] and scores [1, N, 2] of two levels."""
        levels = [torch.relu(self.trunk(x))]
        levels.append(torch.relu(self.down(levels[0])))
        boxes = [self.boxes(level).flatten(2).mT for level in levels]
        scores = [self.scores(level).flatten(2).mT for level in levels]
        return torch.cat(boxes, 1), torch.cat(scores, 1)


def test_limits_of_two_outputs() -> None:
    samples = list(torch.split(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 1))
    quantized = quantize(seeded(Heads).eval(), samples[0], samples, recover=None, progress=False)
    assert quantized.reference is not None
    found = find_layers(quantized.module, quantized.reference, quantized.target)
    assert len(returned_layers(found)) == 4
    rows = {row.values: row for row in limits_of(quantized, samples)}
    assert all(len(row.outputs) == len(row.centred) == 2 for row in rows.values())
    for output in range(2):
        every = rows["all values"].outputs[output]
        assert all(row.outputs[output] > every - 1 for row in rows.values())
        assert rows["returned values"].outputs[output] > every + 1
        assert rows["weights"].outputs[output] > every + 0.5
