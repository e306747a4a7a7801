"""Reads HTML strictly: every element is closed in order, ids are unique, and attributes appear once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

__all__ = ["Element", "parsed"]

_VOID = {"meta", "input", "img", "br", "wbr", "link", "hr", "line", "path", "rect", "circle"}


@dataclass
class Element:
    """An element with its attributes, and its texts and elements in order."""

    tag: str
    attributes: dict[str, str]
    content: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(one if isinstance(one, str) else one.text for one in self.content)

    def all(self, tag: str, **attributes: str) -> Iterator[Element]:
        """Returns the elements below this one with a tag and attributes ("class" is written "class_")."""
        for one in self.content:
            if isinstance(one, Element):
                wanted = {name.rstrip("_"): value for name, value in attributes.items()}
                if one.tag == tag and all(one.attributes.get(name) == value for name, value in wanted.items()):
                    yield one
                yield from one.all(tag, **attributes)

    def rows(self) -> list[list[str]]:
        """Returns the texts of the cells of all rows of a table, with single spaces."""
        rows = []
        for row in self.all("tr"):
            cells = [one for one in row.content if isinstance(one, Element) and one.tag in ("td", "th")]
            rows.append([" ".join(cell.text.split()) for cell in cells])
        return rows


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("document", {})
        self.open = [self.root]
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        if name := element.attributes.get("id"):
            assert name not in self.ids, f"two elements have the id {name}"
            self.ids.add(name)
        self.open[-1].content.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        opened = self.open.pop()
        assert opened.tag == tag, f"</{tag}> closes <{opened.tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.open[-1].content.append(data)


def parsed(page: str) -> Element:
    """Returns the document. Fails for elements that are not closed in order, and for an id that is not unique."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.root], f"not closed: {[one.tag for one in parser.open[1:]]}"
    return parser.root
