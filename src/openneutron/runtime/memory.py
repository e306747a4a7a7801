"""Counts the memory that ExecuTorch's runtime allocates for a method of a `.pte` on this machine.

`openneutron.formats.method_memory` computes the same numbers from the program, also for the board.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from openneutron.errors import HostError, PoolError
from openneutron.formats import pte
from openneutron.formats.method_memory import MeasuredPools
from openneutron.runtime.native import native_module

__all__ = ["measure", "run_in_pools"]

_LARGEST_POOL = 2**32 - 1
"""The runtime counts the bytes of the pools of the method and the temporary allocator in 32 bits."""


def measure(data: bytes, method: str = "forward") -> MeasuredPools:
    """Loads a method of a `.pte` on this machine, runs it once on zeros, and counts what the runtime allocates.

    Raises `HostError` if the method cannot be loaded or run (a device program cannot), and `NativeModuleError` without
    the native module.
    """
    plan = next((one for one in pte.read(data).methods if one.name == method), None)
    values = [] if plan is None else list(map(_zeros, plan.inputs))
    used, load, run, _ = _run(data, method, values)
    return MeasuredPools(used, load, run)


def run_in_pools(
    data: bytes,
    inputs: Sequence[bytes | int | float | bool | None],
    *,
    method_bytes: int,
    temporary_bytes: int,
    planned_bytes: Sequence[int],
    method: str = "forward",
) -> tuple[bytes, ...]:
    """Loads and runs a method on this machine in pools of these sizes in bytes, and returns the bytes of its outputs.

    `inputs` are the bytes of tensors, in the dim order of the program, and the values of constants. For an output that
    is not a tensor, returns empty bytes. Raises `PoolError` if a pool is too small, and `HostError` for other failures.
    """
    return tuple(_run(data, method, inputs, method_bytes, temporary_bytes, list(planned_bytes))[3])


def _run(
    data: bytes, method: str, inputs: Sequence[bytes | int | float | bool | None], *sizes: int | list[int]
) -> tuple[int, int, int, list[bytes]]:
    native = native_module()
    native.clear_error()
    try:
        result: tuple[int, int, int, list[bytes]] = native.run_in_pools(data, method, list(inputs), *sizes)
    except MemoryError as error:
        raise PoolError(f"The method '{method}' does not run in its pools: {error}.") from error
    except TypeError as error:
        raise HostError(
            f"The method '{method}' does not run: a size or an input has a wrong type. Give sizes from 0 to "
            f"{_LARGEST_POOL:,} bytes, and inputs as bytes or numbers."
        ) from error
    except (ValueError, RuntimeError) as error:
        if native.interrupted():
            raise KeyboardInterrupt from error
        raise HostError(f"The method '{method}' does not run: {native.last_error() or error}.") from error
    return result


def _zeros(value: pte.ProgramValue) -> bytes | int | float | bool | None:
    if value.dtype == "none":
        return None
    if value.constant is not None:
        return value.constant if not isinstance(value.constant, str) else None
    return bytes(math.prod(value.shape) * pte.ITEM_BYTES.get(value.dtype, 1))
