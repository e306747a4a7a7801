"""Computes the memory that a program needs, for `model_config.h`."""

from __future__ import annotations

from openneutron.firmware.config import PoolSizes
from openneutron.formats.method_memory import KERNELS, POOL_ALIGNMENT, MeasuredPools, Pool, memory_of

__all__ = ["pools_of"]


def pools_of(program: bytes, measured: MeasuredPools | None) -> PoolSizes:
    """Returns the memory of a program. `measured` was counted on this machine; None if it cannot run the program."""
    memory = memory_of(program, measured=measured)
    return PoolSizes(
        planned=tuple(buffer.bytes for buffer in memory.planned),
        method=(_array_bytes(memory.host.method), _array_bytes(memory.device.method)),
        temporary=(_array_bytes(memory.host.temporary), _array_bytes(memory.device.temporary)),
        delegates=len(memory.delegates),
        unknown_method=memory.device.method.unknown,
        unknown_temporary=memory.device.temporary.unknown,
        scratch_is_estimated=any(one.is_estimated for one in memory.delegates),
        kernels_are_measured=any(part.name == KERNELS for part in memory.device.temporary.parts),
    )


def _array_bytes(pool: Pool) -> int:
    """Returns the bytes of the array for a pool. C and C++ have no arrays of 0 bytes."""
    return max(pool.pool_bytes, POOL_ALIGNMENT)
