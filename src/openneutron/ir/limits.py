"""Limits of the NPU's convolutions, matrix products and pools, from the operator constraints that NXP publishes."""

from __future__ import annotations

__all__ = ["MAX_DILATION", "MAX_KERNEL", "MAX_STRIDE", "MAX_WEIGHTS_OF_ONE_OUTPUT"]

MAX_KERNEL = 4096
"""The largest kernel of a convolution or pool along one dimension, in elements."""
MAX_STRIDE = 4096
"""The largest stride of a convolution or pool along one dimension, in elements."""
MAX_DILATION = 4096
"""The largest dilation of a convolution along one dimension, in elements."""
MAX_WEIGHTS_OF_ONE_OUTPUT = 65535
"""The largest number of products that the NPU accumulates for one output value."""
