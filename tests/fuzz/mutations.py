"""Random changes of bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["mutated"]

_INTERESTING = (
    0,
    1,
    2,
    4,
    8,
    16,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32 - 4,
    2**63,
    2**64 - 1,
)


def mutated(data: bytes, others: Sequence[bytes], words: Sequence[bytes], chance: random.Random) -> bytes:
    """Returns `data` after one to four changes: of bits and integers, cuts, repetitions, parts of other files."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(changed) + 1)
        end = min(len(changed), at + chance.choice((1, 2, 4, 8, 64)))
        kind = chance.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            size = chance.choice((1, 2, 4, 8))
            at -= at % size
            value = (chance.choice(_INTERESTING) + chance.randrange(-2, 3)) % (1 << 8 * size)
            changed[at : at + size] = value.to_bytes(size, "little")
        elif kind == 2:
            del changed[at:end]
        elif kind == 3:
            changed[at:at] = changed[at:end] * chance.choice((1, 2, 100))
        elif kind == 4 and words:
            word = chance.choice(words)
            changed[at : at + chance.choice((0, len(word)))] = word
        elif kind == 5:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            changed[at:end] = other[start : start + end - at]
        else:
            changed[at:end] = chance.randbytes(end - at)
    return bytes(changed)
