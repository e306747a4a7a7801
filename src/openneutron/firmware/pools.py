"""Computes the memory that a program needs, for `model_config.h`."""

from __future__ import annotations

from openneutron.firmware.config import Pools
from openneutron.formats.method_memory import memory_of
from openneutron.runtime.memory import measure

__all__ = ["pools_of"]


def pools_of(program: bytes, portable: bytes | None) -> Pools:
    """Returns the memory of a program. This machine runs `portable` to measure it; None if it can run neither."""
    memory = memory_of(program, measured=None if portable is None else measure(portable))
    return Pools(
        planned=tuple(buffer.bytes for buffer in memory.planned),
        method=(memory.host.method.pool_bytes, memory.device.method.pool_bytes),
        temporary=(memory.host.temporary.pool_bytes, memory.device.temporary.pool_bytes),
        delegates=len(memory.delegates),
        unknown_method=memory.device.method.unknown,
        unknown_temporary=memory.device.temporary.unknown,
    )
