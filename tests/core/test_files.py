"""Files are written completely or not at all, and links, devices and pipes stay as they are."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openneutron import load
from openneutron.core.driver import Driver
from openneutron.core.files import (
    check_new_folder,
    check_output,
    created_folder,
    exists,
    is_file,
    is_folder,
    names_in,
    read_file,
    remove_folder,
    similar_path,
    write_file,
    write_files,
    write_folder,
)  # fmt: skip
from openneutron.data import check_data, read_data, read_value
from openneutron.data.inputs import check_files
from openneutron.errors import HostError, InputError, OpenNeutronError, OutputError
from openneutron.firmware.vectors import read_vectors
from openneutron.model.weights import read_checkpoint
from openneutron.settings.build_files import check_program, check_quantized, is_archive
from openneutron.settings.package_files import is_package
from openneutron.workflow.profiles import profiled_summary


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize(
    "read",
    [
        read_file,
        load,
        read_checkpoint,
        check_quantized,
        check_program,
        is_archive,
        read_value,
        read_data,
        check_data,
        lambda path: check_files([path]),
        lambda path: read_vectors(path, (), ()),
    ],
)
@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_a_pipe_and_a_device_are_not_read(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    """A pipe without a writer would never end the read."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OpenNeutronError, match=r"it is a device or a pipe\. Save its content to a file"):
        read(tmp_path / name)


def test_a_file_beyond_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    (tmp_path / "file").write_bytes(b"content")
    monkeypatch.setattr("os.fdopen", fail)
    with pytest.raises(InputError, match=r"too little memory for it\. Give a smaller file"):
        read_file(tmp_path / "file")


def test_the_rest_of_a_large_file_is_not_read(tmp_path: Path) -> None:
    """Its first bytes show that it is not a program."""
    with (tmp_path / "file.pte").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(HostError, match="not an ExecuTorch program"):
        load(tmp_path / "file.pte")


def test_an_interruption_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_output_paths_are_checked_before_the_first_step(tmp_path: Path) -> None:
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


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permissions of this kind")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o444])
def test_a_file_that_is_replaced_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old")
    path.chmod(mode)
    (tmp_path / "link").symlink_to("old")
    write_file(tmp_path / "link", b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    write_file(tmp_path / "new", b"new")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_rename_that_fails_leaves_the_files_before_it_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {tmp_path / name: b"new" for name in ("a", "b", "c")}
    for path in files:
        path.write_bytes(b"old")
    replace = os.replace

    def replace_all_but_b(source: Path, target: Path) -> None:
        if target.name == "b":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        replace(source, target)

    monkeypatch.setattr("os.replace", replace_all_but_b)
    with pytest.raises(OutputError, match="b': Operation not permitted"):
        write_files(files)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"a": b"new", "b": b"old", "c": b"old"}


@pytest.mark.parametrize("name", ["a\0b", "a\0b/c", "\ud800"], ids=["null", "folder", "surrogate"])
def test_characters_that_no_path_has(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match="has a character that no path has"):
        read_file(path)
    assert not exists(path)
    assert not is_file(path)
    assert not is_folder(path)
    assert names_in(path) == []
    for write in (check_output, check_new_folder, lambda it: write_file(it, b""), lambda it: write_folder(it, {})):
        with pytest.raises(OutputError, match="has a character that no path has"):
            write(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "\u6a21" * 85], ids=["ASCII", "Latin", "CJK"])
def test_names_of_the_largest_length(name: str, tmp_path: Path) -> None:
    """Most systems limit names to 255 bytes, some to 255 characters."""
    write_file(tmp_path / name, b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]
    (tmp_path / name).unlink()
    write_folder(tmp_path / name, {"file": b"new"})
    assert [path.name for path in tmp_path.rglob("*")] == [name, "file"]


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, reason in (
        ("file", r"there is a file of this name\. Give another path\.$"),
        ("file/new", r"Not a directory\. Give a path in a folder that exists and can be written\.$"),
    ):
        with pytest.raises(OutputError, match=reason), created_folder(tmp_path / name):
            pass


def test_a_file_that_the_system_cannot_look_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has one path and one reason, at whichever of its calls the system fails."""
    stat_of, calls = os.stat, 0

    def fail_at(number: int) -> Callable[..., os.stat_result]:
        def fail(path: Path, **options: bool) -> os.stat_result:
            nonlocal calls
            calls += not options
            if calls == number and not options:
                raise OSError(errno.EIO, "Input/output error")
            return stat_of(path, **options)

        return fail

    for number in (1, 2, 3):
        calls = 0
        with monkeypatch.context() as patched:
            patched.setattr("os.stat", fail_at(number))
            with pytest.raises(OutputError) as raised:
                write_file(tmp_path / "file", b"new")
        assert str(raised.value).startswith(f"Cannot write '{tmp_path}/file': Input/output error")
        assert str(raised.value).count("Cannot write") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_the_system_cannot_look_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "is_symlink", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        write_file(tmp_path / "file", b"new")


def test_a_created_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for name in ("new", "deep/er/new", "kept", "kept/new"):
        with pytest.raises(KeyboardInterrupt), created_folder(tmp_path / name):
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


def test_a_created_folder_with_files_is_kept(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        with created_folder(folder):
            write_file(folder / "file", b"whole")
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        write(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"whole"
    with created_folder(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_the_folder_that_a_link_names_is_created(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with created_folder(tmp_path / "link") as folder:
        assert (tmp_path / "target").is_dir()
    assert (folder, folder.is_symlink()) == (tmp_path / "link", True)
    write_folder(tmp_path / "link", {"file": b"new"})
    assert (tmp_path / "target" / "file").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()


def test_an_output_that_is_a_broken_link_is_checked(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "no" / "file")
    with pytest.raises(OutputError, match=r"the folder '.*no' does not exist"):
        check_output(tmp_path / "link")


def test_messages_suggest_paths_that_resemble_a_missing_path(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "net.py").touch()
    assert similar_path(tmp_path / "photo") == " Did you mean 'photos'?"
    assert similar_path(tmp_path / "nets", ".py") == " Did you mean 'net.py'?"
    assert similar_path(tmp_path / "photo", ".py") == ""
    assert "folder" in similar_path(tmp_path / "no" / "photos")
    if os.sep == "/":
        assert similar_path(f"{tmp_path}\\net.py") == f" Did you mean '{tmp_path}/net.py'?"


@pytest.mark.parametrize(
    "look",
    [
        lambda folder: Driver[str]("prepare", str, lambda *_: None, folder),
        is_package,
        lambda folder: profiled_summary(folder / "board.log", folder),
    ],
    ids=["intermediates_dir", "package", "profile"],
)
def test_a_path_that_the_system_cannot_look_up_is_an_error_with_the_reason(
    look: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = os.stat

    def refused(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return look_up(path, *args, **options)

    monkeypatch.setattr(os, "stat", refused)
    with pytest.raises(OpenNeutronError, match="Permission denied"):
        look(tmp_path)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_failure_to_remove_a_temporary_folder(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may interrupt the removal once. A folder that cannot be removed stays, without an error."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "file").write_bytes(b"x")
    remove, left = shutil.rmtree, [OSError(errno.EBADF, "Bad file descriptor")] * failures

    def failing(path: str, *, ignore_errors: bool) -> None:
        if left:
            raise left.pop()
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", failing)
    remove_folder(folder)
    assert folder.exists() == (failures == 2)


@pytest.mark.parametrize(("failures", "left"), [(1, None), (1000, ["b"])], ids=["once", "always"])
def test_a_temporary_file_that_cannot_be_removed(
    failures: int, left: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other files are removed. The second try removes a file that the first one could not remove."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_bytes(b"x")
    unlink = os.unlink
    failed: list[Any] = []

    def failing(path: Any, **options: Any) -> None:
        if os.path.basename(path) == "b" and len(failed) < failures:
            failed.append(path)
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", failing)
    remove_folder(folder)
    assert (names_in(folder) if folder.exists() else None) == left
