"""The generations of the vendor's converter."""

from __future__ import annotations

import enum
import re

from openneutron.errors import OptionError

__all__ = ["Generation", "generation_of_flavor", "takes_weights_per_channel"]


class Generation(enum.Enum):
    """Generation of the vendor's converter. The modern generation has fewer operator limits than the legacy one."""

    LEGACY = "legacy"
    MODERN = "modern"


_SDK_RELEASE = re.compile(r"SDK_(\d\d)_(\d\d)")
_SDK_PACKAGE = re.compile(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})")
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
