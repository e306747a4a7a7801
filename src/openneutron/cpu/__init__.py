"""The CPU kernels of ExecuTorch's runtime, and whether one of them takes an operator."""

__all__: tuple[str, ...] = ()
