"""Reads files with typed errors, and writes files atomically."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from openneutron.core.messages import did_you_mean
from openneutron.errors import InputError, OutputError

__all__ = [
    "NO_PATH", "access_refused", "bytes_of_file", "check_is_file", "check_new_folder", "check_output",
    "check_output_folder", "created_folder", "exists", "is_file", "is_folder", "names_in", "read_file", "reason_of",
    "remove_folder", "similar_path", "write_file", "write_files", "write_folder",
]  # fmt: skip

BEGINNING = 8
"""The number of bytes of a file that tell its format."""
LONGEST_PREFIX = 100
"""The number of bytes of a file's name in the name of its temporary file. Most systems limit names to 255 bytes."""
NO_PATH = "it has a character that no path has, such as the null character. Give another path."
"""The reason why a path is refused for which Python raises `ValueError`."""
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # the open of a pipe does not wait
_NO_FILE = "it is a device or a pipe. Save its content to a file, and give this file"
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)


def read_file(path: str | os.PathLike[str], *, pipe_limit: int = 0) -> bytes:
    """Returns the bytes of a file. Raises `InputError` if the file cannot be read or `path` is not a path.

    `pipe_limit` is the largest number of bytes that is read from a pipe; 0 refuses pipes. The read of a pipe waits
    until its writers end or the limit is exceeded, so it may wait forever for a writer that neither writes nor ends.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"A file must be given by its path, not by a {type(path).__name__}.")
    try:
        return bytes_of_file(path, pipe_limit=pipe_limit)
    except PermissionError as error:
        raise access_refused(path, error) from error
    except OSError as error:
        raise InputError(f"Cannot read '{os.fspath(path)}': {reason_of(error)}.") from error
    except ValueError as error:
        raise InputError(f"Cannot read {os.fspath(path)!r}: {NO_PATH}") from error


def bytes_of_file(
    path: str | os.PathLike[str], check: Callable[[bytes], None] = lambda _: None, *, pipe_limit: int = 0
) -> bytes:
    """Returns the bytes of a file. Raises `OSError` or `ValueError` if it cannot be read.

    Refuses devices and pipes, whose content may never end or never come, and files beyond the free memory. `check` gets
    the first bytes, at most `BEGINNING`, and raises an error to refuse the file before the rest is read. A pipe is read
    up to `pipe_limit` bytes, without `check`; 0 refuses it.
    """
    descriptor = os.open(path, _READ)
    try:
        mode = os.fstat(descriptor).st_mode
        if pipe_limit and stat.S_ISFIFO(mode):
            return _bytes_of_pipe(descriptor, pipe_limit)
        _refuse_device(mode)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            begin = file.read(BEGINNING) or b""
            check(begin)
            file.seek(0)
            data = file.read()
    except MemoryError as error:
        raise OSError(errno.ENOMEM, "this machine has too little memory for it. Give a smaller file") from error
    finally:
        os.close(descriptor)
    if data is None:  # a file of the system that waits for content, such as /proc/kmsg
        raise OSError(errno.EAGAIN, _NO_FILE)
    return data


def _bytes_of_pipe(descriptor: int, limit: int) -> bytes:
    """Returns what the writers of a pipe write until all have ended. Raises `OSError` beyond `limit` bytes."""
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is a pipe with more than {limit:,} bytes. Save its content to a file")
    return data


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Raises `InputError` for a device or a pipe, before a library opens it. Accepts a path that does not exist."""
    mode = _mode(path)
    try:
        _refuse_device(stat.S_IFREG if mode is None else mode)
    except OSError as error:
        raise InputError(f"Cannot read '{os.fspath(path)}': {reason_of(error)}.") from error


def access_refused(path: str | os.PathLike[str], error: PermissionError) -> InputError:
    """Returns the error for a file that this user may not read, which a library would call damaged."""
    return InputError(f"Cannot read '{os.fspath(path)}': {reason_of(error)}. Allow this user to read it.")


def _refuse_device(mode: int) -> None:
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, _NO_FILE)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder exists. Raises `InputError` if the system cannot tell, for lack of rights, say."""
    return _mode(path) is not None


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file. Raises `InputError` as `exists` does."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder. Raises `InputError` as `exists` does."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def names_in(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the sorted names in a folder; none if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []


def similar_path(path: str | os.PathLike[str], suffix: str = "") -> str:
    """Returns a hint such as " Did you mean 'photos'?" for a path that does not exist.

    The hint lists similar names in the folder of `path` that end in `suffix`. It says if the folder does not exist, and
    if `path` is a link to a missing file. On systems that separate folders by slashes, a path with backslashes is
    looked up with slashes, too.
    """
    text = os.fspath(path)
    slashes = text.replace("\\", "/")
    if slashes != text and os.sep == "/" and exists(slashes):
        return f" Did you mean {slashes!r}?"
    if os.path.islink(text):
        return f" It is a link to '{os.readlink(text)}'."
    folder = Path(text).parent
    where = "" if is_folder(folder) else f" The folder '{folder}' does not exist."
    return where + did_you_mean(Path(text).name, [name for name in names_in(folder) if name.endswith(suffix)])


def _mode(path: str | os.PathLike[str], kind: type[InputError | OutputError] = InputError) -> int | None:
    """Returns the mode of a file or folder; None if there is none. Raises `kind` if the system cannot tell. For a path
    with characters that no path has, returns None if `kind` is `InputError`, else raises `OutputError`.
    """
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        what = "read" if kind is InputError else "write"
        raise kind(f"Cannot {what} '{os.fspath(path)}': {error.strerror or error}.") from error
    except ValueError as error:
        if kind is InputError:
            return None
        raise kind(f"Cannot write {os.fspath(path)!r}: {NO_PATH}") from error


def reason_of(error: OSError) -> str:
    """Returns the reason why a file could not be read, without a full stop."""
    reason = error.strerror or str(error)
    return f"{reason}. Give a file in it" if isinstance(error, IsADirectoryError) else reason


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` to a temporary file in the folder of `path`, then renames it to `path`.

    A file that is replaced keeps its permissions. Raises `OutputError` if that fails; no temporary file remains then.
    """
    write_files({output_path(path): data})


def output_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file or folder that will be written. Raises `OutputError` for another object."""
    if not isinstance(path, (str, os.PathLike)):
        raise OutputError(f"A file or folder must be given by its path, not by a {type(path).__name__}.")
    return Path(path)


def write_files(files: Mapping[Path, bytes]) -> None:
    """Writes several files as `write_file` does. No file is replaced before all temporary files are on the disk.

    Raises `OutputError` if a file cannot be written. All files then keep their earlier contents, except that a failed
    rename leaves the new contents in the files before it, in the order of `files`.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, data in files.items():
            _check_is_file(path)
            target = _linked(path)
            with _typed_output(target):
                temporary = _temporary_name(target)
                staged.append((temporary, target))
                _write_new_file(temporary, data, _permissions_of(target))
        for temporary, target in staged:
            with _typed_output(target):
                os.replace(temporary, target)
    finally:  # after an interruption, too
        for temporary, _ in staged:
            _remove_file(temporary)


def _linked(path: Path) -> Path:
    """Returns the target of a symbolic link, so that a write keeps the link; returns any other path unchanged."""
    with _typed_output(path):
        return path.resolve() if path.is_symlink() else path


def _temporary_name(target: Path) -> Path:
    """Returns a random path beside `target`. A killed process may leave a file of such a name."""
    prefix = os.fsencode(target.name)[:LONGEST_PREFIX].decode(errors="ignore")
    return target.with_name(f".{prefix}.{os.urandom(8).hex()}.tmp")


def _write_new_file(path: Path, data: bytes, permissions: int | None = None) -> None:
    """Writes `data` to a new file, and flushes it to the disk: a later rename could otherwise reach the disk first.

    Without `permissions`, the file gets the default permissions of the system.
    """
    descriptor = os.open(path, _NEW_FILE, 0o666 if permissions is None else permissions)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if permissions is not None and hasattr(os, "fchmod"):
            os.fchmod(descriptor, permissions)  # the mode of os.open is reduced by the umask
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Flushes a file to the disk. Does nothing on a file system without fsync."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def _remove_file(path: Path) -> None:
    """Removes a temporary file if it exists. Ignores errors, which would hide the error of the write."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _permissions_of(path: Path) -> int | None:
    """Returns the permissions of the file at `path`; None if there is no file, and on Windows."""
    mode = _mode(path, OutputError)
    if mode is None or os.name == "nt":  # Windows deletes no file without the permission to write
        return None
    return stat.S_IMODE(mode) & 0o777


@contextmanager
def _typed_output(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"Cannot write '{path}': {_with_remedy(error, path)}") from error


def _check_is_file(path: Path) -> None:
    _check_is_no_folder(path)
    mode = _mode(path, OutputError)
    if mode is not None and not stat.S_ISREG(mode):
        raise OutputError(f"Cannot write '{path}': it is a device or a pipe. Give a path of a file.")


def check_output(path: str | os.PathLike[str]) -> None:
    """Raises `OutputError` if no file can be written to `path`: it is a folder, or its folder does not exist or cannot
    be written. Writes nothing.
    """
    path = output_path(path)
    _check_is_file(path)
    folder = _linked(path).parent
    mode = _mode(folder, OutputError)
    if mode is None or not stat.S_ISDIR(mode):
        raise OutputError(
            f"Cannot write '{path}': the folder '{folder}' does not exist. Give a path in an existing one."
        )
    if not os.access(folder, os.W_OK):
        raise OutputError(f"Cannot write '{path}': the folder '{folder}' cannot be written. Give another path.")


def check_output_folder(path: str | os.PathLike[str]) -> None:
    """Raises `OutputError` if `path` is neither a folder that can be written nor a place for a new one. Writes
    nothing.
    """
    path = output_path(path)
    folder = _linked(path)
    there = next((one for one in (folder, *folder.parents) if _mode(one, OutputError) is not None), folder)
    if is_file(there):
        what = "there is a file of this name" if there == folder else f"'{there}' is a file"
        raise OutputError(f"Cannot create the folder '{path}': {what}. Give another path.")
    if not os.access(there, os.W_OK):
        raise OutputError(f"Cannot create the folder '{path}': '{there}' cannot be written. Give another folder.")


@contextmanager
def created_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Creates a folder, with its parents, if it does not exist, and yields its path.

    If the context fails, removes the folders that it created and that are empty. Raises `OutputError` if the folder
    cannot be created or written.
    """
    path = output_path(path)
    _mode(path, OutputError)
    folder = _linked(path)
    missing = [one for one in (folder, *folder.parents) if _mode(one, OutputError) is None]
    try:
        _create(folder)
        yield path
    except BaseException:
        for one in missing:
            with suppress(OSError):  # it has files, or was not created
                one.rmdir()
        raise


def _check_is_no_folder(path: str | os.PathLike[str]) -> None:
    mode = _mode(path, OutputError)
    if mode is not None and stat.S_ISDIR(mode):
        raise OutputError(f"Cannot write '{path}': it is a folder. Give a path of a file in it.")


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot create the folder '{folder}': {_with_remedy(error, folder)}") from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"The folder '{folder}' cannot be written. Give another folder.")


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Raises `OutputError` if `path` cannot become a new folder: it exists and is not an empty folder, or its parent
    does not exist. Writes nothing.
    """
    path = output_path(path)
    mode = _mode(path, OutputError)
    if mode is not None and not stat.S_ISDIR(mode):
        raise OutputError(f"Cannot write the folder '{path}': there is a file of this name. Give another path.")
    if mode is not None:
        if not _is_empty(path):
            raise OutputError(f"Cannot write the folder '{path}': it is not empty. Give another path, or remove it.")
        return
    folder = _linked(path.absolute()).parent
    parent = _mode(folder, OutputError)
    if parent is None or not stat.S_ISDIR(parent):
        raise OutputError(f"Cannot write the folder '{path}': the folder '{folder}' does not exist.")


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError as error:
        raise OutputError(f"Cannot write the folder '{folder}': {_with_remedy(error, folder)}") from error


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Writes a new folder with these files: first under a temporary name beside it, then renamed.

    Raises `OutputError` if that fails, and where `check_new_folder` raises it; no temporary folder remains then.
    """
    check_new_folder(path)
    path = _linked(Path(path).absolute())
    temporary = _temporary_name(path)
    try:
        temporary.mkdir()
        for name, data in files.items():
            _write_new_file(temporary / name, data)
        if os.name == "nt" and path.is_dir():
            path.rmdir()  # it is empty; elsewhere, the rename replaces an empty folder
        os.replace(temporary, path)
    except BaseException as error:  # after an interruption, too
        remove_folder(temporary)
        if not isinstance(error, OSError):
            raise
        raise OutputError(f"Cannot write the folder '{path}': {_with_remedy(error, path)}") from error


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Removes a folder with temporary files. Ignores errors, because the work in it has ended.

    It tries twice: a signal may interrupt the first try. A file that cannot be removed stays, and all others are
    removed. Even with `ignore_errors`, `rmtree` raises errors of closing.
    """
    for _ in range(2):
        with suppress(OSError):
            shutil.rmtree(path, ignore_errors=True)


def _with_remedy(error: OSError, path: Path) -> str:
    reason = error.strerror or error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason}. Free some space, or give a path on another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}. Give a path in a folder in which you may write, or change that of '{path.parent}'."
    if error.errno == errno.EEXIST:
        return "there is a file of this name. Give another path."
    if error.errno == errno.ENOENT:
        return f"the folder '{path.parent}' does not exist. Give a path in an existing folder."
    return f"{reason}. Give a path in a folder that exists and can be written."
