"""NXP's converter: how it is found, called, checked and profiled."""

__all__: tuple[str, ...] = ()
