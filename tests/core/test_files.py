"""Files are written completely or not at all, and links, devices and pipes stay as they are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from openneutron.core.files import check_new_folder, check_output, write_file, write_folder
from openneutron.errors import OutputError


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="a device or a pipe"):
        write_file(tmp_path / "pipe", b"new")
    assert (tmp_path / "pipe").is_fifo()


def test_an_interruption_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> int:
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr("os.umask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_outputs_are_checked_before_they_are_made(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    with pytest.raises(OutputError, match="it is a folder"):
        check_output(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        check_output(tmp_path / "none" / "new")


class TestNewFolders:
    def test_right_paths(self, tmp_path: Path) -> None:
        check_new_folder(tmp_path / "new")
        (tmp_path / "empty").mkdir()
        write_folder(tmp_path / "empty", {"a": b"1"})
        assert (tmp_path / "empty" / "a").read_bytes() == b"1"

    def test_wrong_paths(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        (tmp_path / "loop").symlink_to("loop")
        for name, message in (
            ("", "is not empty"), ("file", "a file of this name"), ("none/new", "does not exist"),
            ("file/new", "does not exist"), ("loop", "Cannot write"), ("loop/new", "Cannot write"),
        ):  # fmt: skip
            with pytest.raises(OutputError, match=message):
                check_new_folder(tmp_path / name)

    @pytest.mark.parametrize("call", ["os.stat", "pathlib.Path.iterdir"])
    def test_folder_without_the_right_to_look_into_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        with monkeypatch.context() as patched:
            patched.setattr(call, refuse)
            found = error_of_new_folder(tmp_path)
        assert found is not None
        assert "Permission denied" in str(found)


def error_of_new_folder(path: Path) -> OutputError | None:
    try:
        check_new_folder(path)
    except OutputError as error:
        return error
    return None
