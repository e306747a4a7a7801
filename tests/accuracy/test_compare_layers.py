"""`compare_layers`: the layers of a `.pte`, compared with the layers of the converted module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.accuracy_models import altered, images, net, quantized
from tests.flow_support import seeded
from torch import nn

from openneutron import QuantizedModel, lower, quantize
from openneutron.accuracy.compare import compare_layers
from openneutron.errors import InputError, ModelError
from openneutron.results.comparison import Comparison


def compared(model: QuantizedModel, other: QuantizedModel, **options: Any) -> Comparison:
    return compare_layers(model, lower(other, **options), images(3, seed=8))


@pytest.mark.parametrize("options", [{}, {"int8_io": True}, {"neutron_converter_flavor": "SDK_25_06"}])
def test_a_program_of_the_module_is_within_tolerance(healthy: QuantizedModel, options: dict[str, Any]) -> None:
    comparison = compared(healthy, healthy, **options)
    assert comparison.first is None
    assert comparison.output_lsb < 1.5
    assert {layer.module for layer in comparison.layers} >= {"first", "second", "third", "head"}
    assert set(comparison.unseen).isdisjoint(layer.node for layer in comparison.layers)


@pytest.mark.parametrize(("node", "module"), [("conv2d_1", "second"), ("linear", "head")])
def test_an_altered_program_is_found_and_its_layer_named(healthy: QuantizedModel, node: str, module: str) -> None:
    comparison = compared(healthy, altered(healthy, node))
    assert comparison.first is not None
    assert (comparison.first.node, comparison.first.module) == (node, module)
    assert [layer.node for layer in comparison.layers if layer.is_beyond] == [node]
    assert comparison.first.lsb > comparison.first.tolerance
    assert 0 < comparison.first.differing < 0.5


def test_every_delegate_of_a_split_program_is_compared() -> None:
    halves = quantized(net(), layers={"third": "float"})
    program = lower(halves)
    assert len({one.partition for one in program.placement} - {None}) == 2
    comparison = compare_layers(halves, program, images(3, seed=8))
    assert comparison.first is None
    assert [layer.module for layer in comparison.layers if layer.module] == ["first", "second", "head"]
    worse = compare_layers(halves, lower(altered(halves, "linear")), images(3, seed=8))
    assert worse.first is not None
    assert worse.first.module == "head"


def test_compare_takes_bytes_paths_and_no_program(healthy: QuantizedModel, tmp_path: Path) -> None:
    program, data = lower(healthy), images(2, seed=8)
    program.save(tmp_path / "net.pte")
    expected = compare_layers(healthy, program, data)
    assert compare_layers(healthy, program.buffer, data) == expected
    assert compare_layers(healthy, tmp_path / "net.pte", data) == expected
    assert compare_layers(healthy.module, None, data) == expected


def test_a_program_of_another_model_is_a_model_error(healthy: QuantizedModel) -> None:
    small = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU()).eval()
    with pytest.raises(ModelError, match="was not lowered from this module"):
        compare_layers(healthy, lower(quantized(small)), images(1))
    on_cpu = ["aten.conv2d.default", "aten.linear.default", "aten.mean.dim", "aten.max_pool2d.default"]
    program = lower(healthy, operators_not_to_delegate=on_cpu)
    with pytest.raises(InputError, match="no delegate for the NPU"):
        compare_layers(healthy, program, images(1))


def test_convolutions_of_volumes_are_compared_in_any_frame_dimension() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.BatchNorm3d(2), nn.AvgPool3d((1, 2, 2)), nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)))
    )
    data = [(torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(i)),) for i in range(4)]
    quantized = quantize(model, data[0], data, recover=None)
    assert compare_layers(quantized, lower(quantized), data).first is None


def test_layers_in_another_order_are_not_compared() -> None:
    class Interleaved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(4, 8, 3)

        def forward(self, x: torch.Tensor) -> Any:
            mixed = x.sigmoid()
            mixed[..., ::2] = x[..., ::2]
            return self.convolution(mixed.abs() * x)

    samples = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    quantized = quantize(seeded(Interleaved), samples[0], samples, recover=None)
    comparison = compare_layers(quantized, lower(quantized), samples[:2])
    assert comparison.first is None
    assert {"abs_1", "mul"} <= set(comparison.unseen)
    assert "conv2d" in {layer.node for layer in comparison.layers}
