"""Which operators of a quantized graph run on the NPU, in how many pieces, and why the others do not."""

__all__: tuple[str, ...] = ()
