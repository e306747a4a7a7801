"""Training of a converted module: its weights, biases and ranges change, its operators and its codes' limits do not."""

__all__: list[str] = []
