"""Functions that all rooms use: files, torch.fx nodes, constants, typed errors, processes, progress bars."""

__all__: tuple[str, ...] = ()
