"""Paths in the arguments of verbs: wrong ones are refused with near matches, and unusual ones work."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.builds import SOURCE, Here, run

BEGINS = {".pt2": b"PK", ".pte": b"\x20\x00\x00\x00ET12"}
"""The first bytes of files, by which verbs refuse files of other kinds."""
DEVICE = ("lower", "q.pt2", "--payload", "device", "--flavor", "SDK_24_01")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files that are looked up, but not read."""
    found = tmp_path_factory.mktemp("paths")
    (found / "sub dir").mkdir()
    (found / "photos").mkdir()
    (found / "built").mkdir()
    (found / "sub dir" / "net.py").write_text(SOURCE)
    (found / "net.py").write_text(SOURCE)
    (found / "packed").mkdir()
    (found / "packed" / "manifest.json").write_text('{"name": "net"}')
    builds = ("built/model.pte", "built/quantized.pt2", "built/summary.json", "built/openneutron.toml")
    in_folders = ("photos/a.png", "photos/out.npy", "packed/net.pte", "packed/test_vectors.bin", *builds)
    (found / "text.pt2").write_text("no archive")
    (found / "no.npz").write_text("no archive")
    (found / "zipped").write_bytes(b"PK")
    for name in ("model.pte", "board.log", "openneutron.toml", "q.pt2", "a.npy", *in_folders):
        (found / name).write_bytes(BEGINS.get(Path(name).suffix, b""))
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "modle.pte"), "file: 'modle.pte' does not exist. Did you mean 'model.pte'?"),
        (("lower", "photos"), "The folder 'photos' has no quantized.pt2. Give the folder of a build, or a quantized"),
        (("compare", "model.pte", "model.pt"), "second: 'model.pt' does not exist. Did you mean 'model.pte'?"),
        (("report", "no/model.pte"), "program: 'no/model.pte' does not exist. The folder 'no' does not exist."),
        (("report", "model.pte", "--other", "modl.pte"), "other: 'modl.pte' does not exist. Did you mean 'model.pte'?"),
        (("validate", "model.pte", "--against", "bord.log"), "against: 'bord.log' does not exist. Did you mean"),
        (("profile", "photos", "--program", "model.pte"), "profile: 'photos' is a folder. Give a file."),
        (("fit-costs", "a.etdp", "--program", "model.pte", "-o", "b.toml"), "profiles: 'a.etdp' does not exist."),
        (
            ("build", "-c", "openneutron.tml"),
            "config: 'openneutron.tml' does not exist. Did you mean 'openn",
        ),
        (("build", "net.py:Net", "--calibrate", "photo"), "calibrate: 'photo' does not exist. Did you mean 'photos'?"),
        (("build", "net.py:Net", "--calibrate", "no/photos"), "The folder 'no' does not exist."),
        (("build", "nett.py:Net", "--calibrate", "photos"), "'nett.py', which does not exist. Did you mean 'net.py'?"),
        (("build", "C:\\models\\net.py:Net", "--calibrate", "photos"), "'C:\\models\\net.py', which does not exist."),
        (("analyze", "--quantized", "model.pte"), "'model.pte' is not a quantized model (.pt2). Give the file that"),
        (("evaluate", "model.pte", "--quantized", "a.npy"), "'a.npy' is not a quantized model (.pt2)."),
        (("validate", "model.pte", "--quantized", "text.pt2"), "'text.pt2' is not a quantized model (.pt2)."),
        (("inspect", "model.pte", "--try-changes", "--quantized", "a.npy"), "'a.npy' is not a quantized model (.pt2)."),
        (("report", "model.pte", "--try-changes", "--quantized", "a.npy"), "'a.npy' is not a quantized model (.pt2)."),
        (("extract", "model.pte", "-o", "x", "--quantized", "a.npy"), "'a.npy' is not a quantized model (.pt2)."),
        (("lower", "text.pt2"), "'text.pt2' is not a quantized model (.pt2)."),
        (("inspect", "model.pte", "--quantized", "q.pt2"), "--quantized is for --try-changes. Give both,"),
        (("report", "model.pte", "--quantized", "q.pt2"), "--quantized is for --try-changes. Give both,"),
        (("extract", "model.pte", "-o", "x", "--quantized", "q.pt2"), "--quantized is for --model-explorer. Give both"),
        (
            ("package", "model.pte", "--vectors", "0"),
            "vectors: 0 is not a valid number of test vectors. Give 1 or more,",
        ),
        (
            ("package", "model.pte", "--vectors", "-3"),
            "vectors: -3 is not a valid number of test vectors. Give 1 or more,",
        ),
        (("package", "model.pte", "--vectors=--5"), "vectors: '--5' does not exist."),
        (("package", "model.pte", "--vectors=+-5"), "vectors: '+-5' does not exist."),
        (("package", "model.pte", "--vectors=²"), "vectors: '²' does not exist."),
        (("package", "model.pte", "--vectors", "9" * 5000), "Cannot read '999"),
        (("package", "model.pte", "--vectors", "b.npy"), "vectors: 'b.npy' does not exist. Did you mean 'a.npy'?"),
        (("package", "model.pte", "--vectors", "no.npz"), "'no.npz' is not a .npz file. Save the vectors with numpy.s"),
        (("package", "model.pte", "--vectors", "zipped", "-o", "photos"), "Cannot write the folder 'photos': it is"),
        (("package", "model.pte", "--vectors", "photos"), "vectors: 'photos' is a folder. Give a file."),
        (
            ("fit-costs", "board.log", "--program", "model.pte", "-o", "b.txt"),
            "'b.txt' is not the name of a board file.",
        ),
        (("fit-costs", "board.log", "--program", "model.pte", "-o", "no/b.toml"), "the folder 'no' does not exist."),
        (DEVICE, "no converter for neutron_converter_flav"),
        (
            ("build", "net.py:Net", "--calibrate", "photos", "--payload", "device", "--flavor", "SDK_24_01"),
            "no converter for neutron_converter_flavor='SDK_24_01'",
        ),
        (("analyze", "--quantized", "photos"), "quantized: 'photos' is a folder. Give a file."),
        (("analyze", "--quantized", "modl.pte"), "quantized: 'modl.pte' does not exist. Did you mean 'model.pte'?"),
        (("run", "model.pte", "--", ""), "An argument is empty. Give a value"),
        (("run", "model.pte", "--", "--date="), "The file '--date=' does not exist."),
        (("run", "photos", "photos/a.png"), "has no model.pte. Give the folder of a build, of a package, or a"),
        (("run", "model.pte", "photos/b.png"), "The file 'photos/b.png' does not exist. Did you mean 'a.png'?"),
        (("run", "model.pte", "x=photos/b.png"), "The file 'photos/b.png' does not exist. Did you mean 'a.png'?"),
        (("run", "model.pte", "photos", "-o", "x.txt"), "'x.txt' must be a .npy or a .npz file."),
        (("inspect", "photos"), "The folder 'photos' has no model.pte."),
        (("report", "model.pte", "-o", "model.pte"), "Cannot write 'model.pte': it is an input of this command."),
        (("report", "built", "-o", "built/quantized.pt2"), "it is an input of this command. Give another path."),
        (("report", "built", "-o", "built/summary.json"), "it is an input of this command. Give another path."),
        (("report", "built", "--csv", "built/quantized.pt2"), "it is an input of this command. Give another path."),
        (("report", "built", "--csv", "built/summary.json"), "it is an input of this command. Give another path."),
        (("report", "built", "--csv", "built/openneutron.toml"), "it is an input of this command."),
        (("report", "model.pte", "--other", "built", "--csv", "built/model.pte"), "it is an input of this command."),
        (("report", "model.pte", "--other", "built", "-o", "built/summary.json"), "it is an input of this command."),
        (
            ("report", "model.pte", "--try-changes", "--quantized", "q.pt2", "--csv", "q.pt2"),
            "it is an input of this command. Give another path.",
        ),
        (("report", "packed", "--csv", "packed/net.pte"), "it is an input of this command. Give another path."),
        (("compile", "built", "-o", "built/quantized.pt2"), "it is an input of this command. Give another path."),
        (("compile", "packed", "-o", "packed/manifest.json"), "it is an input of this command. Give another path."),
        (("profile", "board.log", "--program", "built", "-o", "built/model.pte"), "it is an input of this command."),
        (("profile", "board.log", "--program", "packed", "-o", "packed/net.pte"), "it is an input of this command."),
        (
            ("fit-costs", "board.log", "--program", "built", "-o", "built/openneutron.toml"),
            "it is an input of this command. Give another path.",
        ),
        (("compile", "model.pte", "-o", "photos/../model.pte"), "it is an input of this command. Give another path."),
        (("lower", "q.pt2", "-o", "q.pt2"), "it is an input of this command. Give another path."),
        (("quantize", "q.pt2", "--calibrate", "photos", "-o", "q.pt2"), "it is an input of this command."),
        (("profile", "board.log", "--program", "model.pte", "-o", "board.log"), "it is an input of this command."),
        (("compile", "built", "-o", "built/model.pte"), "it is an input of this command. Give another path."),
        (("lower", "built", "-o", "built/quantized.pt2"), "it is an input of this command. Give another path."),
        (("run", "model.pte", "photos", "-o", "photos/out.npy"), "it is an input of this command. Give another path."),
        (("run", "model.pte", "photos", "-o", "a.npy", "--config", "a.npy"), "it is an input of this command."),
        (("run", "model.pte", "a.npy", "-o", "a.npy"), "it is an input of this command. Give another path."),
        (("compile", "model.pte", "-o", "x.pte", "--intermediates-dir", "no"), "intermediates_dir: 'no' does not"),
        (
            ("compile", "model.pte", "-o", "photos/out.npy", "--intermediates-dir", "photos", "--flavor", "SDK_24_01"),
            "no converter for",
        ),
        (
            (*DEVICE, "-o", "photos/out.npy", "--intermediates-dir", "photos"),
            "no converter for neutron_converter_flavor='SDK_24_01'",
        ),
        (("run", "model.pte", "photos", "--top", "0"), "Input should be greater than or equal to 1"),
        (("run", "model.pte", "photos", "--repeat", "-3"), "Input should be greater than or equal to 1"),
        (("evaluate", "model.pte", "--jobs", "0"), "Input should be greater than or equal to 1"),
        (("validate", "model.pte", "--samples", "0"), "Input should be greater than or equal to 1"),
        (("validate", "model.pte", "--max-lsb", "-1"), "Input should be greater than or equal to 0"),
        (("compare", "model.pte", "model.pte", "--samples", "0"), "Input should be greater than or equal to 1"),
        (("compile", "model.pte", "-o", "x.pte", "--time-limit", "0"), "Input should be greater than or equal to 0.1"),
        (("inspect", "model.pte", "--target", "imx9"), "Unknown target 'imx9'. Did you mean 'imx95'"),
        (("report", "model.pte", "--target", "imx9"), "Unknown target 'imx9'. Did you mean 'imx95'"),
        (("compare", "model.pte", "model.pte", "--target", "imx9"), "Unknown target 'imx9'. Did you mean"),
        (("lower", "q.pt2", "--target", "imx9"), "Unknown target 'imx9'. Did you mean 'imx95'"),
        (("doctor", "--target", "imx9"), "Unknown target 'imx9'. Did you mean 'imx95'"),
        (("doctor", "--flavor", "25"), "neutron_converter_flavor '25' is neither an SDK release"),
        (("operators", "conv", "--flavor", "25"), "neutron_converter_flavor '25' is neither an SDK release"),
        (("compile", "model.pte", "-o", "x.pte", "--flavor", "25"), "'25' is neither an SDK release"),
        (("profile", "board.log", "--program", "model.pte", "--target", "imx9"), "Unknown target 'imx9'."),
        (("report", "model.pte", "-o", "photos"), "Cannot write 'photos': it is a folder."),
        (("report", "model.pte", "-o", "no/page.html"), "Cannot write 'no/page.html': the folder 'no' does not exist."),
        (("profile", "board.log", "--program", "model.pte", "-o", "no/p.html"), "the folder 'no' does not exist."),
        (("compile", "model.pte", "-o", "photos"), "Cannot write 'photos': it is a folder."),
        (("package", "model.pte", "-o", "photos"), "Cannot write the folder 'photos': it is not empty."),
    ],
)
def test_a_wrong_path_is_named_at_once(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(folder, *arguments)
    assert result.code == 2, result.text
    assert message in " ".join(result.err.replace("│", " ").split())
    assert result.out == ""


@pytest.mark.skipif(os.sep != "/", reason="here, backslashes separate folders")
def test_backslashes_for_slashes(folder: Path) -> None:
    result = run(folder, "build", "sub dir\\net.py:Net", "--calibrate", "photos")
    assert result.code == 2
    assert "Did you mean 'sub dir/net.py'?" in result.err


def test_commands_in_the_output_quote_paths(here: Here, tmp_path: Path) -> None:
    for arguments in (
        ("init", tmp_path / "my file.toml"),
        ("targets", "show", "imxrt700", "-o", tmp_path / "my b.toml"),
    ):
        result = here(*arguments)
        assert result.code == 0, result.text
        assert shlex.quote(str(arguments[-1])) in result.out


@pytest.mark.slow
def test_spaces_and_other_letters_and_another_folder(built: Path, tmp_path: Path) -> None:
    moved = tmp_path / "größe (neu) 日本"
    shutil.copytree(built, moved)
    other = tmp_path / "elsewhere"
    other.mkdir()
    image = Path(os.path.relpath(built.parent / "labelled/left/000.png", other))
    program = Path(os.path.relpath(moved, other))
    for arguments in (
        ("inspect", program),
        ("run", program / "model.pte", image, "-o", program / "the output.npy", "--mean", "0.4", "--std", "0.2"),
        ("report", program, "-o", program / "the page.html"),
        ("package", program, "-o", program / "the firmware"),
    ):
        result = run(other, *arguments)
        assert result.code == 0, result.text
    assert sorted(path.name for path in moved.iterdir() if path.name.startswith("the ")) == [
        "the firmware", "the output.npy", "the page.html",
    ]  # fmt: skip
    assert not list(other.iterdir())


def test_an_output_that_is_a_link(here: Here, built: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    links = [tmp_path / name for name in ("page.html", "firmware", "extracted")]
    for link in links:
        link.symlink_to(tmp_path / "real" / link.name)
    for verb, link in zip(("report", "package", "extract"), links, strict=True):
        assert here(verb, built, "-o", link).code == 0
        assert link.is_symlink()
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["extracted", "firmware", "page.html"]


@pytest.mark.parametrize("arguments", [("operators",), ("operators", "--json"), ("targets", "--json"), ("build", "-h")])
def test_a_pipe_that_is_closed_early(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "openneutron", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert errors == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns", [30, 80, 300])
@pytest.mark.parametrize("variable", ["NO_COLOR", None])
def test_terminals(tmp_path: Path, columns: int, variable: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"COLUMNS": str(columns), "TERM": "xterm-256color", **({variable: "1"} if variable else {})}
    text = in_terminal(tmp_path, environment, "build", "nett.py:Net", "--calibrate", "photos")
    assert "error" in text
    assert ("\x1b[1;31m" in text) is (variable is None)
    assert "does not exist" in " ".join(text.split())


def in_terminal(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    """Returns what a verb prints to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "openneutron", *arguments]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        text = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                read = os.read(ours, 4096)
            except OSError:  # Linux reports the end of a terminal as an error
                break
            if not read:
                break
            text += read
        process.wait()
    os.close(ours)
    return text.decode()
