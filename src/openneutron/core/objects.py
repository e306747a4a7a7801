"""Loads a Python object that a text names: `file.py:name` or `package.module:name`. Does not import torch."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from openneutron.core.files import is_file, names_in, similar_path
from openneutron.core.messages import did_you_mean, first_line, listed
from openneutron.errors import InputError, OptionError

__all__ = ["Reference", "check_object", "is_reference", "load_object", "parse_reference"]

FORMS = "'file.py:name' or 'package.module:name'"
# Code that can define names which are not written as definitions or assignments.
_DEFINES_UNSEEN_NAMES = frozenset({"exec", "globals", "setattr", "vars", "__getattr__"})
# Folders of installed packages, and of this package.
_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib"))
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Reference:
    """An object in a Python file or in an importable module. Exactly one of `file` and `module` is set.

    `name` is the name of the object; dots lead to attributes: "Networks.small".
    """

    file: Path | None
    module: str | None
    name: str

    def __str__(self) -> str:
        return f"{self.module if self.file is None else self.file}:{self.name}"


def is_reference(text: str) -> bool:
    """Whether `text` has the form `file.py:name` or `package.module:name`. The file need not exist."""
    where, colon, name = text.rpartition(":")
    if not colon or not all(map(str.isidentifier, name.split("."))):
        return False
    return where.endswith(".py") or all(map(str.isidentifier, where.split(".")))


def parse_reference(text: str, what: str = "The reference") -> Reference:
    """Reads a reference. Raises `OptionError`, whose message begins with `what`, for a text of another form."""
    if not isinstance(text, str):
        raise OptionError(f"{what} must be a text of the form {FORMS}, not a {type(text).__name__}.")
    if text.endswith(".py"):
        names = listed(_defined_names(Path(text))) if is_file(text) else ""
        raise OptionError(
            f"{what} '{text}' names a file, but no object in it. Give '{text}:NAME'."
            + (f" The file defines {names}." if names else "")
        )
    if not is_reference(text):
        raise OptionError(f"{what} '{text}' must have the form {FORMS}.")
    where, _, name = text.rpartition(":")
    if where.endswith(".py"):
        return Reference(Path(where), None, name)
    return Reference(None, where, name)


def check_object(text: str, what: str = "The reference") -> Reference:
    """Checks a reference without running any code, as far as that is possible, and returns it.

    Raises `OptionError` for a text of another form and for a name that the file does not define, and `InputError` for a
    file that does not exist or has a syntax error. A module is not looked up, and a file that may define names at run
    time is not searched for the name.
    """
    reference = parse_reference(text, what)
    if reference.file is None:
        return reference
    tree = _parse(reference.file, what)
    if not _may_define_unseen_names(tree):
        first = reference.name.split(".")[0]
        names = list(_names_in(tree.body))
        if first not in names:
            raise _missing_name(reference, first, names, what)
    return reference


def load_object(text: str, what: str = "The reference") -> Any:
    """Imports the file or the module that `text` names, and returns the object.

    A file is imported under its own name, and once: a second reference to it finds the same module. A file in a package
    (a folder with `__init__.py`) is imported as part of it, so it may use relative imports. During the import, the
    file's folder is the first of `sys.path`; for a module, the current folder is. Afterwards `sys.path` is as before.
    Modules of the same names in other folders, imported before, are set aside during the import. What the file and the
    modules of its folder define is pickled by value, so that it can be sent to other processes.

    `what` begins each error message: "The model". Raises `OptionError` for a text of another form, an unknown module
    and an unknown name, and `InputError` for a file that does not exist, has a syntax error, imports a package that is
    not installed, or raises an error.
    """
    reference = parse_reference(text, what)
    if reference.file is None:
        module = _imported_module(reference, what)
    else:
        _parse(reference.file, what)
        module = _imported_file(reference.file.resolve(), what)
    return _attribute(module, reference, what)


def _parse(file: Path, what: str) -> ast.Module:
    if not is_file(file):
        raise InputError(f"{what} is in '{file}', which does not exist.{similar_path(file, '.py')}")
    try:
        return ast.parse(file.read_bytes(), str(file))
    except SyntaxError as error:
        raise InputError(
            f"{what} is in '{file}', which has a syntax error: {error.msg}.", source=f"{file}:{error.lineno}"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{what} is in '{file}', which cannot be read: {first_line(error)}.") from error


def _defined_names(file: Path) -> list[str]:
    """Returns the classes and functions of a file; none of a file that cannot be parsed."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def _names_in(body: list[ast.stmt]) -> Iterator[str]:
    """Returns the names that the statements of a module define, also in branches and loops."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement.name
            continue
        for node in ast.walk(statement):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)


def _may_define_unseen_names(tree: ast.Module) -> bool:
    return any(
        (isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names))
        or (isinstance(node, ast.Name) and node.id in _DEFINES_UNSEEN_NAMES)
        or (isinstance(node, ast.FunctionDef) and node.name in _DEFINES_UNSEEN_NAMES)
        or isinstance(node, ast.Global)
        for node in ast.walk(tree)
    )


def _missing_name(reference: Reference, name: str, known: list[str], what: str) -> OptionError:
    where = reference.module if reference.file is None else reference.file
    public = sorted({one for one in known if not one.startswith("_")})
    hint = did_you_mean(name, public) or (f" It defines {listed(public)}." if public else " It defines no names.")
    return OptionError(f"{what} is '{name}' in '{where}', which has no such name.{hint}")


def _attribute(module: ModuleType, reference: Reference, what: str) -> Any:
    found: Any = module
    for name in reference.name.split("."):
        if not hasattr(found, name):
            known = getattr(found, "__dict__", None)
            raise _missing_name(reference, name, list(known) if known else dir(found), what)
        found = getattr(found, name)
    return found


def _imported_module(reference: Reference, what: str) -> ModuleType:
    name = str(reference.module)
    with _prepended_to_path([Path.cwd()]):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise _import_error(error, f"the module '{name}'", what) from error
            raise OptionError(
                f"{what} is in the module '{name}', which cannot be found: there is no '{error.name}' among the "
                f"installed packages and in the folder '{Path.cwd()}'."
            ) from error
        except (Exception, SystemExit) as error:
            raise _import_error(error, f"the module '{name}'", what) from error


def _imported_file(file: Path, what: str) -> ModuleType:
    loaded = next((one for one in list(sys.modules.values()) if _file_of(one) == str(file)), None)
    if loaded is not None and loaded.__name__ != "__main__":
        return loaded
    root = file.parent
    while os.path.isfile(root / "__init__.py"):
        root = root.parent
    folders = [file.parent, root] if root != file.parent else [root]
    inner = file.relative_to(root).with_suffix("").parts
    name = ".".join(inner[:-1] if inner[-1] == "__init__" else inner)
    with _own_modules_first(folders, file), _prepended_to_path(folders):
        before = set(sys.modules)
        try:
            module = _run_file(file) if root == file.parent else importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise _import_error(error, f"'{file}'", what) from error
        _pickle_by_value([sys.modules[name] for name in sys.modules.keys() - before], root)
    return module


def _pickle_by_value(modules: list[ModuleType], folder: Path) -> None:
    """Lets cloudpickle copy what `modules` in `folder` define, because other processes cannot import these modules."""
    import cloudpickle

    for module in modules:
        file = _file_of(module)
        if file is not None and Path(file).is_relative_to(folder) and not _is_installed_file(file):
            cloudpickle.register_pickle_by_value(module)


def _is_installed_file(file: str) -> bool:
    return Path(file).is_relative_to(_PACKAGE) or any(Path(file).is_relative_to(folder) for folder in _INSTALLED)


def _file_of(module: ModuleType) -> str | None:
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if isinstance(file, str) and file.endswith(".py") else None


def _run_file(file: Path) -> ModuleType:
    """Runs a file as a module with a free name, and enters it into `sys.modules`, as classes and pickles need it."""
    name = _free_name(file)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"Python has no loader for '{file}'")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _free_name(file: Path) -> str:
    """Returns the file's name without suffix, followed by a number if a module of this name exists."""
    stem = "".join(letter if letter.isalnum() else "_" for letter in file.stem)
    name, number = stem, 1
    while name in sys.modules or name in sys.stdlib_module_names or (number == 1 and _is_found(name, file)):
        number += 1
        name = f"{stem}_{number}"
    return name


def _is_found(name: str, file: Path) -> bool:
    """Whether `name` is a module other than `file`. The file's folder, the first of `sys.path`, is left out."""
    path = [folder for folder in sys.path if Path(folder or ".").resolve() != file.parent]
    return importlib.machinery.PathFinder.find_spec(name, path) is not None


@contextmanager
def _prepended_to_path(folders: list[Path]) -> Iterator[None]:
    added = [str(folder) for folder in folders]
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:
                sys.path.remove(folder)


@contextmanager
def _own_modules_first(folders: list[Path], file: Path) -> Iterator[None]:
    """Sets modules aside that have the name of a module in `folders` other than `file`, but come from elsewhere.

    Without this, the `utils.py` of the folder that was imported first would take the place of any other `utils.py`.
    """
    replaced = {name for folder in folders for name in _modules_in(folder, file) if _is_from_elsewhere(name, folders)}
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in replaced}
    try:
        yield
    finally:
        # The modules that were imported first keep their names; the other modules live on in their importers.
        for name in [name for name in sys.modules if name.split(".")[0] in replaced]:
            del sys.modules[name]
        sys.modules.update(aside)


def _is_from_elsewhere(name: str, folders: list[Path]) -> bool:
    """Whether a module of this name was imported from the user's files, but from none in `folders`."""
    file = _file_of(sys.modules[name]) if name in sys.modules else None
    return (
        file is not None
        and not any(Path(file).is_relative_to(folder) for folder in folders)
        and not _is_installed_file(file)
    )


def _modules_in(folder: Path, file: Path) -> Iterator[str]:
    for path in map(folder.joinpath, names_in(folder)):
        if path == file:
            continue
        if path.suffix == ".py" or os.path.isfile(path / "__init__.py"):
            yield path.stem


def _import_error(error: BaseException, where: str, what: str) -> InputError:
    source = _innermost_line(error.__traceback__)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        return InputError(
            f"{what} is in {where}, which imports '{error.name}', but that cannot be found. Install the package "
            f"(pip install {package}), or put '{package}.py' beside the file.",
            source=source,
        )
    if isinstance(error, SystemExit):
        return InputError(
            f"{what} is in {where}, which ends the process when it is imported. Put code that runs a script under "
            "`if __name__ == '__main__':`.",
            source=source,
        )
    return InputError(
        f"{what} is in {where}, whose import failed: {type(error).__name__}: {first_line(error)}.", source=source
    )


def _innermost_line(traceback: TracebackType | None) -> str | None:
    """Returns "file:line" of the innermost frame outside of this module and of Python's import system."""
    found = None
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if file != __file__ and not file.startswith("<frozen") and f"{os.sep}importlib{os.sep}" not in file:
            found = f"{file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found
