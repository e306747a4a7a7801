"""Collects the messages of all errors and warnings from the sources of the package.

A message is the first argument of a call that makes an error or a warning. Fields of f-strings become placeholders in
angle quotation marks. Arguments of functions that make errors are taken from the calls of these functions.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Message", "collect_messages"]

PACKAGE = Path(__file__).parents[2] / "src" / "openneutron"
BUILTIN_KINDS = frozenset({"AssertionError", "AttributeError", "ImportError", "ModuleNotFoundError", "ValueError"})
MOST_ALTERNATIVES = 24
MOST_DEPTH = 6
"""Limits of the resolution of variables and calls in a message."""
WORDS_OF_A_CONTINUATION = 3


@dataclass(frozen=True)
class Message:
    """One message of the package.

    `kind` is the class of the error or warning. `continuations` are texts that some fields of the message stand for.
    """

    kind: str
    module: str
    text: str
    continuations: tuple[str, ...] = ()

    @property
    def room(self) -> str:
        """The folder or module of `src/openneutron` that raises it."""
        return self.module.split("/", maxsplit=1)[0].removesuffix(".py")

    @property
    def whole(self) -> str:
        """The message with all continuations."""
        return " ".join((self.text, *self.continuations))


def collect_messages(package: Path = PACKAGE) -> list[Message]:
    """Returns all messages of the modules in `package`, sorted, each once."""
    modules = {
        path.relative_to(package).as_posix(): ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))
    }
    sources = _Sources(modules)
    found = {message: None for name, tree in modules.items() for message in _messages(sources, name, tree)}
    return sorted(found, key=lambda message: (message.kind, message.module, message.text, message.continuations))


def _messages(sources: _Sources, module: str, tree: ast.Module) -> Iterator[Message]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        for kind, expression in sources.made_by(node):
            scope = sources.scopes.get(node)
            for text in sources.texts(expression, module, scope):
                if text.value.strip("‹› ") and not text.is_field:
                    yield Message(kind, module, text.value, text.continuations)


@dataclass(frozen=True)
class _Text:
    """A text with placeholders. `is_field` marks a text that is only a placeholder."""

    value: str
    continuations: tuple[str, ...] = ()
    is_field: bool = False


Function = ast.FunctionDef


@dataclass
class _Sources:
    """The modules of the package, and the functions, classes and calls in them, by name."""

    modules: Mapping[str, ast.Module]
    scopes: dict[ast.AST, Function | None] = field(default_factory=dict)
    functions: dict[str, list[tuple[str, Function]]] = field(default_factory=dict)
    calls: dict[str, list[tuple[str, ast.Call]]] = field(default_factory=dict)
    kinds: frozenset[str] = BUILTIN_KINDS
    factories: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        bases: dict[str, set[str]] = {}
        for module, tree in self.modules.items():
            self._visit(module, tree, None)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = {_name(base) for base in node.bases}
        known = {"Exception", "UserWarning", "OpenNeutronError"}
        for _ in bases:
            known |= {name for name, above in bases.items() if above & known}
        self.kinds = BUILTIN_KINDS | known - {"Exception", "UserWarning"}

    def _visit(self, module: str, node: ast.AST, scope: Function | None) -> None:
        self.scopes[node] = scope
        if isinstance(node, ast.FunctionDef):
            self.functions.setdefault(node.name, []).append((module, node))
            scope = node
        if isinstance(node, ast.Call):
            self.calls.setdefault(_name(node.func), []).append((module, node))
        for child in ast.iter_child_nodes(node):
            self._visit(module, child, scope)

    def made_by(self, call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
        """Yields the class and the message of each error or warning that `call` makes."""
        name = _name(call.func)
        if not call.args:
            return
        if name in self.kinds and not _is_declared(call):
            yield name, call.args[0]
        elif name == "error_at" and len(call.args) > 1:
            kinds = [_name(one) for one in (*call.args[2:], *(keyword.value for keyword in call.keywords))]
            yield next((kind for kind in kinds if kind in self.kinds), "ModelError"), call.args[1]
        elif name == "warn" and len(call.args) > 1:
            yield _name(call.args[1]), call.args[0]
        elif name == "print_error":
            yield "Messages of the command line", call.args[0]

    def texts(self, node: ast.expr, module: str, scope: Function | None, depth: int = 0) -> list[_Text]:
        """Returns the texts that an expression may have in a function."""
        if isinstance(node, ast.Constant):
            return [_Text(str(node.value))] if node.value is not None else []
        if isinstance(node, ast.JoinedStr):
            parts = [self._part(value, module, scope, depth) for value in node.values]
            return [
                _Text("".join(value for value, _ in parts), tuple(_unique(tail for _, one in parts for tail in one)))
            ]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = (self.texts(side, module, scope, depth) for side in (node.left, node.right))
            pairs = itertools.islice(itertools.product(*sides), MOST_ALTERNATIVES)
            return [
                _Text(a.value + b.value, a.continuations + b.continuations, a.is_field and b.is_field) for a, b in pairs
            ]
        if isinstance(node, ast.IfExp):
            return self.texts(node.body, module, scope, depth) + self.texts(node.orelse, module, scope, depth)
        found: list[_Text] = []
        if depth < MOST_DEPTH:
            if isinstance(node, ast.Name):
                found = self._variable(node.id, module, scope, depth + 1)
            elif isinstance(node, ast.Call):
                found = self._results(_name(node.func), module, depth + 1)
        return found[:MOST_ALTERNATIVES] or [_Text(_placeholder(node), is_field=True)]

    def _part(self, value: ast.expr, module: str, scope: Function | None, depth: int) -> tuple[str, tuple[str, ...]]:
        """Returns a part of an f-string, and the texts that its field may stand for."""
        if not isinstance(value, ast.FormattedValue):
            return str(getattr(value, "value", "")), ()
        found = self.texts(value.value, module, scope, depth + 1) if depth < MOST_DEPTH else []
        written = [one for one in found if not one.is_field and len(one.value.split()) >= WORDS_OF_A_CONTINUATION]
        tails = [tail for one in written for tail in (one.value.strip(), *one.continuations)]
        return _placeholder(value.value), tuple(_unique(tails))

    def _variable(self, name: str, module: str, scope: Function | None, depth: int) -> list[_Text]:
        """Returns the texts of a variable: of its assignments, or of the argument in the calls of the function."""
        body: ast.AST = scope or self.modules[module]
        values = [
            node.value
            for node in ast.walk(body)
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr))
            and node.value is not None
            and name in {_name(one) for one in (node.targets if isinstance(node, ast.Assign) else [node.target])}
        ]
        if values:
            return [text for value in values for text in self.texts(value, module, scope, depth)]
        if scope is None:
            return []
        parameters = [one.arg for one in (*scope.args.posonlyargs, *scope.args.args) if one.arg not in ("self", "cls")]
        if name in parameters:
            return list(self._arguments(scope.name, parameters, name, depth))
        return self._variable(name, module, None, depth)

    def _arguments(self, function: str, parameters: list[str], name: str, depth: int) -> Iterator[_Text]:
        for module, call in self.calls.get(function, []):
            if len(call.args) > len(parameters):
                continue
            given = dict(zip(parameters, call.args, strict=False))
            given.update({keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None})
            if name in given and not isinstance(given[name], ast.Starred):
                yield from self.texts(given[name], module, self.scopes[call], depth)

    def _results(self, name: str, module: str, depth: int) -> list[_Text]:
        """Returns the texts that a function of the package returns, if its name is unique or it is in `module`."""
        known = self.functions.get(name, [])
        here = [one for one in known if one[0] == module] or known
        if len(here) != 1 or "str" not in ast.unparse(here[0][1].returns or ast.Constant(None)).split(" | "):
            return []
        home, function = here[0]
        returned = [
            node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None
        ]
        return [text for value in returned for text in self.texts(value, home, function, depth)]


def _is_declared(call: ast.Call) -> bool:
    """Whether a call of a class is not a message, such as `AttributeError()`."""
    return not call.args


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _name(node: ast.AST) -> str:
    """Returns the last identifier of a name or an attribute."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _placeholder(node: ast.expr) -> str:
    return f"‹{_term(node).strip('_').replace('_', ' ').lower() or '...'}›"


_TRANSPARENT = frozenset({"join", "sorted", "list", "set", "map", "str", "repr", "first_line", "type"})
"""Functions whose argument says more than their name."""


def _term(node: ast.AST) -> str:
    """Returns the identifier that says most of what an expression stands for."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _name(node)
    if isinstance(node, ast.Call):
        if _name(node.func) in ("len", "sum"):
            return "number"
        if node.args and _name(node.func) in (
            "join",
            "sorted",
            "list",
            "set",
            "map",
            "str",
            "repr",
            "first_line",
            "type",
        ):
            return _term(node.args[-1])
        return _name(node.func).removesuffix("_of") or "..."
    if isinstance(node, (ast.GeneratorExp, ast.ListComp, ast.SetComp)):
        return _term(node.generators[0].iter)
    parts = {ast.Subscript: "value", ast.IfExp: "body", ast.BinOp: "left", ast.BoolOp: "values", ast.Starred: "value",
             ast.NamedExpr: "target", ast.FormattedValue: "value"}  # fmt: skip
    for kind, part in parts.items():
        if isinstance(node, kind):
            inner = getattr(node, part)
            return _term(inner[0] if isinstance(inner, list) else inner)
    return "..."
