"""Keys that select operators of a model: by the operator's name, or by the name or type of a module around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.fx import GraphModule, Node

from openneutron.core.fx import is_operator, modules_of, operator_aliases, operator_names
from openneutron.core.messages import near_matches
from openneutron.errors import OptionError

__all__ = ["Key", "NodeKeys", "operator_labels"]

Key = str | type[nn.Module]


class NodeKeys:
    """A mapping from keys to settings, both strings, that is looked up by node.

    The keys are names of operators ("aten.softmax.int"), names of modules ("features.0", which includes its
    submodules), patterns of such names ("head.*", as in `fnmatch`), and types of modules. If keys of several kinds
    match an operator, the kind that is first in this list decides. If keys of one kind match, the innermost module
    decides. If patterns match the same module, the last pattern decides.

    `option` is the name of the option in messages. Raises `OptionError` for a key of any other type.
    """

    def __init__(self, option: str, settings: Mapping[Key, str]) -> None:
        self.option = option
        self.operators: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._patterns: dict[str, str] = {}
        self._types: dict[str, str] = {}
        for key, setting in settings.items():
            kind, label = self._settings_of_kind(key)
            kind[label] = setting

    def _settings_of_kind(self, key: Key) -> tuple[dict[str, str], str]:
        if isinstance(key, type) and issubclass(key, nn.Module):
            return self._types, f"{key.__module__}.{key.__qualname__}"
        if not isinstance(key, str):
            hint = " Give its name, or its type." if isinstance(key, nn.Module) else ""
            raise OptionError(
                f"A key of {self.option} is a module's name or type, or an operator's name, not {key!r}.{hint}"
            )
        if key.startswith("aten.") or "::" in key:
            return self.operators, key
        return (self._patterns if set(key) & set("*?[") else self._names), key

    def lookup(self, node: Node) -> tuple[str, str] | None:
        """Returns the key that matches `node`, as text, and its setting, or None."""
        for label in operator_labels(node):
            if label in self.operators:
                return f"'{label}'", self.operators[label]
        if not (self._names or self._patterns or self._types):
            return None
        modules = modules_of(node)
        names = list(_enclosing_modules(name for name, _ in modules))
        for name in names:
            if name in self._names:
                return f"'{name}'", self._names[name]
        for name in names:
            for pattern, setting in reversed(self._patterns.items()):
                if fnmatchcase(name, pattern):
                    return f"'{pattern}'", setting
        for _, kind in reversed(modules):
            if kind in self._types:
                return kind, self._types[kind]
        return None

    def check(self, module: GraphModule, applies: Callable[[Node, str], bool], problem: Callable[[str], str]) -> None:
        """Raises `OptionError` for a key that matches no operator of the model, or none to which its setting applies.

        `applies` returns whether a setting applies to an operator. `problem` returns the rest of the message
        "option[key] ..." for a setting that applies to no matching operator. Linear in nodes and in different settings.
        """
        settings = {*self.operators.values(), *self._names.values(), *self._patterns.values(), *self._types.values()}
        operators, names, types = (_Scope(self.option, kind) for kind in ("operator", "module", "module type"))
        for node in module.graph.nodes:
            if not is_operator(node):
                continue
            modules, taken = modules_of(node), {setting for setting in settings if applies(node, setting)}
            operators.add(operator_labels(node), taken)
            names.add(_enclosing_modules(name for name, _ in modules), taken)
            types.add((kind for _, kind in modules), taken)
        for label, setting in self.operators.items():
            operators.check(f"'{label}'", [label], setting, problem)
        for label, setting in self._names.items():
            names.check(f"'{label}'", [label], setting, problem)
        for pattern, setting in self._patterns.items():
            found = [name for name in names.known if fnmatchcase(name, pattern)]
            names.check(f"'{pattern}'", found, setting, problem)
        for label, setting in self._types.items():
            types.check(label, [label], setting, problem)


class _Scope:
    """The names in a model that keys of one kind can match: names of operators, names of modules, or module types.

    `known` maps each name to the settings that apply to at least one of its operators.
    """

    def __init__(self, option: str, kind: str) -> None:
        self.option, self.kind = option, kind
        self.known: dict[str, set[str]] = {}

    def add(self, labels: Iterable[str], settings: set[str]) -> None:
        for label in labels:
            self.known.setdefault(label, set()).update(settings)

    def check(self, key: str, labels: list[str], setting: str, problem: Callable[[str], str]) -> None:
        found = [label for label in labels if label in self.known]
        if not found:
            hint = near_matches(key.strip("'"), self.known)
            raise OptionError(
                f"{self.option}[{key}] matches no {self.kind} that this model runs.{hint} A batch norm is part "
                "of the convolution or linear that it follows; dropout and identities are removed."
            )
        if not any(setting in self.known[label] for label in found):
            raise OptionError(f"{self.option}[{key}] {problem(setting)}")


def operator_labels(node: Node) -> Iterator[str]:
    """Returns all spellings of the operator of `node`, and of the operators that passes replaced by it."""
    return (label for name in operator_names(node) for label in operator_aliases(name))


def _enclosing_modules(names: Iterable[str]) -> Iterator[str]:
    """Returns the names of all modules that contain the modules of these `names`, the innermost first."""
    for inner in reversed(list(names)):
        name = inner
        while name:
            yield name
            name = name.rpartition(".")[0]
    yield ""
