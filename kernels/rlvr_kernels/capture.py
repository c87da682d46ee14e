"""Whether a CUDA graph is being captured, when nothing may wait for the device.

Elsewhere rows that have no gradient are found by reading them and leave the batch before the products. A captured step
computes all of them instead, whatever their values are when it is replayed, and gives them the weight 0.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_warm_ups = 0  # of the whole process: backward runs in a thread of its own


@contextmanager
def cuda_graph_warmup() -> Iterator[None]:
    """Steps within it, forward and backward, are computed as in a capture, which then finds every kernel that it launches loaded.

    Outside of one, rows without a gradient leave the batch, which is another path through other variants of the kernels, and a
    kernel that is launched for the first time while a graph is captured ends the capture with an error. It holds for the whole
    process, and goes around a call of a compiled function, not into it.

    >>> with cuda_graph_warmup():  # one or two steps, and then torch.cuda.graph(...)
    ...     print(capturing())
    True
    """
    global _warm_ups
    with _lock:
        _warm_ups += 1
    try:
        yield
    finally:
        with _lock:
            _warm_ups -= 1


def capturing() -> bool:
    """True between the beginning and the end of a CUDA graph's capture on the current stream, and in a warm-up for one."""
    if torch.compiler.is_compiling():
        return False
    return _warm_ups > 0 or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
