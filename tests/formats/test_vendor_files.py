"""Facts about targets in files of NXP's converter, compared with the assumptions of the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.runtime_vendor import Filters, neutron_graphs, operators_outside, pointwise_filters

from openneutron.targets import TARGETS

pytestmark = pytest.mark.data
FOLDERS = {"imxrt700": "imxrt700", "mcxn94x": "mcxn947"}
MODELS = {"imxrt700": ["ds_cnn_s", "mobilenet_v1_0.25_128_quant_int8"], "mcxn94x": [
    "ds_cnn_s", "mobilenet_v1_0.25_128_quant_int8", "cifarnet_quant_int8"]}  # fmt: skip


@pytest.fixture(scope="session")
def vendor(data_folder: Path) -> Path:
    return data_folder / "vendor"


def runs_found(filters: Filters, weights: bytes, length: int) -> float:
    """Returns the share of aligned runs of `length` input channels that are consecutive in the NPU's weights."""
    stored = {weights[start : start + length] for start in range(len(weights) - length + 1)}
    return float(np.mean([run.tobytes() in stored for run in filters.reshape(-1, length)]))


@pytest.mark.parametrize("target", FOLDERS)
@pytest.mark.parametrize("model", ["ds_cnn_s", "mobilenet_v1_0.25_128_quant_int8"])
def test_weights_come_in_runs_of_the_macs_of_a_pipeline(vendor: Path, target: str, model: str) -> None:
    ((_, weights, _),) = neutron_graphs((vendor / FOLDERS[target] / f"{model}_npu.tflite").read_bytes())
    granularity = TARGETS[target].macs_per_pipeline
    assert granularity is not None
    written = pointwise_filters((vendor / "ref" / f"{model}.tflite").read_bytes())
    wide = [filters for filters in written if filters.shape[1] >= 32]
    runs = np.concatenate([filters.reshape(-1, 2 * granularity) for filters in wide])
    assert runs_found(runs, weights, granularity) == 1
    assert runs_found(runs, weights, 2 * granularity) < 0.1


@pytest.mark.parametrize("target", FOLDERS)
def test_only_softmax_and_conversions_are_left_outside(vendor: Path, target: str) -> None:
    widths = set()
    for model in MODELS[target]:
        outside = operators_outside((vendor / FOLDERS[target] / f"{model}_npu.tflite").read_bytes())
        assert {name for name, _ in outside} <= {"QUANTIZE", "SOFTMAX", "DEQUANTIZE"}
        widths |= {shape[-1] for name, shape in outside if name == "SOFTMAX"}
    assert widths <= {10, 12, 1001}
    # The limits of the legacy generation come from later converters; they allow the softmax of 12 values on the MCX
    # N94x.
    refused = {width for width in widths if width % TARGETS[target].channel_granularity}
    assert refused == widths - ({12} if target == "mcxn94x" else set())
