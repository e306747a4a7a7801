"""Settings: their values, their file, and the messages about wrong ones."""

from __future__ import annotations

import dataclasses
import inspect
import re
import tomllib
from pathlib import Path

import pytest

from openneutron import quantize
from openneutron.compile_spec import PAYLOADS, CompileOptions
from openneutron.documented_flow import NeutronQuantizer
from openneutron.errors import InputError, OptionError
from openneutron.quantizer.layer_options import GRANULARITIES
from openneutron.recovery.recipes import RECIPES
from openneutron.settings import SECTIONS, Settings, fields_of, read_settings, template, write_settings
from openneutron.settings.checks import check_settings
from openneutron.settings.declaration import _check_limits
from openneutron.settings.model_texts import LIBRARIES, arguments_in, check_model
from openneutron.settings.values import KINDS
from openneutron.workflow.from_settings import _shown

FIELDS = [field for section in SECTIONS for field in fields_of(section)]


def test_each_setting_has_one_home_a_known_kind_and_a_sentence() -> None:
    names = [field.name for field in FIELDS]
    assert len(names) == len(set(names))
    for field in FIELDS:
        assert field.kind in KINDS
        assert field.help.endswith(".")


def test_choices_equal_the_types_of_the_functions() -> None:
    choices = {field.name: field.choices for field in FIELDS if field.choices}
    assert set(choices["recover"]) == {*RECIPES, "none"}
    assert choices["weight_granularity"] == tuple(GRANULARITIES)
    assert choices["payload"] == PAYLOADS


def test_each_option_of_quantize_and_lower_is_a_setting() -> None:
    names = {field.name for field in FIELDS}
    of_quantize = {*inspect.signature(quantize).parameters, *inspect.signature(NeutronQuantizer).parameters}
    not_settings = {
        "example_inputs", "calibration", "quantizer_options", "progress", "observer", "is_qat", "neutron_target_spec",
    }  # fmt: skip
    assert of_quantize - not_settings <= names
    assert {field.name for field in dataclasses.fields(CompileOptions)} | {"int8_io"} <= names


def test_defaults_equal_the_functions() -> None:
    parameters = inspect.signature(quantize).parameters | inspect.signature(NeutronQuantizer).parameters
    for name in ("recover", "recovery_seconds", "strict", "jobs", "stop_when_converged", "weight_bits", "equalize"):
        assert getattr(Settings().quantize, name) == parameters[name].default
    for field in dataclasses.fields(CompileOptions):
        if field.name != "target":
            assert (getattr(Settings().lower, field.name) or None) == (field.default or None)


def test_a_file_gives_the_settings_that_were_written(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "net.py").write_text("class Net: ...\n")
    settings = Settings.of({
        "model": f"{tmp_path}/net.py:Net", "calibrate": f"{tmp_path}/photos", "input": ["1,3,32,32"],
        "mean": "0.1,0.2,0.3", "weight_bits": 6, "equalize": False, "weights": "none", "transform": "pkg.mod:make",
        "target": "mcxn94x",
    })  # fmt: skip
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "openneutron.toml"
    write_settings(file, settings)
    tables = tomllib.loads(file.read_text())
    assert tables["model"] == {"model": "../net.py:Net", "weights": "none", "input": ["1,3,32,32"]}
    assert tables["data"]["calibrate"] == "../photos"
    assert tables["data"]["transform"] == "pkg.mod:make"
    assert tables["quantize"] == {"weight_bits": 6, "equalize": False}
    read = read_settings(file)
    read.check_paths()
    assert Path(read.data.calibrate or "").resolve() == tmp_path / "photos"
    assert dataclasses.replace(read, model=settings.model, data=settings.data) == settings
    assert read.data.mean == (0.1, 0.2, 0.3)


def test_paths_are_relative_to_the_file_in_any_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "data").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "openneutron.toml").write_text('[data]\ncalibrate = "data"\n')
    monkeypatch.chdir(tmp_path / "b")
    settings = read_settings("../a/openneutron.toml")
    settings.check_paths()
    write_settings("copy.toml", settings)
    assert tomllib.loads(Path("copy.toml").read_text())["data"]["calibrate"] == "../a/data"


@pytest.mark.parametrize("name", ["calibrate", "weights"])
@pytest.mark.parametrize("is_path", [True, False])
def test_a_path_does_not_become_a_word(
    name: str, is_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words "random" and "none" also name folders and files, if they are given as "./random" or "folder/random"."""
    monkeypatch.chdir(tmp_path)
    (word,) = (word for field in FIELDS if field.name == name for word in field.words)
    Path(word).write_text("")
    Path("openneutron.toml").write_text("")
    settings = Settings.of({name: f"{tmp_path}/{word}" if is_path else word})
    expected = f"./{word}" if is_path else word
    assert _shown(settings) == {name: expected}
    write_settings("openneutron.toml", settings)
    read = read_settings("openneutron.toml")
    assert [values for values in read.given().values() if values] == [{name: expected}]
    assert _shown(read) == {name: expected}


def test_given_values_replace_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "openneutron.toml"
    file.write_text("[quantize]\nweight_bits = 4\njobs = 2\n")
    settings = read_settings(file, {"weight_bits": 6, "jobs": None})
    assert (settings.quantize.weight_bits, settings.quantize.jobs) == (6, 2)


def test_the_template_is_valid_and_has_all_settings() -> None:
    text = template()
    assert set(tomllib.loads(text)) == set(SECTIONS)
    shown = re.findall(r"^# (\w+) = (.*)$", text, re.MULTILINE)
    assert [name for name, _ in shown] == [field.name for field in FIELDS]
    for field, (_, value) in zip(FIELDS, shown, strict=True):
        if field.default in (None, ()):
            assert value.endswith("  (not set)")
        else:
            assert tomllib.loads(f"x = {value}")["x"] == (
                list(field.default) if isinstance(field.default, tuple) else field.default
            )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\n", "no section \\[modle\\]. Did you mean 'model'"),
        ("[model]\nwieghts = 'x'\n", "no key 'wieghts'. Did you mean 'weights'"),
        ("[package]\nrecove = 'x'\n", r"no key 'recove'. Did you mean 'recover', which belongs to \[quantize\]"),
        ("[package]\nrecover = 'x'\n", r"no key 'recover'. The key 'recover' belongs to \[quantize\]"),
        ("[model]\nmean = [1.0]\n", "'mean' belongs to \\[data\\]"),
        ("target = 'imxrt700'\n", "'target' belongs to \\[build\\]"),
        ("[quantize]\nweight_bits = 'six'\n", "'weight_bits' takes an integer, not 'six'"),
        ("[quantize]\nweight_bits = true\n", "'weight_bits' takes an integer, not True"),
        ("[quantize]\nrecover = 'beste'\n", "'recover' is one of auto, fast, best, none, not 'beste'.*'best'"),
        ("[lower]\nint8_io = 1\n", "'int8_io' takes true or false, not 1"),
        ("[data]\nmean = ['a']\n", "'mean' takes numbers"),
        ("[quantize]\nrecovery_seconds = nan\n", "'recovery_seconds' takes a finite number, not nan"),
        ("[quantize]\nrecovery_seconds = inf\n", "'recovery_seconds' takes a finite number, not inf"),
        (f"[quantize]\nrecovery_seconds = {10**400}\n", "'recovery_seconds' takes a finite number, not 1000"),
        (f"[data]\nmean = [0.5, {10**400}]\n", "'mean' takes numbers"),
        (f"[quantize]\njobs = {2**63}\n", f"'jobs' takes an integer of at most 64 bits, not {2**63}"),
        (f"[quantize]\njobs = 0x{'f' * 5000}\n", "at most 64 bits, not an integer of thousands of digits"),
        (f"[model]\nweights = [0x{'f' * 5000}]\n", "'weights' takes a text, not an integer of thousands"),
        (f"[quantize]\njobs = {'9' * 5000}\n", "is not valid TOML"),
        (f"[model]\ninput = {'[' * 9999}\n", "is not valid TOML"),
        (f"{'a.' * 40_000}b = 1\n", "is not valid TOML: it has 80,006 bytes. Give a file of at most 65,536"),
        ("[model\n", "is not valid TOML"),
        ("model = 3\n", "must be a table"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "openneutron.toml"
    file.write_text(text)
    with pytest.raises(OptionError, match=message):
        read_settings(file)


def test_missing_files_and_names_are_found_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("raise RuntimeError\nclass Net: ...\n")
    (tmp_path / "photos").mkdir()
    with pytest.raises(OptionError, match="Did you mean 'Net'"):
        Settings.of({"model": f"{tmp_path}/net.py:Nett"}).check_paths()
    with pytest.raises(InputError, match="Did you mean 'photos'"):
        Settings.of({"calibrate": f"{tmp_path}/photo"}).check_paths()
    with pytest.raises(InputError, match=r"weights: .* does not exist\. The folder"):
        Settings.of({"weights": f"{tmp_path}/none/w.pt"}).check_paths()
    Settings.of({"model": f"{tmp_path}/net.py:Net", "weights": "none", "metric": "top5"}).check_paths()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(OptionError, match=r"no setting 'targte'\. Did you mean 'target'"):
        Settings.of({"targte": "imxrt700"})


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_name_of_a_package_is_not_a_model(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / library).mkdir()
    for text in (library, f"{library}:"):
        with pytest.raises(OptionError, match=f"names a package, but no model in it. Give {library}:NAME"):
            check_model(text)
    with pytest.raises(OptionError, match=f"Give {library}:NAME"):
        check_settings(Settings.of({"model": library}))


@pytest.mark.parametrize("text", ["{[1]: 2}", "-" * 200_000 + "1", "[" * 200_000, "1)(2", "1).x(2", "**{}", "f()", "x"])
def test_arguments_that_are_not_literals(text: str) -> None:
    with pytest.raises(OptionError, match="args takes literals of Python") as caught:
        arguments_in(text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("least", "most", "value", "message"),
    [
        (None, 2.0, 3.0, "is a number of 2 or less, not 3.0"),
        (1.0, None, 0.5, "is a number of 1 or more, not 0.5"),
        (1.0, 2.0, 3.0, "is a number from 1 to 2, not 3.0"),
        (None, 2.0, 2.0, None),
    ],
)
def test_limits_of_numbers(least: float | None, most: float | None, value: float, message: str | None) -> None:
    declared = dataclasses.replace(next(one for one in FIELDS if one.kind == "float"), least=least, most=most)
    if message is None:
        _check_limits(declared, value)
        return
    with pytest.raises(OptionError, match=message):
        _check_limits(declared, value)
