"""Python's garbage collection while many objects are created."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["FULL_COLLECTION_THRESHOLD", "rare_full_collections"]

# A full collection visits all objects of the process. After the imports of torch, torchao and ExecuTorch these are more
# than a million, and a visit takes as long as the compilation of a network. By default, a full collection may follow
# after ten collections of younger objects.
FULL_COLLECTION_THRESHOLD = 100


@contextmanager
def rare_full_collections() -> Iterator[None]:
    """Collects all garbage after at least `FULL_COLLECTION_THRESHOLD` collections of younger objects in the block.

    A larger threshold of the user remains. Restores the threshold of the process afterwards.
    """
    youngest, middle, oldest = gc.get_threshold()
    gc.set_threshold(youngest, middle, max(oldest, FULL_COLLECTION_THRESHOLD))
    try:
        yield
    finally:
        gc.set_threshold(youngest, middle, oldest)
