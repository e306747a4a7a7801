"""Packages of device programs, and what lowering with profiling adds. The converter is a test double."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.firmware_models import program
from tests.vendor.test_sdk import DOUBLES
from torch import nn

from openneutron import NeutronProgram, lower, quantize
from openneutron.errors import InputError
from openneutron.firmware import package


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> NeutronProgram:
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.delenv("NEUTRON_DOUBLE", raising=False)
    monkeypatch.setenv("OPENNEUTRON_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    quantized = quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), images[:1], images, recover=None)
    return lower(quantized, payload="device", dump_kernel_selection_code=True, use_profiling=True)


def test_a_device_program_has_the_vectors_of_its_portable_program(device: NeutronProgram, tmp_path: Path) -> None:
    found = device.package(tmp_path / "firmware", name="net")
    assert found.kind == "device"
    assert {"net_portable.c", "net_portable.pte", "kernel_selection.c", "etrecord.bin"} < set(found.files)
    folder = found.folder
    assert (folder / "net.pte").read_bytes() == device.buffer
    assert (folder / "net_portable.pte").read_bytes() == device.portable
    assert f"NET_PORTABLE_BYTES={len(device.portable)}" in (folder / "CMakeLists.txt").read_text()
    assert "#define NET_PAYLOAD 2" in (folder / "net.h").read_text()
    readme = (folder / "README.md").read_text()
    assert "Compile it for the NPU" not in readme
    assert "its delegates hold microcode for imxrt700" in readme
    assert "project: `net.c test_vectors.c kernel_selection.c main.cpp`" in readme
    assert "openneutron validate" in readme
    assert "estimated" not in readme
    assert sorted(re.findall(r"^\| `([\w.]+)` \| [^|]+ \|$", readme, re.MULTILINE)) == sorted(found.files)
    size = re.findall(r"TEMPORARY_POOL_BYTES (\d+)u", (folder / "net_config.h").read_text())[-1]
    assert int(size) == device.memory.device.temporary.pool_bytes


def test_a_device_program_without_vectors_is_refused(device: NeutronProgram, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"test vectors are unknown. Give the portable program.*\.npz file"):
        package(device.buffer, tmp_path / "firmware")
    with pytest.raises(InputError, match="portable program contains microcode"):
        package(device.buffer, tmp_path / "firmware", portable=device.buffer)
    with pytest.raises(InputError, match="not the one from which the device program was compiled"):
        package(device.buffer, tmp_path / "firmware", portable=program("int8").buffer)
    assert not (tmp_path / "firmware").exists()


def test_a_device_program_takes_vectors_from_a_file(device: NeutronProgram, tmp_path: Path) -> None:
    image = torch.randn(1, 3, 8, 8)
    np.savez(tmp_path / "vectors.npz", input0=image[None].numpy(), output0=device.run(image)[None].numpy())
    found = package(device.buffer, tmp_path / "firmware", vectors=tmp_path / "vectors.npz")
    assert (found.kind, found.vectors) == ("device", 1)
    assert "openneutron validate" not in (found.folder / "README.md").read_text()  # nothing to compare with
    data = (found.folder / "test_vectors.bin").read_bytes()
    assert data[: 4 * image.numel()] == image.numpy().tobytes()


def test_profiling_gives_an_etrecord_that_executorch_reads(device: NeutronProgram, tmp_path: Path) -> None:
    from executorch.devtools.etrecord import parse_etrecord

    device.save(tmp_path / "model.pte")
    record = parse_etrecord(str(tmp_path / "model_etrecord.bin"))
    assert record.edge_dialect_program is not None
    assert record._debug_handle_map


def test_without_profiling_there_is_no_etrecord(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 8, 8)
    quantized = quantize(nn.Conv2d(3, 4, 3).eval(), images[:1], images, recover=None)
    lowered = lower(quantized, payload="portable")
    lowered.save(tmp_path / "model.pte")
    assert lowered.etrecord is None
    assert [path.name for path in tmp_path.iterdir()] == ["model.pte"]
