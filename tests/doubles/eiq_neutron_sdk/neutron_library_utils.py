"""The targets in the form of the vendor's package."""

from dataclasses import dataclass

NAMES = ("imxrt700", "imx95", "mcxn94x")


@dataclass
class Target:
    name: str
    subsystem: bool = False
    numUnits: int = 1
    numPipes: int = 8
    numMacs: int = 8
    hwVersion: int = 2


def isNeutronTarget(name: str) -> bool:  # noqa: N802
    return name in NAMES


def getNeutronTargets() -> list[Target]:  # noqa: N802
    return [Target(name) for name in NAMES]
