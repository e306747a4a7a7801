"""The readers of files, each with example files and with byte strings that mutations insert."""

from __future__ import annotations

import functools
import importlib
import io
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

from tests.fuzz.data_readers import DATA_READERS
from tests.fuzz.reader import Reader, in_file, program
from tests.profiling.test_reading import a_run, etdump, records

from openneutron.cpu.signatures import signature_of
from openneutron.formats import pte, pte_check, tflite
from openneutron.formats.payload import parse
from openneutron.model.arguments import Leaf, leaves_from_text, paths_from_tree, text_of_leaves
from openneutron.page import Summary, summarize
from openneutron.page.codec import from_json
from openneutron.profiling import read_profile
from openneutron.report.inspect import inspect_bytes
from openneutron.settings import Settings, template
from openneutron.settings.toml import read_settings, settings_text
from openneutron.targets import Board, NeutronTargetSpec, read_board, text_of_board
from openneutron.vendor.profiling import kernels_of

__all__ = ["READERS"]

DOUBLES = Path(__file__).parents[1] / "doubles"


@functools.cache
def _payload() -> bytes:
    return bytes(pte.read(program()).methods[0].delegates[0].payload)


@functools.cache
def _model() -> bytes:
    return bytes(parse(_payload()).tflite)


def _read_pte(data: bytes) -> None:
    pte.read(data)
    pte_check.check(data, signature_of)


def _read_log(data: bytes) -> None:
    kernels_of(data.decode(errors="replace"), _model())


@functools.cache
def _log() -> bytes:
    sys.path.insert(0, str(DOUBLES))
    try:
        neutron_converter = importlib.import_module("eiq_neutron_sdk.neutron_converter")
    finally:  # other tests of the process need to find no converter
        sys.path.remove(str(DOUBLES))
        for name in [name for name in sys.modules if name.startswith("eiq_neutron_sdk")]:
            del sys.modules[name]
    with redirect_stdout(io.StringIO()) as shown:
        neutron_converter._print_graphs(_model())
    return shown.getvalue().encode()


@functools.cache
def _summary() -> bytes:
    return summarize("Net", program()).as_json().encode()


def _read_leaves(data: bytes) -> None:
    text = data.decode(errors="replace")
    with suppress(ValueError):  # `load` makes a HostError of it
        leaves_from_text(text)
    paths_from_tree(text)


_LEAF = '{"type": null, "context": null, "children_spec": []}'
_ARGUMENTS = f'{{"type": "builtins.tuple", "context": "null", "children_spec": [{_LEAF}]}}'
_NAMED = '{"type": "builtins.dict", "context": "[]", "children_spec": []}'
_TREE = f'[1, {{"type": "builtins.tuple", "context": "null", "children_spec": [{_ARGUMENTS}, {_NAMED}]}}]'.encode()
_TOML = (
    b"[",
    b"]",
    b"=",
    b'"',
    b'"""',
    b"'",
    b"\n",
    b"[[",
    b"true",
    b"inf",
    b"nan",
    b"-",
    b"1e999",
    b"0x",
    b"1979-05-27",
)

READERS: dict[str, Reader] = {
    **DATA_READERS,
    "pte": Reader(_read_pte, lambda: [program()], (b"ET12", b"eh00", b"aten::add", b"forward", b"\xff\xff\xff\xff")),
    "tflite": Reader(tflite.read, lambda: [_model()], (b"TFL3", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff")),
    "inspect": Reader(lambda data: inspect_bytes(data, "the file"), lambda: [program(), _model()], (b"TFL3", b"ET12")),
    "payload": Reader(parse, lambda: [_payload()], (b"NTR0", b"\0" * 16, b"\xff" * 4)),
    "log": Reader(
        _read_log, lambda: [_log()], (b"Location: ", b"Inputs:\n", b"Kernels:\n", b"subgraph_", b"NeutronGraph")
    ),
    "profile": Reader(
        in_file(read_profile, ".etdp"),
        lambda: [etdump([a_run(1), a_run(2)]), records([3, 4, 5]), f"PROFILE 0 0 {records([3, 4]).hex()}\n".encode()],
        (b"ED00", b"PROFILE ", b"DELEGATE_CALL", b"\xff\xfe", b"native_call_"),
    ),
    "settings": Reader(in_file(read_settings, ".toml"), lambda: [template().encode(), _settings()], _TOML),
    "board": Reader(
        in_file(read_board, ".toml"),
        lambda: [text_of_board(board).encode() for board in _boards()],
        (*_TOML, b"based_on", b"regions", b"placement", b"costs", b"clocks", b"size", b"0x20000000"),
    ),
    "summary": Reader(
        lambda data: from_json(Summary, data, "the file"),
        lambda: [_summary()],
        (b"null", b"[]", b"{}", b"1e999", b"NaN"),
    ),
    "leaves": Reader(
        _read_leaves,
        lambda: [text_of_leaves([Leaf(("x", 0)), Leaf(("y",), False, "text")]).encode(), _TREE],
        (b"null", b"[]", b"{}", b"path", b"true"),
    ),
}


def _settings() -> bytes:
    given = {"model": "net.py:Net", "input": ["1,1,8,8"], "mean": [0.4], "target": "imxrt700", "recover": "fast"}
    return settings_text(Settings.of(given), Path()).encode()


def _boards() -> list[Board]:
    names = ("mimxrt700_evk", "frdm_mcxn947")
    return [board for name in names if (board := NeutronTargetSpec(name).neutron_target.board) is not None]
