"""The options `layers` and `wide`: set how parts of a model are quantized."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from openneutron.core.fx import note, note_of, op_name, operator_aliases, operator_names
from openneutron.errors import OptionError
from openneutron.ops import DECOMPOSITIONS, OPERATORS
from openneutron.quantizer.node_keys import Key, NodeKeys

__all__ = [
    "FLOAT", "GRANULARITIES", "PER_CHANNEL", "Key", "Layers", "WideStates", "has_wide_state", "leave_in_float",
    "left_in_float",
]  # fmt: skip

PER_TENSOR, PER_CHANNEL, FLOAT = "per_tensor", "per_channel", "float"
GRANULARITIES = (PER_TENSOR, PER_CHANNEL)
SETTINGS = (*GRANULARITIES, FLOAT)
_WIDE = "wide"

_LEFT_IN_FLOAT = "openneutron.left_in_float"


class Layers:
    """How each operator is quantized: "per_tensor" or "per_channel" weights, or "float" for not quantized.

    `default` is the granularity of operators that `layers` does not mention. `NodeKeys` describes the keys.

    Raises `OptionError` for any other key or value.
    """

    def __init__(self, layers: Mapping[Key, str] | None, default: str) -> None:
        if not isinstance(layers, Mapping | None):
            raise OptionError(
                f"layers maps names and module types to one of {_comma_separated(SETTINGS)}; got {layers!r}."
            )
        self.default = default
        for key, setting in (layers or {}).items():
            if setting not in SETTINGS:
                raise OptionError(f"layers[{_key_text(key)}] is one of {_comma_separated(SETTINGS)}, not {setting!r}.")
        self._keys = NodeKeys("layers", layers or {})
        for label, setting in self._keys.operators.items():
            if setting == PER_CHANNEL and label in _KNOWN_OPERATORS - _PER_CHANNEL_OPERATORS:
                raise OptionError(f"layers['{label}'] {_unmatched_message(setting)}")

    def granularity(self, node: Node) -> str:
        """Returns the granularity of the scales of the weight of `node`: "per_tensor" or "per_channel"."""
        found = self._keys.lookup(node)
        return self.default if found is None or found[1] == FLOAT else found[1]

    def leave_in_float(self, node: Node) -> bool:
        """Returns whether `node` is to stay in float."""
        return self._float_key(node) is not None

    def mark(self, node: Node) -> None:
        """Notes on `node`, which stays in float, the key of `layers` that asked for it."""
        note(node, _LEFT_IN_FLOAT, f"layers[{self._float_key(node)}]")

    def _float_key(self, node: Node) -> str | None:
        found = self._keys.lookup(node)
        return found[0] if found is not None and found[1] == FLOAT else None

    def check(self, module: GraphModule) -> None:
        """Raises `OptionError` for a key that matches no operator of the model, or for "per_channel" where no weight
        supports it.

        Linear in the nodes of the model.
        """
        self._keys.check(module, _applies_to, _unmatched_message)


class WideStates:
    """The recurrent operators whose cell state consists of two int8 tensors, selected by the keys of `NodeKeys`.

    Raises `OptionError` for anything but None or an iterable of keys.
    """

    def __init__(self, keys: Iterable[Key] | None) -> None:
        if isinstance(keys, str) or not isinstance(keys, Iterable | None):
            hint = " Only quantize() takes 'auto', because it has calibration inputs." if keys == "auto" else ""
            raise OptionError(f"wide is a list of names and types of modules, or of operators, not {keys!r}.{hint}")
        given, keys = keys is not None, list(keys or ())
        if wrong := [key for key in keys if not isinstance(key, Hashable)]:
            raise OptionError(f"wide is a list of names and types of modules, or of operators, not of {wrong[0]!r}.")
        self.is_empty_list = given and not keys
        """Whether the option is an empty list, so that no input consists of two int8 tensors either."""
        self._keys = NodeKeys("wide", dict.fromkeys(keys, _WIDE))

    def selects(self, node: Node) -> bool:
        """Returns whether the state of `node` is to consist of two int8 tensors."""
        return self._keys.lookup(node) is not None

    def check(self, module: GraphModule) -> None:
        """Raises `OptionError` for a key that matches no operator of the model with a wide state. Linear in nodes."""
        self._keys.check(module, lambda node, _: has_wide_state(node), lambda _: _NO_WIDE_STATE)


def has_wide_state(node: Node) -> bool:
    """Returns whether the state of `node`, or of the operator that it replaces, can consist of two int8 tensors."""
    return not _WIDE_OPERATORS.isdisjoint(operator_names(node))


def leave_in_float(node: Node, option: str) -> None:
    """Notes on `node` that `option` leaves it in float."""
    note(node, _LEFT_IN_FLOAT, option)


def left_in_float(node: Node) -> str | None:
    """Returns the key of `layers` that left `node` in float, or None."""
    return note_of(node, _LEFT_IN_FLOAT)  # type: ignore[no-any-return]


def _applies_to(node: Node, setting: str) -> bool:
    """Returns whether a setting of `layers` applies to an operator."""
    spec = OPERATORS.get(op_name(node))
    return setting != PER_CHANNEL or (spec is not None and spec.weight_axis is not None)


def _unmatched_message(_: str) -> str:
    return f"is 'per_channel'. {_NO_PER_CHANNEL_WEIGHT}"


def _labels(specs: Iterable[Any]) -> frozenset[str]:
    return frozenset(alias for spec in specs for name in spec.targets for alias in operator_aliases(name))


def _comma_separated(values: Iterable[str]) -> str:
    return ", ".join(f"'{value}'" for value in values)


def _key_text(key: object) -> str:
    return repr(key) if isinstance(key, str) else getattr(key, "__qualname__", repr(key))


_KNOWN_OPERATORS = _labels(OPERATORS.values())
_PER_CHANNEL_OPERATORS = _labels(spec for spec in OPERATORS.values() if spec.weight_axis is not None)
_NO_PER_CHANNEL_WEIGHT = (
    "Only the weights of these operators can have one scale for each output channel, and none of them matches: "
    + ", ".join(sorted({spec.name for spec in OPERATORS.values() if spec.weight_axis is not None}))
    + "."
)
_WIDE_OPERATORS = frozenset(name for spec in DECOMPOSITIONS.values() if spec.has_wide_form for name in spec.targets)
_NO_WIDE_STATE = (
    "matches no "
    + " or ".join(sorted({spec.name for spec in DECOMPOSITIONS.values() if spec.has_wide_form}))
    + ". Only their cell state can consist of two int8 tensors."
)
