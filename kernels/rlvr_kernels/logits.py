"""From the matmul's raw output to the logits a policy means: bias, scale, softcap, temperature, and their derivative.

    z = s / temperature,   s = softcap * tanh(u / softcap) (or s = u without a softcap),   u = logit_scale * (h W^T + b)

A tile in memory always holds the raw h W^T. Every kernel transforms what it loads, so that nothing is written twice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rlvr_kernels._triton import jit, tl

TWIN_BLOCK_BYTES = 8 << 20  # what a twin touches at a time: few enough calls, and still in cache


@dataclass(frozen=True)
class Head:
    """How the lm_head's output becomes logits, apart from the tensors: see the module's docstring.

    Raises:
        ValueError: softcap is not positive, logit_scale is zero, or one of them is not finite.
    """

    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be > 0 and finite, or None, got {self.softcap}")
        if not -math.inf < self.logit_scale < math.inf or self.logit_scale == 0:  # torch.compile traces no isfinite
            raise ValueError(f"logit_scale must be a finite number other than 0, got {self.logit_scale}")

    def kernel_arguments(self) -> dict[str, float | bool]:
        """The Triton kernels' arguments for this head."""
        cap = float(self.softcap or 1.0)
        return {"logit_scale": float(self.logit_scale), "softcap": cap, "HAS_SOFTCAP": self.softcap is not None}

    def logits(
        self, raw: torch.Tensor, bias: torch.Tensor | None, inv_temperature: torch.Tensor, *, overwrite: bool = False
    ) -> torch.Tensor:
        """Transform a block (n, c) of raw matmul output; bias (c,), inv_temperature (n,), whose dtype the result has.

        The result may be `raw` itself: transformed in place if `overwrite`, left alone and not to be written otherwise.
        """
        z = raw.to(inv_temperature.dtype)
        if bias is not None:
            z = torch.add(z, bias.to(z.dtype), out=z if overwrite or z is not raw else None)
        rate = inv_temperature * self.logit_scale
        if self.softcap is not None:
            z = torch.tanh(z * (self.logit_scale / self.softcap))
            rate = inv_temperature * self.softcap
        if bool((rate == 1).all()):
            return z
        return torch.mul(z, rate[:, None], out=z if overwrite or z is not raw else None)

    def chain_(self, gradient: torch.Tensor, z: torch.Tensor, inv_temperature: torch.Tensor) -> torch.Tensor:
        """Multiply dL/dz (n, c) by dz/d(h W^T) in place; z are the transformed logits."""
        rate = inv_temperature * self.logit_scale
        if not bool((rate == 1).all()):
            gradient.mul_(rate[:, None])
        if self.softcap is not None:
            gradient.mul_(1 - (z / (inv_temperature * self.softcap)[:, None]).square_())
        return gradient


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_blocks(rows: int, cols: int) -> Iterator[slice]:
    """Slices of rows whose float32 logits fit a core's cache: the unit in which the twins work."""
    step = max(1, TWIN_BLOCK_BYTES // (4 * max(cols, 1)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@jit
def load_logits(
    row_ptr,
    bias_ptr,
    cols,
    inside,
    logit_scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One block (BLOCK,) of a row's logits in float32; -inf where `inside` is false."""
    z = tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    z *= logit_scale
    if HAS_SOFTCAP:
        shrink = tl.exp(-2.0 * tl.abs(z) / softcap)  # tanh without overflow
        z = tl.where(z < 0, -softcap, softcap) * ((1.0 - shrink) / (1.0 + shrink))
    return tl.where(inside, z * inv_temperature, -float("inf"))


@jit
def chain(gradient, z, logit_scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """dL/d(h W^T) from dL/dz and the transformed z, both (BLOCK,)."""
    gradient *= logit_scale * inv_temperature
    if HAS_SOFTCAP:
        capped = z / (inv_temperature * softcap)
        gradient *= 1.0 - capped * capped
    return gradient
