"""Names of inputs and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

__all__ = ["distinct_names"]


def distinct_names(names: Sequence[str], unnamed: str) -> tuple[str, ...]:
    """Returns `names`, with `unnamed` and the position in place of some of them: "input{}" gives "input0".

    An empty name, a name that occurs twice, and a name that equals the numbered name of another are replaced. The
    results differ, unless `unnamed` has no place for the position. Takes linear time.
    """
    found = list(names)
    times = Counter(found)
    numbered = [unnamed.format(i) for i in range(len(found))]
    kept = {name: i for i, name in enumerate(found) if name and times[name] == 1}
    left = [i for i, name in enumerate(found) if name not in kept]
    while left:  # a name that is numbered can take the name of another
        i = left.pop()
        found[i] = numbered[i]
        if numbered[i] in kept:
            left.append(kept.pop(numbered[i]))
    return tuple(found)
