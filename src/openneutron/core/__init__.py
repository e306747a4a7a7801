"""What every room uses: files, questions about torch.fx nodes, constants, typed errors of torch, processes."""

__all__: tuple[str, ...] = ()
