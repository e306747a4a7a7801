"""The properties of each target's NPU, and the generations of the vendor's converter.

The numbers are published by NXP or were read from files that NXP's converter wrote. An unknown property is `None` and
is displayed as "unknown".
"""

from __future__ import annotations

import difflib
import enum
import re
from dataclasses import dataclass

from openneutron.errors import OptionError, TargetError

__all__ = [
    "TARGETS", "Generation", "HardwareVersion", "NeutronTarget", "NeutronTargetSpec", "generation_of_flavor",
    "takes_weights_per_channel",
]  # fmt: skip


class HardwareVersion(enum.IntEnum):
    """Compute block generation, numbered as in the vendor's SDK."""

    N1 = 1
    N3 = 2


class Generation(enum.Enum):
    """Generation of the vendor's converter. The modern generation has fewer operator limits than the legacy one."""

    LEGACY = "legacy"
    MODERN = "modern"


# Assumed where the MACs per pipeline are unknown. Limits become stricter as this number grows, so the largest
# plausible value is safe.
ASSUMED_MACS_PER_PIPELINE = 16


@dataclass(frozen=True)
class NeutronTarget:
    """One target of the vendor's converter. `None` means unknown."""

    name: str
    soc: str
    npu: str | None
    neutron_class: str
    hardware_version: HardwareVersion | None = None
    macs_per_cycle: int | None = None
    pipelines: int | None = None
    macs_per_pipeline: int | None = None
    clock_hz: int | None = None
    sram_bytes: int | None = None
    flash_bytes: int | None = None
    fused_activations: frozenset[str] = frozenset({"RELU", "RELU6", "RELU_N1_TO_1"})

    @property
    def channel_granularity(self) -> int:
        """Number of channels that a pipeline processes at once (M in the operator limits)."""
        return self.macs_per_pipeline or ASSUMED_MACS_PER_PIPELINE

    @property
    def granularity_note(self) -> str:
        """A sentence that gives the MACs per pipeline, for messages about operator limits."""
        if self.macs_per_pipeline:
            return f"A pipeline of {self.name} has {self.macs_per_pipeline} MACs."
        assumed = ASSUMED_MACS_PER_PIPELINE
        return f"The MACs per pipeline of {self.name} are unknown; the limits assume {assumed}."

    def align_channels(self, size: int) -> int:
        """Rounds `size` up to a multiple of the MACs per pipeline."""
        return -(-size // self.channel_granularity) * self.channel_granularity


_KIB, _MIB = 1024, 1024 * 1024

TARGETS: dict[str, NeutronTarget] = {
    target.name: target
    for target in (
        NeutronTarget(
            "imxrt700", "i.MX RT700", "N3-64", "Neutron-C", HardwareVersion.N3, macs_per_cycle=64, pipelines=8,
            macs_per_pipeline=8, sram_bytes=int(7.5 * _MIB),
        ),
        # NXP does not publish the pipelines of the N1-16. Models that NXP converted for the N1-16 store weights in
        # groups of 4 input channels; models for the RT700, which has 8 MACs a pipeline, store them in groups of 8.
        NeutronTarget(
            "mcxn94x", "MCX N94x", "N1-16", "Neutron-C", HardwareVersion.N1, macs_per_cycle=16, pipelines=4,
            macs_per_pipeline=4, clock_hz=150_000_000, sram_bytes=512 * _KIB, flash_bytes=2 * _MIB,
        ),
        NeutronTarget(
            "mcxn54x", "MCX N54x", "N1-16", "Neutron-C", HardwareVersion.N1, macs_per_cycle=16, pipelines=4,
            macs_per_pipeline=4, clock_hz=150_000_000, sram_bytes=512 * _KIB, flash_bytes=2 * _MIB,
        ),
        NeutronTarget(
            "imx95", "i.MX 95", "N3-1024S", "Neutron-S", HardwareVersion.N3, macs_per_cycle=1024,
            clock_hz=1_000_000_000,
        ),
        NeutronTarget("imx943", "i.MX 943", None, "Neutron-S"),
        NeutronTarget("imx952", "i.MX 952", None, "Neutron-S"),
        NeutronTarget("s32n79", "S32N79", None, "Neutron-S"),
        NeutronTarget("s32k5", "S32K5", None, "Neutron-C"),
    )
}  # fmt: skip


def _hint(target: str) -> str:
    """Suggests a known target, or separates a target and a converter flavour that were given in one text."""
    letters = _letters(target)
    flavor = re.search(r"SDK[_-]?\d.*|\d+\.\d+.*", target, re.IGNORECASE)
    if flavor is not None:
        name = next((name for name in TARGETS if name in letters), "imxrt700")
        return f" '{flavor[0]}' is a converter flavour: give '{name}', and neutron_converter_flavor='{flavor[0]}'."
    known = {_letters(name): target.name for target in TARGETS.values() for name in (target.name, target.soc)}
    near = difflib.get_close_matches(letters, known, n=1)
    return f" Did you mean '{known[near[0]]}'?" if near else ""


def _letters(text: str) -> str:
    """Returns the letters and digits of `text` in lower case."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


class NeutronTargetSpec:
    """The properties of one target. Its methods have the names of ExecuTorch's own backend.

    Raises `TargetError` for an unknown target; the message lists the known ones.
    """

    def __init__(self, target: str | NeutronTargetSpec = "imxrt700") -> None:
        if isinstance(target, NeutronTargetSpec):
            target = target.get_name()
        if not isinstance(target, str) or target not in TARGETS:
            raise TargetError(f"Unknown target '{target}'.{_hint(str(target))} Known targets: {', '.join(TARGETS)}.")
        self.neutron_target = TARGETS[target]

    def __repr__(self) -> str:
        known = (f"{name}={'unknown' if value is None else value}" for name, value in vars(self.neutron_target).items())
        return f"NeutronTargetSpec({', '.join(known)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NeutronTargetSpec) and self.neutron_target == other.neutron_target

    def __hash__(self) -> int:
        return hash(self.neutron_target)

    @property
    def name(self) -> str:
        """The converter's name of the target."""
        return self.neutron_target.name

    def get_name(self) -> str:
        """The converter's name of the target."""
        return self.neutron_target.name

    def is_subsystem(self) -> bool:
        """Whether the NPU has a controller of its own (Neutron-S)."""
        return self.neutron_target.neutron_class == "Neutron-S"

    def get_num_pipes(self) -> int | None:
        """Number of compute pipelines; None if unknown."""
        return self.neutron_target.pipelines

    def get_num_macs(self) -> int | None:
        """Multiply-accumulates of one pipeline per cycle; None if unknown."""
        return self.neutron_target.macs_per_pipeline

    def get_hw_version(self) -> HardwareVersion | None:
        """Generation of the compute block; None if unknown."""
        return self.neutron_target.hardware_version


_SDK_RELEASE = re.compile(r"SDK_(\d\d)_(\d\d)")
_SDK_PACKAGE = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_LAST_LEGACY_RELEASE = (25, 12)
_FIRST_RELEASE_WITH_WEIGHTS_PER_CHANNEL = (25, 9)
_FIRST_MODERN_PACKAGE = (3, 1, 3)


def generation_of_flavor(flavor: str | None) -> Generation:
    """Returns the converter generation of a `neutron_converter_flavor`. None stands for the modern generation.

    A flavour is an MCUXpresso release ("SDK_25_06", packages `neutron_converter_SDK_25_06`) or the version of the
    newer `eiq-neutron-sdk` package ("3.1.1"). Raises `OptionError` for anything else.
    """
    if flavor is None:
        return Generation.MODERN
    if release := _SDK_RELEASE.fullmatch(flavor):
        legacy = tuple(map(int, release.groups())) <= _LAST_LEGACY_RELEASE
    elif package := _SDK_PACKAGE.fullmatch(flavor):
        legacy = tuple(map(int, package.groups())) < _FIRST_MODERN_PACKAGE
    else:
        numbers = re.fullmatch(r"\D*(\d\d)\D+(\d\d?)\D*", flavor)
        hint = f" Did you mean 'SDK_{numbers[1]}_{numbers[2]:0>2}'?" if numbers else ""
        raise OptionError(
            f"neutron_converter_flavor '{flavor}' is neither an SDK release such as 'SDK_25_06' nor a version of "
            f"eiq-neutron-sdk such as '3.1.3'.{hint} Leave it out for the modern generation."
        )
    return Generation.LEGACY if legacy else Generation.MODERN


def takes_weights_per_channel(flavor: str | None) -> bool:
    """Whether the converter of this flavour supports a weight scale for each output channel of a convolution.

    The SDK releases before SDK_25_09 do not; every version of `eiq-neutron-sdk` does.
    """
    release = _SDK_RELEASE.fullmatch(flavor or "")
    return release is None or tuple(map(int, release.groups())) >= _FIRST_RELEASE_WITH_WEIGHTS_PER_CHANNEL
