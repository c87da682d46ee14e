"""`pytest --benchmark`: the losses against eager PyTorch and other libraries, with the numbers kept as JSON."""
