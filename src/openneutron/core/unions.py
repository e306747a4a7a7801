"""Union-find."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TypeVar

__all__ = ["find_root"]

Key = TypeVar("Key")


def find_root(parent: MutableMapping[Key, Key], value: Key) -> Key:
    """Returns the root of the set that contains `value`. A value without an entry in `parent` is a root.

    Compresses the path to the root, so that a sequence of calls takes almost linear time.
    """
    root = value
    while (above := parent.get(root, root)) != root:
        root = above
    while value != root:
        parent[value], value = root, parent[value]
    return root
