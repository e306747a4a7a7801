"""Limits of the NPU's convolutions, matrix products and pools, from the operator constraints that NXP publishes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from openneutron.targets import NeutronTarget

__all__ = ["MAX_DILATION", "MAX_KERNEL", "MAX_STRIDE", "MAX_WEIGHTS_OF_ONE_OUTPUT", "supports_kernel"]

MAX_KERNEL = 4096
"""The largest kernel of a convolution or pool along one dimension, in elements."""
MAX_STRIDE = 4096
"""The largest stride of a convolution or pool along one dimension, in elements."""
MAX_DILATION = 4096
"""The largest dilation of a convolution along one dimension, in elements."""
MAX_WEIGHTS_OF_ONE_OUTPUT = 65535
"""The largest number of products that the NPU accumulates for one output value."""


def supports_kernel(sizes: Sequence[int], channels: int, target: NeutronTarget) -> bool:
    """Whether the NPU supports a kernel of these sizes over height and width, with `channels` input channels.

    A depthwise kernel has one input channel.
    """
    products = math.prod(sizes) * target.align_channels(channels)
    return max(sizes) <= MAX_KERNEL and products <= MAX_WEIGHTS_OF_ONE_OUTPUT
