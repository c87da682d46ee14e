"""Choose between the Triton kernels and their PyTorch twins, and tell whether a CUDA graph is being captured.

Nothing may wait for the device during a capture. An ordinary step reads which rows have no gradient, and leaves them out of
the matrix products. A captured step cannot know which rows those will be on replay, so it computes all of them and gives
those without a gradient coefficient 0.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlvr_kernels._triton import HAS_TRITON, interpreting

BACKENDS = ("auto", "triton", "torch")
_lock = threading.Lock()
_warm_ups = 0  # process-wide, because backward runs in another thread


def explain_backend(
    device: torch.device | str, backend: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """Say which backend `backend` selects for tensors of `dtype` on `device`, and why.

    Returns:
        (choice, reason), where choice is "triton" or "torch".

    Raises:
        ValueError: `backend` is unknown, or is "triton" where Triton cannot run. An explicit choice never falls back.
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "torch":
        return "torch", "asked for"
    if backend == "auto" and device.type == "cpu":
        return "torch", "CPU tensors take the PyTorch twins"
    obstacle = _obstacle(device, dtype)
    if backend == "triton":
        if obstacle:
            raise ValueError(f"backend='triton' cannot run here: {obstacle}. Use backend='auto' or 'torch'.")
        return "triton", "asked for"
    if obstacle:
        return "torch", obstacle
    return "triton", f"{device.type} tensors take the Triton kernels"


def _obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Say why the Triton kernels cannot take tensors of this device and dtype; "" if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32 and the tensors are float64"
    if device.type == "cpu" and not interpreting():
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
    return ""


def use_triton(tensor: torch.Tensor, backend: str) -> bool:
    """Whether `backend` selects Triton for this tensor; see `explain_backend`."""
    if backend == "auto" and tensor.device.type == "cpu":
        return False
    return explain_backend(tensor.device, backend, tensor.dtype)[0] == "triton"


@contextmanager
def cuda_graph_warmup() -> Iterator[None]:
    """Run the steps inside as a capture would, forward and backward, so that every kernel is loaded before the capture.

    A kernel's first launch during a capture is an error. Ordinary steps do not load the same kernels, because they leave
    out rows without a gradient. The effect is process-wide. Put it around a compiled function, not inside.

    >>> with cuda_graph_warmup():  # one or two steps, then torch.cuda.graph(...)
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
    """Whether a CUDA graph is being captured on the current stream, or `cuda_graph_warmup` is active."""
    if torch.compiler.is_compiling():
        return False
    return _warm_ups > 0 or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
