"""Whether a CUDA graph is being captured, when nothing may wait for the device.

Elsewhere rows that have no gradient are found by reading them and leave the batch before the products. A captured step
computes all of them instead, whatever their values are when it is replayed, and gives them the weight 0.
"""

import torch


def capturing() -> bool:
    """True between the beginning and the end of a CUDA graph's capture on the current stream."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()
