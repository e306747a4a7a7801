"""The bridge to the vendor's converter, tested with a double of its interface."""

from __future__ import annotations

import errno
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from openneutron.errors import ConverterError
from openneutron.formats import tflite
from openneutron.formats.payload import PayloadHeader, parse
from openneutron.ir.graph import Graph, Op, QParams, Tensor
from openneutron.ir.kinds import RELU
from openneutron.vendor import sdk
from openneutron.vendor.device import device_payload

DOUBLES = Path(__file__).parents[1] / "doubles"
QUICK = 20.0


@pytest.fixture(autouse=True)
def _doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.delenv("NEUTRON_DOUBLE", raising=False)


def model(size: int = 8) -> bytes:
    qparams = QParams.per_tensor(0.1, 0)
    source, target = (Tensor((1, size), np.dtype(np.int8), qparams) for _ in range(2))
    return tflite.write(Graph((source,), (target,), (Op(RELU, (source,), target, {}, "relu"),)))


def request(**flags: object) -> sdk.Conversion:
    return sdk.Conversion(model(), "imxrt700", {**sdk.DEFAULT_FLAGS, **flags})


HEADER = PayloadHeader((0,), (0,), (0,), (0,), 1)


class TestChoose:
    def test_installed_converters_are_found_without_import(self) -> None:
        assert [converter.module for converter in sdk.installed()] == [
            "eiq_neutron_sdk", "neutron_converter_SDK_25_06",
        ]  # fmt: skip

    def test_finds_packages_in_archives_and_skips_missing_folders(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with zipfile.ZipFile(tmp_path / "packages.zip", "w") as archive:
            archive.writestr("neutron_converter_SDK_24_12/__init__.py", "")
        monkeypatch.setattr(sys, "path", [str(tmp_path / "none"), str(tmp_path / "packages.zip"), str(tmp_path)])
        assert [converter.module for converter in sdk.installed()] == ["neutron_converter_SDK_24_12"]

    def test_without_a_flavor_the_newer_package(self) -> None:
        assert sdk.choose_converter(None).module == "eiq_neutron_sdk"

    def test_by_flavor(self) -> None:
        assert sdk.choose_converter("SDK_25_06").module == "neutron_converter_SDK_25_06"

    @pytest.mark.parametrize("flavor", ["SDK_25_09", "3.1.3"])
    def test_a_mismatch_lists_the_installed_converters(self, flavor: str) -> None:
        with pytest.raises(ConverterError, match=f"'{flavor}'.*neutron_converter_SDK_25_06.*openneutron compile"):
            sdk.choose_converter(flavor)

    def test_without_converters_the_error_says_what_to_do(self) -> None:
        with pytest.raises(ConverterError, match=r"installed: none.*portable program needs no converter"):
            sdk.choose_converter(None, ())


class TestConvert:
    def test_converts(self) -> None:
        converted = sdk.convert(request(), sdk.choose_converter(None))
        assert f"converting {len(model())} bytes for imxrt700" in converted.log
        assert not parse(device_payload(HEADER, converted.tflite)).is_portable

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("crash", "was ended by signal 11"),
            ("exit", r"ended with exit code 3[\s\S]*unsupported operator"),
            ("raise", "raised RuntimeError: no kernel for CONV_2D"),
            ("memory", "ran out of memory"),
            ("empty", "returned no model"),
        ],
    )
    def test_failures_of_the_child_are_errors_of_the_parent(
        self, word: str, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NEUTRON_DOUBLE", word)
        with pytest.raises(ConverterError, match=message):
            sdk.convert(request(), sdk.choose_converter(None))

    def test_garbage_is_refused_with_the_offset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NEUTRON_DOUBLE", "garbage")
        converted = sdk.convert(request(), sdk.choose_converter(None))
        with pytest.raises(ValueError, match="byte 4: expected the identifier 'TFL3'"):
            device_payload(HEADER, converted.tflite)

    def test_a_hang_ends_at_the_time_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NEUTRON_DOUBLE", "hang")
        start = time.monotonic()
        with pytest.raises(ConverterError, match="did not end within 2 s"):
            sdk.convert(request(), sdk.choose_converter(None), time_limit=2)
        assert time.monotonic() - start < QUICK

    def test_unknown_flags_and_targets_are_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ConverterError, match=r"has no field 'fastMath'; its fields are .*fetchConstantsToSRAM"):
            sdk.convert(request(fastMath=True), sdk.choose_converter(None))
        wrong = sdk.Conversion(model(), "imx943", sdk.DEFAULT_FLAGS)
        with pytest.raises(ConverterError, match=r"no target 'imx943'; its targets are imxrt700, imx95, mcxn94x"):
            sdk.convert(wrong, sdk.choose_converter(None))

    @pytest.mark.parametrize("content", [b'#include "../x.h"', b"", b"/* open"])
    def test_a_wrong_kernel_selection_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / sdk.KERNEL_SELECTION).write_bytes(content)
        (tmp_path / "converted.tflite").write_bytes(b"TFL3")
        with pytest.raises(ConverterError, match=r"wrote a wrong kernel selection \(_kernel_selection.c"):
            sdk._read_answer(tmp_path, "a model", sdk.choose_converter(None), "log")

    def test_kernel_selection_comes_back(self) -> None:
        converted = sdk.convert(request(dumpKernelSelectionCode=True), sdk.choose_converter(None))
        assert converted.kernel_selection == f"// kernels of {len(model())} bytes\n"

    def test_a_conversion_leaves_no_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.chdir(tmp_path)
        sdk.convert(request(dumpKernelSelectionCode=True), sdk.choose_converter(None))
        assert os.listdir(tmp_path) == []


class TestCache:
    def test_an_unchanged_partition_is_not_converted_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NEUTRON_DOUBLE_COUNT", str(tmp_path / "runs"))
        converter, cache = sdk.choose_converter(None), tmp_path / "cache"
        first = sdk.convert(request(), converter, cache=cache)
        assert sdk.convert(request(), converter, cache=cache) == first
        assert (tmp_path / "runs").read_text().count("run") == 1
        others = (
            (request(fetchConstantsToSRAM=True), converter),
            (sdk.Conversion(model(), "imx95", sdk.DEFAULT_FLAGS), converter),
            (sdk.Conversion(model(16), "imxrt700", sdk.DEFAULT_FLAGS), converter),
            (request(), sdk.choose_converter("SDK_25_06")),
        )
        for other, by in others:
            sdk.convert(other, by, cache=cache)
        assert (tmp_path / "runs").read_text().count("run") == 1 + len(others)

    def test_failures_are_not_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NEUTRON_DOUBLE", "exit")
        with pytest.raises(ConverterError):
            sdk.convert(request(), sdk.choose_converter(None), cache=tmp_path)
        monkeypatch.delenv("NEUTRON_DOUBLE")
        sdk.convert(request(), sdk.choose_converter(None), cache=tmp_path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [("*.tflite", b"TFL3"), ("answer.json", b'{"log": "", '), ("answer.json", b"[]"), ("answer.json", b"{}"),
         ("answer.json", b'{"sha256": "../../secret", "log": "", "kernel_selection": null}')],
    )  # fmt: skip
    def test_a_damaged_entry_is_made_again(self, tmp_path: Path, name: str, content: bytes) -> None:
        first = sdk.convert(request(), sdk.choose_converter(None), cache=tmp_path)
        (entry,) = tmp_path.iterdir()
        (file,) = entry.glob(name)
        file.write_bytes(content)
        with pytest.warns(sdk.ConverterWarning, match=r"cannot be read: it is damaged\. The converter runs again"):
            assert sdk.convert(request(), sdk.choose_converter(None), cache=tmp_path) == first
        assert sdk.convert(request(), sdk.choose_converter(None), cache=tmp_path) == first

    def test_an_entry_without_its_model_is_made_again(self, tmp_path: Path) -> None:
        first = sdk.convert(request(), sdk.choose_converter(None), cache=tmp_path)
        (model_file,) = tmp_path.glob("*/*.tflite")
        model_file.unlink()
        assert sdk.convert(request(), sdk.choose_converter(None), cache=tmp_path) == first

    def test_a_cache_that_cannot_be_written_is_a_warning(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_bytes(b"")  # a file in the place of the folder
        with pytest.warns(
            sdk.ConverterWarning, match=r"not kept in the cache: Cannot create .*[^.]\. Set OPENNEUTRON_CACHE"
        ):
            converted = sdk.convert(request(), sdk.choose_converter(None), cache=tmp_path / "cache")
        assert converted.tflite

    def test_a_cache_on_a_full_disk_is_a_warning(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.warns(
            sdk.ConverterWarning, match=r"No space left on device\. .*another disk\. Set OPENNEUTRON_CACHE"
        ):
            sdk.convert(request(), sdk.choose_converter(None), cache=tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    def test_two_processes_that_write_one_entry(self, tmp_path: Path) -> None:
        """The converter may return different models for one request; the entry contains one of them completely."""
        converter = sdk.choose_converter(None)
        one = sdk.convert(request(), converter, cache=tmp_path)
        (entry,) = tmp_path.iterdir()
        other = sdk.Converted(one.tflite + b"other", "another log", None)
        (entry / sdk._cached_model("1" * 64)).write_bytes(other.tflite)  # its answer file is not written yet
        assert sdk.convert(request(), converter, cache=tmp_path) == one
        sdk._write_cache(entry, other)
        assert sdk.convert(request(), converter, cache=tmp_path) == other


def test_several_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [sdk.Conversion(model(size), "imxrt700", sdk.DEFAULT_FLAGS) for size in (8, 16, 24, 32)]
    converted = sdk.convert_all(requests, sdk.choose_converter(None))
    assert [len(tflite.read(one.tflite).subgraphs[0].operators) for one in converted] == [1, 1, 1, 1]
    assert [tflite.read(one.tflite).subgraphs[0].inputs[0].shape for one in converted] == [
        (1, 8), (1, 16), (1, 24), (1, 32),
    ]  # fmt: skip
