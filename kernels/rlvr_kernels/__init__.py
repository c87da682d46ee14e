"""The kernels of rlvr_ops: one operation per file, its Triton kernel beside its PyTorch twin. They know tensors only."""
