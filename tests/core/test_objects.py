"""Objects that a text names: in files, in packages and in modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest

from openneutron.core.objects import Reference, check_object, is_reference, load_object, parse_reference
from openneutron.errors import InputError, OptionError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("net.py:Net", Reference(Path("net.py"), None, "Net")),
        ("a/b c.py:Nets.small", Reference(Path("a/b c.py"), None, "Nets.small")),
        (r"C:\nets\net.py:Net", Reference(Path(r"C:\nets\net.py"), None, "Net")),
        ("package.module:name", Reference(None, "package.module", "name")),
    ],
)
def test_references(text: str, expected: Reference) -> None:
    assert is_reference(text)
    assert parse_reference(text) == expected


@pytest.mark.parametrize("text", ["net", "net.pt2", "net.py:", "net.py:1", ":Net", "photos/", "C:/photos", "a-b:c", ""])
def test_texts_that_are_not_references(text: str) -> None:
    assert not is_reference(text)
    for function in (parse_reference, load_object, check_object):
        with pytest.raises(OptionError, match=r"^The model '.*' must have the form 'file\.py:name' or"):
            function(text, "The model")


def test_a_value_that_is_not_text() -> None:
    with pytest.raises(OptionError, match=r"must be a text of the form .*, not a int"):
        load_object(3)  # type: ignore[arg-type]


def test_a_file_without_a_name_lists_its_names(tmp_path: Path) -> None:
    file = write(tmp_path / "net.py", "class Net: ...\ndef small(): ...\ndef _helper(): ...\n")
    with pytest.raises(OptionError, match=r"Give '.*net\.py:NAME'\. The file defines Net, small\."):
        load_object(str(file))


def test_an_object_of_a_file_that_imports_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "wide_layers.py", "WIDTH = 7\n")
    file = write(tmp_path / "wide_net.py", "import wide_layers\nclass Net:\n    width = wide_layers.WIDTH\n")
    before = list(sys.path)
    assert load_object(f"{file}:Net").width == 7
    assert load_object(f"{file}:Net.width") == 7
    assert load_object(f"{file}:Net") is load_object(f"{file}:Net")
    assert sys.path == before


def test_files_of_the_same_name_in_two_folders(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder / "same_layers.py", f"NAME = '{folder}'\n")
        write(tmp_path / folder / "same_net.py", "import same_layers\nclass Net:\n    name = same_layers.NAME\n")
    nets = [load_object(str(tmp_path / folder / "same_net.py:Net")) for folder in ("one", "two", "one")]
    assert [net.name for net in nets] == ["one", "two", "one"]
    assert nets[0] is nets[2]
    assert [net.__module__ for net in nets] == ["same_net", "same_net_2", "same_net"]


@pytest.mark.parametrize("name", ["json", "torch", "random"])
def test_a_file_named_like_another_module(name: str, tmp_path: Path) -> None:
    module = sys.modules.get(name)
    file = write(tmp_path / f"{name}.py", "class Net: ...\n")
    assert load_object(f"{file}:Net").__module__ == f"{name}_2"
    assert sys.modules.get(name) is module


def test_a_file_of_a_package_has_relative_imports(tmp_path: Path) -> None:
    write(tmp_path / "a_package" / "__init__.py", "")
    write(tmp_path / "a_package" / "nets" / "__init__.py", "")
    write(tmp_path / "a_package" / "layers.py", "WIDTH = 9\n")
    file = write(tmp_path / "a_package" / "nets" / "net.py", "from ..layers import WIDTH\n")
    assert load_object(f"{file}:WIDTH") == 9


def test_an_object_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_object("os.path:join") is __import__("os").path.join
    write(tmp_path / "module_here.py", "VALUE = 4\n")
    monkeypatch.chdir(tmp_path)
    assert load_object("module_here:VALUE") == 4


def test_functions_of_a_file_are_sent_to_processes_that_cannot_import_it(tmp_path: Path) -> None:
    write(tmp_path / "far_layers.py", "def double(x):\n    return 2 * x\n")
    file = write(tmp_path / "far_net.py", "from far_layers import double\ndef run(x):\n    return double(x) + 1\n")
    pickled = tmp_path / "run.pkl"
    pickled.write_bytes(cloudpickle.dumps(load_object(f"{file}:run")))
    code = f"import pickle; print(pickle.load(open({str(pickled)!r}, 'rb'))(4))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert ran.stdout.strip() == "9"


@pytest.mark.parametrize("function", [load_object, check_object])
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "nett.py:Net",
            InputError,
            r"^The model is in '.*nett\.py', which does not exist\. Did you mean 'net\.py'\?",
        ),
        ("broken.py:Net", InputError, r"has a syntax error: .*\[at .*broken\.py:2\]"),
        ("net.py:Ne", OptionError, r"^The model is 'Ne' in '.*net\.py', which has no such name\. Did you mean 'Net'\?"),
        ("net.py:forward", OptionError, r"no such name\. It defines LATER, Net, join\."),
    ],
)
def test_objects_that_are_found_without_running_the_file(
    function: object, name: str, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "broken.py", "x = 1\ndef f(:\n")
    write(
        tmp_path / "net.py",
        "from os.path import join\nif True:\n    LATER = 1\nclass Net:\n    def forward(self): ...\n",
    )
    with pytest.raises(kind, match=message):
        function(str(tmp_path / name), "The model")  # type: ignore[operator]


def test_checks_run_no_code_and_accept_names_defined_at_run_time(tmp_path: Path) -> None:
    file = write(tmp_path / "net.py", "from os.path import *\nraise ValueError('ran')\n")
    assert check_object(f"{file}:join") == Reference(file, None, "join")
    assert check_object("no.such.module:name").module == "no.such.module"
    for text in ("globals()['Net'] = 3", "for Net in range(3): ...", "import os as Net", "with x as Net: ..."):
        assert check_object(f"{write(file, text)}:Net").name == "Net"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package.part", r"imports 'no_such_package', but .*pip install no_such_package.*bad\.py:2\]"),
        ("from os import no_such_name", r"import failed: ImportError: cannot import name.*bad\.py:2\]"),
        ("raise RuntimeError('a fault')", r"import failed: RuntimeError: a fault\. \[at .*bad\.py:2\]"),
        ("raise SystemExit(1)", r"ends the process when it is imported.*__main__.*bad\.py:2\]"),
        ("import bad_neighbour", r"import failed: ZeroDivisionError: division by zero\. \[at .*bad_neighbour\.py:1\]"),
    ],
)
def test_files_whose_import_fails(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "bad_neighbour.py", "1 / 0\n")
    file = write(tmp_path / "bad.py", f"Net = 3\n{text}\n")
    before = list(sys.path)
    with pytest.raises(InputError, match=message):
        load_object(f"{file}:Net")
    assert sys.path == before
    assert not any(Path(getattr(one, "__file__", None) or "") == file for one in list(sys.modules.values()))
    file.write_text("Net = 3\n")
    assert load_object(f"{file}:Net") == 3


def test_modules_that_are_not_found() -> None:
    with pytest.raises(OptionError, match=r"in the module 'no_such.module', which cannot be found: .*'no_such'"):
        load_object("no_such.module:name")
    with pytest.raises(OptionError, match=r"'joyn' in 'os\.path', which has no such name\. Did you mean 'join'\?"):
        load_object("os.path:joyn")


def test_loading_an_object_does_not_import_torch() -> None:
    code = "import sys, openneutron.core.objects; print('torch' in sys.modules, 'numpy' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False False"
