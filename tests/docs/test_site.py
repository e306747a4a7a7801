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
from docs.generators.results import keys_of, results
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


@pytest.mark.parametrize("form", SCHEMAS)
def test_each_key_of_a_result_is_listed(form: str) -> None:
    keys = list(keys_of(SCHEMAS[form]))
    assert {key.partition(".")[0].partition("[")[0] for key, _, _ in keys} == set(SCHEMAS[form]["properties"])
    part = results().partition(f"## openneutron {form}\n")[2].partition("\n## ")[0]
    assert all(f"| `{key}` | {kind} |" in part for key, kind, _ in keys)
    assert not any("null or null" in kind for _, kind, _ in keys)


def test_results_have_the_meanings_of_their_fields() -> None:
    rows = {key: (kind, meaning) for key, kind, meaning in keys_of(SCHEMAS["run"])}
    measured = "The median time of a run on this machine; null if it was not measured."
    assert rows["runs[].seconds"] == ("number or null", measured)
    assert rows["runs[].classes[][].score"][0] == "number or null"
    assert rows["runs[].outputs[].shape"][0] == "list of integer or null"
