"""The CPU kernels of ExecuTorch's runtime. Checks which operators they support."""

__all__: tuple[str, ...] = ()
