"""The generated pages list everything that they are generated from, and each message has a cure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from docs.generators.cures import cure_of, says_its_cure
from docs.generators.messages import Message, collect_messages
from docs.generators.pages import (
    PYTHON_PACKAGES,
    commands,
    public_names,
    python_page,
    settings,
    targets,
    troubleshooting,
)
from docs.generators.results import keys_of, results, types_within
from docs.generators.schemas import SCHEMAS

from openneutron import errors
from openneutron.cli.verbs import app
from openneutron.settings import SECTIONS, fields_of
from openneutron.targets import TARGETS, boards

ROOT = Path(__file__).parents[2]
MESSAGES = collect_messages()


def test_each_message_has_a_cure() -> None:
    missing = [f"{one.module}: {one.text}" for one in MESSAGES if not says_its_cure(one) and cure_of(one) is None]
    assert not missing, "say in these messages what to do, or add rules to docs/generators/cures.toml"


def test_a_message_without_advice_needs_a_rule() -> None:
    advised = Message("ModelError", "flow.py", "The model is in train mode. Call model.eval() first.")
    unknown = Message("ModelError", "flow.py", "The moon is full.")
    assert says_its_cure(advised)
    assert not says_its_cure(unknown)
    assert cure_of(unknown) is None


def test_each_error_class_is_on_the_page() -> None:
    kinds = {one.kind for one in MESSAGES}
    assert kinds >= set(errors.__all__) - {"OpenNeutronError"}
    page = troubleshooting(MESSAGES)
    assert all(f"\n## {kind}\n" in page for kind in kinds)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "TargetError",
            "Unknown target '‹target›'.‹hint› Known targets: ‹targets›. Known boards: ‹boards›. A board file ends in "
            ".toml.",
        ),  # an f-string
        ("ModelError", "This program is lowered already. Save it or run it."),  # a constant
        ("CpuWarning", "These operators run on the CPU:\n‹lines›"),  # a function that returns a text
        ("OptionError", "‹name› takes True or False, not ‹value›."),  # an argument of a function that raises
        ("FormatError", "‹what›: byte ‹offset›: expected ‹expected›‹seen›‹cure›"),  # a method that makes the error
    ],
)
def test_messages_are_found(kind: str, text: str) -> None:
    assert (kind, text) in {(one.kind, one.text) for one in MESSAGES}


def test_messages_of_a_module(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "module.py").write_text(
        "class OneError(Exception): ...\n"
        "def check(name, value):\n"
        "    hint = f' Did you mean {value}?' if value else ''\n"
        "    raise OneError(f'{name} is wrong.{hint}')\n"
        "def fail(what):\n"
        "    raise OneError(what)\n"
        "def run():\n"
        "    fail('One fault.')\n"
        "    fail('Two ' + 'faults.')\n"
    )
    found = {(one.text, one.continuations) for one in collect_messages(tmp_path)}
    assert found == {
        ("‹name› is wrong.‹hint›", ("Did you mean ‹value›?",)), ("One fault.", ()), ("Two faults.", ()),
    }  # fmt: skip


def test_each_verb_and_option_is_listed() -> None:
    page = commands()
    for name, verb in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"\n## openneutron {name}\n" in page
        section = page.split(f"\n## openneutron {name}\n")[1].split("\n## ")[0]
        assert all(flag in section for parameter in verb.params for flag in parameter.opts if flag.startswith("-"))


def test_each_setting_is_listed() -> None:
    page = settings()
    assert all(f"| `{one.name}` |" in page for section in SECTIONS for one in fields_of(section))


def test_each_target_is_listed() -> None:
    assert all(f"| `{name}` |" in targets() for name in TARGETS)
    assert all(f"### {name}\n" in targets() for name in boards())


@pytest.mark.parametrize("package", PYTHON_PACKAGES)
def test_each_public_name_is_listed(package: str) -> None:
    page = python_page(package)
    assert public_names(package)
    assert all(f"\n::: {package}.{name}\n" in page for name in public_names(package))


def test_links_of_the_readme_exist() -> None:
    """Links between the pages of docs/ are checked by `make site`."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


TYPES = types_within(SCHEMAS.values())
OBJECTS = {**{f"openneutron {form}": schema for form, schema in SCHEMAS.items()}, **TYPES}


@pytest.mark.parametrize("name", OBJECTS)
def test_each_key_of_a_result_is_listed_with_its_meaning(name: str) -> None:
    keys = list(keys_of(OBJECTS[name]))
    assert [key for key, _, _ in keys] == list(OBJECTS[name]["properties"])
    assert [key for key, _, meaning in keys if not meaning] == [], "write a text below the field of the dataclass"
    assert not any("null or null" in kind or "None" in meaning for _, kind, meaning in keys)
    part = results().partition(f"\n### {name}\n")[2].partition("\n#")[0]
    if OBJECTS[name] in TYPES.values() and name not in TYPES:  # the document is a type, which the second part lists
        assert part.strip() == f"One [{OBJECTS[name]['title']}](#{OBJECTS[name]['title'].lower()})."
    else:
        assert all(f"| `{key}` | {kind} | {meaning} |" in part for key, kind, meaning in keys)


def test_each_type_of_the_results_is_listed_once() -> None:
    page = results()
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    assert len(headings) == len(set(headings)) == len(OBJECTS)
    assert {link for _, link in re.findall(r"\[(\w+)\]\(#(\w+)\)", page)} <= {one.lower() for one in TYPES}


@pytest.mark.parametrize(
    ("name", "key", "kind", "meaning"),
    [
        ("FileRun", "seconds", "number or null", "The median time of a run on this machine; null if it was not"),
        ("FileRun", "classes", "list of list of [ClassScore](#classscore) or null", "For each row of the first output"),
        ("OutputSummary", "shape", "list of integer or null", "Its shape; null if"),
        ("Summary", "versions", "object of string", "Versions of Python"),
        ("LayerAccuracyRow", "saturation", "number or null", "Share of its float values"),  # of `LayerAccuracy`
        ("LayerRow", "source", "string or null", "The line of the user's sources"),  # of all results
    ],
)  # fmt: skip
def test_a_key_has_the_meaning_of_its_field(name: str, key: str, kind: str, meaning: str) -> None:
    objects = {**TYPES, "Summary": SCHEMAS["build"]}
    rows = {one: (found, text) for one, found, text in keys_of(objects[name])}
    assert rows[key][0] == kind
    assert rows[key][1].startswith(meaning)
