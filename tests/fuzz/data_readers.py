"""The readers of data, checkpoints, packages and outputs of boards, each with example files."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
import struct
import tempfile
import wave
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from tests.fuzz.mutations import mutated
from tests.fuzz.reader import Reader, in_file, in_folder, program, quantized
from tests.mutants import mutants_of
from tests.profiling.test_join_and_fit import Net
from tests.profiling.test_reading import records
from torch import nn

from openneutron import load, lower, quantize
from openneutron.accuracy.board_dump import BoardTensor, read_dump
from openneutron.accuracy.board_package import read_package
from openneutron.accuracy.board_tensors import board_outputs
from openneutron.accuracy.compare_programs import compare_outputs
from openneutron.data.labels import read_labels
from openneutron.data.samples import read_data
from openneutron.data.sources import read_value
from openneutron.firmware.packaging import package
from openneutron.firmware.ports import input_ports, output_ports
from openneutron.firmware.vectors import read_vectors
from openneutron.formats import pte
from openneutron.formats.kernel_selection import kernel_selection_in
from openneutron.model.weights import load_weights
from openneutron.page import Summary, summarize
from openneutron.page.codec import from_json
from openneutron.page.html import page_of
from openneutron.profiling import fit_costs, read_profile, with_profile
from openneutron.settings.package_files import MANIFEST, VECTORS
from openneutron.targets import Costs
from openneutron.vendor.sdk import _read_cache
from openneutron.workflow.profiles import profiled_summary

__all__ = ["DATA_READERS"]


def _bytes_of(write: Callable[[Any], object]) -> bytes:
    """Returns what `write` writes to a file."""
    with io.BytesIO() as file:
        write(file)
        return file.getvalue()


def _read_samples(path: Path) -> None:
    for _ in zip(range(4), read_data(path), strict=False):
        pass


def _read_array(path: Path) -> None:
    if read_value(path).ndim:
        _read_samples(path)


def _arrays() -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.arange(12, dtype=np.float32).reshape(4, 3), "labels": np.array([0, 1, 1, 0])}


def _save(array: np.ndarray[Any, Any], file: Any) -> None:
    np.save(file, array)


def _npy() -> list[bytes]:
    arrays = (_arrays()["x"], np.zeros((2, 2), ">i2"), np.array(1.5), np.zeros(2, [("a", "<i4"), ("b", "<f8", 2)]))
    return [_bytes_of(functools.partial(_save, array)) for array in arrays]


def _with_array(folder: Path) -> None:
    np.save(folder / "a.npy", _arrays()["x"])


def _npz() -> list[bytes]:
    arrays: Any = _arrays()
    return [
        _bytes_of(lambda file: np.savez(file, **arrays)),
        _bytes_of(lambda file: np.savez_compressed(file, **arrays)),
    ]


def _recording(width: int, channels: int) -> bytes:
    with io.BytesIO() as file:
        with wave.open(file, "wb") as recording:
            recording.setparams((channels, width, 8000, 0, "NONE", "not compressed"))
            recording.writeframes(bytes(range(24)) * channels)
        return file.getvalue()


def _picture(form: str, mode: str = "RGB") -> bytes:
    picture = Image.frombytes("RGB", (5, 4), bytes(range(60))).convert(mode)
    return _bytes_of(lambda file: picture.save(file, form))


def _checkpoints() -> list[bytes]:
    state = nn.Conv2d(1, 2, 3).state_dict()
    nested = {"state_dict": state, "epoch": 3, "best": 0.5, "args": ["a", None]}
    return [
        _bytes_of(lambda file: torch.save(state, file)),
        _bytes_of(lambda file: torch.save(nested, file)),
        _bytes_of(lambda file: torch.save(nested, file, _use_new_zipfile_serialization=False)),
    ]


def _load_weights(path: Path) -> None:
    load_weights(nn.Conv2d(1, 2, 3), path)


def _damaged_archive(data: bytes, chance: random.Random) -> bytes:
    """Changes the name or the contents of a member of a zip archive. Changes the bytes of another file."""
    if not data.startswith(b"PK"):
        return mutated(data, [data], (), chance)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {entry: archive.read(entry) for entry in archive.infolist()}
    changed = chance.choice(list(members))
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for entry, content in members.items():
                name, is_changed = entry.filename, entry is changed
                if is_changed and chance.random() < 0.1:
                    name = chance.choice(["../x", name + "\0", "é", "a" * 300, "labels.npy"])
                archive.writestr(name, mutated(content, list(members.values()), (), chance) if is_changed else content)
        return file.getvalue()


def _damaged_png(data: bytes, chance: random.Random) -> bytes:
    """Changes the content of a chunk of a PNG, before or after its compression."""
    at, chunks = 8, []
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    changed = chance.randrange(len(chunks))
    kind, content = chunks[changed]
    if kind == b"IDAT" and chance.random() < 0.5:
        content = zlib.compress(mutated(zlib.decompress(content), [data], (), chance))
    else:
        content = mutated(content, [data], (), chance)
    chunks[changed] = kind, content
    parts = (struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
             for kind, content in chunks)  # fmt: skip
    return data[:8] + b"".join(parts)


@functools.cache
def _summary() -> bytes:
    return summarize("Net", program()).as_json().encode()


def _draw_page(data: bytes) -> None:
    page_of(from_json(Summary, data, "the file"))


@functools.cache
def _packaged() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        package(program(), Path(folder, "made"), vectors=2)
        return {path.name: path.read_bytes() for path in Path(folder, "made").iterdir()}


def _with_package(folder: Path) -> None:
    for name, content in _packaged().items():
        if name.endswith(".pte") or name in (MANIFEST, VECTORS):
            (folder / name).write_bytes(content)


@functools.cache
def _outputs() -> tuple[BoardTensor, ...]:
    return board_outputs(load(program()))


def _dumps() -> list[bytes]:
    outputs = [np.zeros(one.shape, one.dtype) for one in _outputs()]
    log = "".join(f"OUTPUT 0 {i} 0 {one.tobytes().hex()}\n" for i, one in enumerate(outputs)).encode()
    return [
        b"".join(one.tobytes() for one in outputs), log, _bytes_of(lambda file: np.save(file, outputs[0])),
        _bytes_of(lambda file: np.savez(file, *outputs)),
    ]  # fmt: skip


def _vectors() -> list[bytes]:
    arrays: Any = {"input0": np.zeros((2, 1, 3, 6, 6), np.float32), "output0": np.zeros((2, 1, 2, 4, 4), np.float32)}
    return [_bytes_of(lambda file: np.savez(file, **arrays))]


def _read_vectors(path: Path) -> None:
    host = load(program())
    (method,) = (method for method in pte.read(program()).methods if method.name == "forward")
    read_vectors(path, input_ports(host, method), output_ports(host, method))


@functools.cache
def _fitted() -> Summary:
    torch.manual_seed(0)
    data = [torch.randn(1, 8, 16, 16) for _ in range(4)]
    return summarize("Net", lower(quantize(Net().eval(), (data[0],), data, recover=None), payload="portable"))


def _profiles() -> list[bytes]:
    data = records([layer.cycles // 2 for layer in _fitted().layers])
    return [data, f"PROFILE 0 0 {data.hex()}\n".encode()]


def _fit(path: Path) -> None:
    fit_costs([with_profile(_fitted(), read_profile(path))], Costs())


def _damaged_program(data: bytes, chance: random.Random) -> bytes:
    """Changes numbers that the readers of a program read, or its payloads, with right checksums."""
    return next(mutants_of(data, True, chance)).data()


def _read_packaged_program(data: bytes) -> None:
    (name,) = (name for name in _packaged() if name.endswith(".pte"))
    in_folder(read_package, name, _with_package)(data)


def _compare(data: bytes) -> None:
    compare_outputs(program(), data, samples=1)


def _with_profile_of_board(folder: Path) -> None:
    (folder / "board.log").write_bytes(_profiles()[1])
    (folder / "model.pte").write_bytes(program())


def _profile(folder: Path) -> None:
    profiled_summary(folder / "board.log", folder)


def _cached() -> Iterator[bytes]:
    digest = hashlib.sha256(b"model").hexdigest()
    yield json.dumps({"log": "a log", "kernel_selection": None, "sha256": digest}).encode()
    yield json.dumps({"log": "", "kernel_selection": "// kernels\n", "sha256": digest}).encode()


def _with_cached_model(folder: Path) -> None:
    (folder / f"{hashlib.sha256(b'model').hexdigest()}.tflite").write_bytes(b"model")


def _damaged_image(data: bytes, chance: random.Random) -> bytes:
    is_png = data.startswith(b"\x89PNG\r\n")
    return _damaged_png(data, chance) if is_png else mutated(data, [data], (), chance)


def _images() -> list[bytes]:
    forms = (
        ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("BMP", "RGB"),
        ("GIF", "P"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("TIFF", "1"), ("PPM", "L"),
    )  # fmt: skip
    return [_picture(form, mode) for form, mode in forms]


_TABLES = (b",", b'"', b"\n", b"\r\n", b";", b"\t", b"nan", b"1e999", b"label", b"path", b"\xef\xbb\xbf", b"0", b"\0")
_JSON = (b"null", b"[]", b"{}", b"1e999", b"NaN", b"true", b"-1", b"0.5", b'"\\ud800"', 5000 * b"[", 5000 * b"1")
_NUMPY = (b"\x93NUMPY", b"'descr': ", b"'<f4'", b"'|O'", b"'>c16'", b"'shape': (", b"'fortran_order': True", b"9" * 20)

DATA_READERS: dict[str, Reader] = {
    "npy": Reader(in_file(_read_array, ".npy"), _npy, _NUMPY),
    "npz": Reader(in_file(_read_samples, ".npz"), _npz, _NUMPY, _damaged_archive),
    "wav": Reader(
        in_file(_read_samples, ".wav"),
        lambda: [_recording(width, channels) for width, channels in ((1, 1), (2, 2), (3, 1), (4, 1))],
        (b"RIFF", b"WAVE", b"fmt ", b"data", b"LIST", b"\xff\xff\xff\xff", b"\0\0\0\0"),
    ),
    "csv": Reader(
        in_file(_read_samples, ".csv"),
        lambda: [b"a,b,label\n1,2,0\n3.5,-4e3,1\n", b'"a";"b"\n1;2\n', b",0,1\n0,5,6\n1,7,8\n"],
        _TABLES,
    ),
    "list": Reader(
        in_folder(lambda folder: _read_samples(folder / "list.txt"), "list.txt", _with_array),
        lambda: [b"a.npy 0\na.npy 1\n"],
        (*_TABLES, b"../", b"/dev/zero"),
    ),
    "labels": Reader(in_file(read_labels, ".txt"), lambda: [b"n01440764 tench, Tinca tinca\ncat\n"], _TABLES),
    "labels_json": Reader(
        in_file(read_labels, ".json"),
        lambda: [b'["cat", "dog"]', b'{"0": "cat", "1": ["n0", "dog"]}', b'{"cat": 0, "dog": 1}'],
        _JSON,
    ),
    "image": Reader(
        in_file(_read_samples, ".png"),
        _images,
        (b"IDAT", b"IEND", b"acTL", b"\xff\xd8", b"II*\0"),
        _damaged_image,
        memory=4 * 179_000_000,  # Pillow refuses larger images
    ),
    "checkpoint": Reader(
        in_file(_load_weights, ".pt"), _checkpoints, (b"cos\nsystem\n", b"ctorch\n", b"Q\0"), _damaged_archive
    ),
    "safetensors": Reader(
        in_file(_load_weights, ".safetensors"),
        lambda: [safetensors.torch.save(nn.Conv2d(1, 2, 3).state_dict())],
        (*_JSON, b'"dtype":"F32"', b'"shape":[', b'"data_offsets":['),
    ),
    "quantized": Reader(
        in_file(lambda path: lower(path, payload="portable"), ".pt2"),
        lambda: [quantized().as_file()],
        _JSON,
        _damaged_archive,
        mutants=20,
    ),
    "page": Reader(_draw_page, lambda: [_summary()], _JSON, mutants=20),
    "manifest": Reader(
        in_folder(read_package, MANIFEST, _with_package),
        lambda: [_packaged()[MANIFEST]],
        (*_JSON, b"../", b'"name": '),
        mutants=100,
    ),
    "package_vectors": Reader(
        in_folder(read_package, VECTORS, _with_package), lambda: [_packaged()[VECTORS]], mutants=100
    ),
    "vectors": Reader(in_file(_read_vectors, ".npz"), _vectors, _NUMPY, _damaged_archive, mutants=100),
    "dump": Reader(lambda data: read_dump(data, _outputs()), _dumps, (b"OUTPUT 0 0 ", b"999999999", *_NUMPY), None),
    "kernel_selection": Reader(
        in_file(kernel_selection_in, ".c"),
        lambda: [b'#include "a.h"\n/* kernels */\nint a[] = {1};\n'],
        (b"#include <", b'"', b"/*", b"*/", b"//", b"\\\n", b"../", b"%:", b"\0"),
    ),
    "cached_conversion": Reader(
        in_folder(_read_cache, "answer.json", _with_cached_model), lambda: list(_cached()), _JSON
    ),
    "fit": Reader(in_file(_fit, ".log"), _profiles, (b"PROFILE 0 0 ", b"\xff" * 8, b"\0" * 8)),
    "compare": Reader(_compare, lambda: [program()], damage=_damaged_program, mutants=50),
    "packaged_program": Reader(_read_packaged_program, lambda: [program()], damage=_damaged_program, mutants=50),
    "summarized_program": Reader(
        lambda data: summarize("Net", data), lambda: [program()], damage=_damaged_program, mutants=50
    ),
    "profiled_build": Reader(
        in_folder(_profile, "summary.json", _with_profile_of_board), lambda: [_fitted().as_json().encode()], _JSON
    ),
}
