"""scale_: multiply a tensor in place by a one-element tensor; the kernel, and the twin on a CPU, skip a factor of 1.

A single pass computes its gradients before it knows the upstream gradient, which is 1 unless the trainer scales its loss.
Multiplying d_weight by 1 took 1 % of a step on a CPU (docs/performance-log.md).
"""

import torch

from rlvr_kernels._triton import device_guard, jit, tl, triton
from rlvr_kernels.backend import use_triton

BLOCK = 8192
NUM_WARPS = 8
TWIN_ELEMENTS = 4 << 20  # elements per step of the twin, which makes a wider copy of them


def scale_(values: torch.Tensor, factor: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Multiply contiguous `values` by `factor` (1,), float32 or float64, in place and return them."""
    if use_triton(values, backend):
        if values.numel():
            with device_guard(values):
                scale_kernel[(triton.cdiv(values.numel(), BLOCK),)](
                    values, factor.float(), values.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
                )
        return values
    if factor.device.type == "cpu" and factor == 1:
        return values
    for piece in values.view(-1).split(TWIN_ELEMENTS):
        piece.mul_(factor)
    return values


@jit
def scale_kernel(values_ptr, factor_ptr, n_values, BLOCK: tl.constexpr):
    """One program multiplies BLOCK values."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + at, mask=at < n_values, other=0.0).to(tl.float32)
        tl.store(values_ptr + at, (values * factor).to(values_ptr.dtype.element_ty), mask=at < n_values)
