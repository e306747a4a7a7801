"""Union-find."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TypeVar

__all__ = ["find_root"]

Key = TypeVar("Key")


def find_root(parent: MutableMapping[Key, Key], value: Key) -> Key:
    """The representative of the group of `value`, which is its own where `parent` has no entry for it.

    Shortens the way there, so that a sequence of calls is almost linear.
    """
    root = value
    while (above := parent.get(root, root)) != root:
        root = above
    while value != root:
        parent[value], value = root, parent[value]
    return root
