"""Selects the operators that run on the NPU, groups them into partitions, and compiles the partitions."""

__all__: tuple[str, ...] = ()
