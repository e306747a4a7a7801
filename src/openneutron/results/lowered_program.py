"""The fields of a lowered program. `lower` returns one as a `NeutronProgram`."""

from __future__ import annotations

from dataclasses import dataclass, field

from openneutron.model.arguments import Leaf
from openneutron.partition.placing import Placement
from openneutron.targets import NeutronTargetSpec
from openneutron.vendor.profiling import Kernel

__all__ = ["LoweredProgram"]


@dataclass(frozen=True)
class LoweredProgram:
    """A `.pte` and its placement. Its subclass `NeutronProgram` runs, saves and packages it."""

    buffer: bytes = field(repr=False)
    """The bytes of the `.pte`: a device program if `is_device`, else a portable program."""
    placement: tuple[Placement, ...]
    """One row per operator of the quantized graph, with its processor and the reason."""
    target: str = "imxrt700"
    """The name of the chip that the program was lowered for."""
    device_source: bytes | None = field(default=None, repr=False)
    """The portable `.pte` from which a device program was compiled. The host runs it. None for a portable program."""
    kernel_selection: str | None = field(default=None, repr=False)
    """The C source that `dump_kernel_selection_code` requests; None without that option."""
    kernels: tuple[tuple[Kernel, ...], ...] = ()
    """With `use_profiling`, the NPU's kernels of each delegate of a device program, in the order of its profile.

    The `nodes` of a kernel are nodes of `placement`, which has the source lines.
    """
    leaves: tuple[Leaf, ...] | None = field(default=None, repr=False)
    """The path of each input of the `.pte` in the arguments of `forward`; None if unknown."""
    origins: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    """For each delegate, the node of `placement` that each operator of its TFLite model came from, in their order.

    An operator at an end of the delegate, such as a transpose, may have another name.
    """
    board: NeutronTargetSpec | None = field(default=None, repr=False)
    """The board, for estimates; None if only a chip was named. The bytes of the program do not depend on it."""
    etrecord: bytes | None = field(default=None, repr=False)
    """With `use_profiling`, ExecuTorch's ETRecord of the program, for its Inspector; else None."""

    @property
    def is_device(self) -> bool:
        """Whether `buffer` contains microcode, which only the board runs."""
        return self.device_source is not None

    @property
    def portable(self) -> bytes:
        """The bytes of the portable `.pte`. The host runs it."""
        return self.buffer if self.device_source is None else self.device_source
