"""The `layers` option: sets how parts of a model are quantized, or leaves them in float."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from openneutron.core.fx import is_operator, modules_of, note, noted, op_name, operator_aliases, operator_names
from openneutron.errors import OptionError
from openneutron.ops import OPERATORS

__all__ = ["FLOAT", "GRANULARITIES", "PER_CHANNEL", "Layers", "left_in_float"]

PER_TENSOR, PER_CHANNEL, FLOAT = "per_tensor", "per_channel", "float"
GRANULARITIES = (PER_TENSOR, PER_CHANNEL)
SETTINGS = (*GRANULARITIES, FLOAT)

Key = str | type[nn.Module]

_LEFT_IN_FLOAT = "openneutron.left_in_float"


class Layers:
    """How each operator is quantized: "per_tensor" or "per_channel" weights, or "float" for not quantized.

    `default` is the granularity of operators that `layers` does not mention. The keys of `layers` are names of
    operators ("aten.softmax.int"), names of modules ("features.0", which includes its submodules), patterns of such
    names ("head.*", as in `fnmatch`), and types of modules. If keys of several kinds match an operator, the kind that
    is first in this list decides. If keys of one kind match, the innermost module decides. If patterns match the same
    module, the last pattern decides.

    Raises `OptionError` for any other key or value.
    """

    def __init__(self, layers: Mapping[Key, str] | None, default: str) -> None:
        if not isinstance(layers, Mapping | None):
            raise OptionError(f"layers maps names and module types to one of {_list(SETTINGS)}; got {layers!r}.")
        self.default = default
        self._operators: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._patterns: dict[str, str] = {}
        self._types: dict[str, str] = {}
        for key, setting in (layers or {}).items():
            if setting not in SETTINGS:
                raise OptionError(f"layers[{_show(key)}] is one of {_list(SETTINGS)}, not {setting!r}.")
            kind, label = self._kind(key)
            kind[label] = setting
        for label, setting in self._operators.items():
            if setting == PER_CHANNEL and label in _KNOWN_OPERATORS - _PER_CHANNEL_OPERATORS:
                raise OptionError(f"layers['{label}'] is 'per_channel'. {_WHO_TAKES_IT}")

    def _kind(self, key: Key) -> tuple[dict[str, str], str]:
        if isinstance(key, type) and issubclass(key, nn.Module):
            return self._types, f"{key.__module__}.{key.__qualname__}"
        if not isinstance(key, str):
            hint = " Give its name, or its type." if isinstance(key, nn.Module) else ""
            raise OptionError(f"A key of layers is a module's name or type, or an operator's name, not {key!r}.{hint}")
        if key.startswith("aten.") or "::" in key:
            return self._operators, key
        return (self._patterns if set(key) & set("*?[") else self._names), key

    def granularity(self, node: Node) -> str:
        """Returns the granularity of the scales of the weight of `node`: "per_tensor" or "per_channel"."""
        found = self._found(node)
        return self.default if found is None or found[1] == FLOAT else found[1]

    def leave_in_float(self, node: Node) -> bool:
        """Returns whether `node` is to stay in float."""
        return self._float_key(node) is not None

    def mark(self, node: Node) -> None:
        """Notes on `node`, which stays in float, the key of `layers` that asked for it."""
        note(node, _LEFT_IN_FLOAT, f"layers[{self._float_key(node)}]")

    def _float_key(self, node: Node) -> str | None:
        found = self._found(node)
        return found[0] if found is not None and found[1] == FLOAT else None

    def _found(self, node: Node) -> tuple[str, str] | None:
        """Returns the key that matches `node`, as text, and its setting, or None."""
        for label in _operator_labels(node):
            if label in self._operators:
                return f"'{label}'", self._operators[label]
        if not (self._names or self._patterns or self._types):
            return None
        modules = modules_of(node)
        names = list(_covering(name for name, _ in modules))
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

    def check(self, module: GraphModule) -> None:
        """Raises `OptionError` for a key that matches no operator of the model, or for "per_channel" where no weight
        supports it.

        Linear in the nodes of the model.
        """
        operators, names, types = _Scope("operator"), _Scope("module"), _Scope("module type")
        for node in module.graph.nodes:
            if not is_operator(node):
                continue
            modules = modules_of(node)
            operators.add(node, _operator_labels(node))
            names.add(node, _covering(name for name, _ in modules))
            types.add(node, (kind for _, kind in modules))
        for label, setting in self._operators.items():
            operators.check(f"'{label}'", [label], setting)
        for label, setting in self._names.items():
            names.check(f"'{label}'", [label], setting)
        for pattern, setting in self._patterns.items():
            names.check(f"'{pattern}'", [name for name in names.known if fnmatchcase(name, pattern)], setting)
        for label, setting in self._types.items():
            types.check(label, [label], setting)


class _Scope:
    """The labels that keys of one kind can match in a model.

    `known` maps each label to whether the weight of a matching operator can have per-channel scales.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.known: dict[str, bool] = {}

    def add(self, node: Node, labels: Iterable[str]) -> None:
        spec = OPERATORS.get(op_name(node))
        per_channel = spec is not None and spec.weight_axis is not None
        for label in labels:
            self.known[label] = self.known.get(label, False) or per_channel

    def check(self, key: str, labels: list[str], setting: str) -> None:
        found = [label for label in labels if label in self.known]
        if not found:
            near = difflib.get_close_matches(key.strip("'"), self.known, n=5, cutoff=0.5)
            hint = f" Near matches: {', '.join(near)}." if near else ""
            raise OptionError(
                f"layers[{key}] matches no {self.kind} that this model runs.{hint} A batch norm is "
                "part of the convolution or linear that it follows; dropout and identities are removed."
            )
        if setting == PER_CHANNEL and not any(self.known[label] for label in found):
            raise OptionError(f"layers[{key}] is 'per_channel'. {_WHO_TAKES_IT}")


def left_in_float(node: Node) -> str | None:
    """Returns the key of `layers` that left `node` in float, or None."""
    return noted(node, _LEFT_IN_FLOAT)  # type: ignore[no-any-return]


def _operator_labels(node: Node) -> Iterator[str]:
    return (label for name in operator_names(node) for label in operator_aliases(name))


def _covering(names: Iterable[str]) -> Iterator[str]:
    """Returns the names of all modules that contain the modules of these `names`, the innermost first."""
    for inner in reversed(list(names)):
        name = inner
        while name:
            yield name
            name = name.rpartition(".")[0]
    yield ""


def _labels(specs: Iterable[Any]) -> frozenset[str]:
    return frozenset(alias for spec in specs for name in spec.targets for alias in operator_aliases(name))


def _list(values: Iterable[str]) -> str:
    return ", ".join(f"'{value}'" for value in values)


def _show(key: object) -> str:
    return repr(key) if isinstance(key, str) else getattr(key, "__qualname__", repr(key))


_KNOWN_OPERATORS = _labels(OPERATORS.values())
_PER_CHANNEL_OPERATORS = _labels(spec for spec in OPERATORS.values() if spec.weight_axis is not None)
_WHO_TAKES_IT = (
    "Only the weights of these operators can have one scale for each output channel, and there is none here: "
    + ", ".join(sorted({spec.name for spec in OPERATORS.values() if spec.weight_axis is not None}))
    + "."
)
