"""Which implementation runs: the Triton kernels or their PyTorch twins. Decided in one place, and never silently."""

import torch

from rlvr_kernels._triton import HAS_TRITON, interpreting

BACKENDS = ("auto", "triton", "torch")


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
    obstacle = _obstacle(device, dtype)
    if backend == "triton":
        if obstacle:
            raise ValueError(f"backend='triton' cannot run here: {obstacle}. Use backend='auto' or 'torch'.")
        return "triton", "asked for"
    if device.type == "cpu":
        return "torch", "CPU tensors take the PyTorch twins"
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
    return explain_backend(tensor.device, backend, tensor.dtype)[0] == "triton"
