"""Networks with state: at each step as accurate as the same networks without state, also at the end."""

from __future__ import annotations

import pytest
import torch
from benchmarks.streaming import MOST_LOST, measure
from benchmarks.zoo.streaming import STREAMING


@pytest.mark.parametrize("name", STREAMING)
def test_the_network_has_enough_sqnr_over_two_hundred_steps(name: str) -> None:
    row = measure(name, 200)
    assert row.delegates == 1
    assert set(row.on_cpu) == {"aten.copy_.default"}
    assert row.sqnr > row.sqnr_without_state - MOST_LOST
    assert row.sqnr_at_the_end > row.sqnr_without_state - MOST_LOST


@pytest.mark.parametrize("name", STREAMING)
@torch.no_grad()
def test_streaming_and_stateless_forms_are_equal(name: str) -> None:
    network = STREAMING[name]().eval()
    frames = torch.randn(1, network.frame[1], 40, generator=torch.Generator().manual_seed(0))
    found = torch.cat([network(frame) for frame in torch.split(frames, 1, -1)], -1)
    torch.testing.assert_close(found, network.whole(frames), rtol=1e-3, atol=1e-4)
