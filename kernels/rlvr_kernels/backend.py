"""How operations run here: on Triton kernels or their PyTorch twins, and whether a CUDA graph is being captured.

While one is, nothing may wait for the device. Elsewhere rows without a gradient are found by reading them, and leave the
batch before the products. A captured step computes all of them, whatever they hold when it is replayed, and weighs them 0.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlvr_kernels._triton import HAS_TRITON, interpreting

BACKENDS = ("auto", "triton", "torch")
_lock = threading.Lock()
_warm_ups = 0  # of the whole process: backward runs in a thread of its own


def explain_backend(
    device: torch.device | str, backend: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """Name the backend that `backend` means for tensors on `device`, and the reason.

    Returns:
        (choice, reason), choice one of "triton" and "torch".

    Raises:
        ValueError: `backend` is unknown, or "triton" was asked for where it cannot run. An explicit choice never falls
            back.
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
    """Say why the Triton kernels cannot take tensors of this device and dtype, or nothing."""
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32 and the tensors are float64"
    if device.type == "cpu" and not interpreting():
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
    return ""


def use_triton(tensor: torch.Tensor, backend: str) -> bool:
    """True if `backend` means Triton for this tensor; see `explain_backend`."""
    if backend == "auto" and tensor.device.type == "cpu":
        return False
    return explain_backend(tensor.device, backend, tensor.dtype)[0] == "triton"


@contextmanager
def cuda_graph_warmup() -> Iterator[None]:
    """Compute the steps inside as a capture would, forward and backward, so that it finds every kernel loaded.

    A kernel that is launched for the first time in a capture ends it with an error, and outside of one other variants run:
    rows without a gradient leave the batch. Holds for the whole process. Put it around a compiled function, not inside.

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
    """Whether the current stream is being captured in a CUDA graph, or warms up for it."""
    if torch.compiler.is_compiling():
        return False
    return _warm_ups > 0 or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
