"""Triton where it is installed; otherwise stand-ins, so that the kernel files can still be imported."""

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch twins need torch alone
    triton = None
    tl = None

HAS_TRITON = triton is not None


class _AbsentLanguage:
    """Stands in for `triton.language` in the annotations of kernels that cannot be launched."""

    constexpr = int


def _absent_jit(fn: Any) -> Any:
    return fn


if HAS_TRITON:
    jit = triton.jit
else:
    tl = _AbsentLanguage()
    jit = _absent_jit


def interpreting() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, which runs its kernels on CPU tensors."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


def device_guard(tensor: torch.Tensor) -> Any:
    """Make the tensor's accelerator current: Triton launches on the current device, wherever its arguments are."""
    return torch.accelerator.device_index(tensor.device.index if tensor.device.type != "cpu" else None)


def dense(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Make each tensor contiguous: the kernels address their small vectors by index alone."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


@jit
def expm1(x):
    """exp(x) - 1 without cancellation: a fifth-order series where |x| < 0.05, whose relative error there is below 1e-9."""
    series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * 0.0083333333))))
    return tl.where(tl.abs(x) < 0.05, series, tl.exp(x) - 1.0)


@jit
def log1p(x):
    """log(1 + x) of x >= 0 without cancellation: a series in x / (2 + x) where x < 0.5, whose relative error is below 1e-7."""
    s = x / (2.0 + x)
    q = s * s
    series = 2.0 * s * (1.0 + q * (0.33333334 + q * (0.2 + q * (0.14285715 + q * 0.11111111))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))
