"""LogitMap: from raw products h W^T to logits, through bias, scale, softcap and temperature, and back through its derivative.

    z = s / temperature,   s = softcap * tanh(u / softcap) (s = u without a softcap),   u = logit_scale * (h W^T + b)

A tile in memory always holds the raw h W^T. Kernels map it to logits as they load it, so nothing is written twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rlvr_kernels._triton import dense, jit, tl

TWIN_BLOCK_BYTES = 8 << 20  # a block of a twin: large enough for few calls, small enough for the cache


@dataclass(frozen=True, eq=False)
class LogitMap:
    """The map from h W^T (n, c) to logits: inv_temperature (n,), bias (c,), and two numbers.

    `logit_map[rows, columns]` is the map of that part of the tile.
    """

    inv_temperature: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __getitem__(self, part: tuple[slice | torch.Tensor, slice]) -> "LogitMap":
        rows, columns = part
        bias = None if self.bias is None else self.bias[columns]
        return LogitMap(self.inv_temperature[rows], bias, self.logit_scale, self.softcap)

    def take(self, rows: torch.Tensor | None) -> "LogitMap":
        """The map of some of the rows; None means all."""
        return self if rows is None else self[rows, slice(None)]

    def kernel_arguments(self) -> dict[str, torch.Tensor | float | bool | None]:
        """The Triton kernels' arguments."""
        inv_temperature, bias = dense(self.inv_temperature, self.bias)
        return {
            "inv_temperature_ptr": inv_temperature,
            "bias_ptr": bias,
            "HAS_BIAS": bias is not None,
            **self.kernel_numbers(),
        }

    def kernel_numbers(self) -> dict[str, float | bool]:
        """The Triton kernels' arguments other than tensors."""
        cap = float(self.softcap or 1.0)
        return {"logit_scale": float(self.logit_scale), "softcap": cap, "HAS_SOFTCAP": self.softcap is not None}

    def logits(self, raw: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
        """Map a block (n, c) of raw products to logits, in the dtype of inv_temperature.

        With `overwrite` the result is there to be written over: `raw` itself, or a copy if its dtype is narrower. Without it
        `raw` keeps its values, but the result may be `raw` itself: do not write to it.
        """
        z = raw.to(self.inv_temperature.dtype)
        if self.bias is not None:
            z = torch.add(z, self.bias.to(z.dtype), out=z if overwrite or z is not raw else None)
        rate = self.inv_temperature * self.logit_scale
        if self.softcap is not None:
            z = torch.tanh(z * (self.logit_scale / self.softcap))
            rate = self.inv_temperature * self.softcap
        if bool((rate == 1).all()):
            return z
        return torch.mul(z, rate[:, None], out=z if overwrite or z is not raw else None)

    def chain_(self, gradient: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Multiply dL/dz (n, c) by dz/d(h W^T) in place; z are the logits."""
        rate = self.inv_temperature * self.logit_scale
        if not bool((rate == 1).all()):
            gradient.mul_(rate[:, None])
        if self.softcap is not None:
            gradient.mul_(self.softcap_slope(z))
        return gradient

    def softcap_slope(self, z: torch.Tensor) -> torch.Tensor:
        """The derivative (n, c) of the softcap where the logits are z (n, c)."""
        return 1 - (z / (self.inv_temperature * self.softcap)[:, None]).square_()  # type: ignore[operator]


def subtract_at(tile: torch.Tensor, local_ids: torch.Tensor, values: torch.Tensor) -> None:
    """Subtract values (n,) from the targets' entries of a tile (n, c), which may be narrower than they are."""
    inside = local_ids.clamp(0, tile.shape[1] - 1)[:, None]
    there = tile.gather(1, inside)
    less = (there.to(values.dtype) - values[:, None]).to(tile.dtype)
    tile.scatter_(1, inside, less.where(inside == local_ids[:, None], there))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype to add up many values in: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def row_blocks(rows: int, cols: int) -> Iterator[slice]:
    """Yield slices of rows whose float32 logits fit a core's cache. The twins work on one slice at a time."""
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
def logit_of(z, inv_temperature, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """A logit from h W^T + b."""
    z *= logit_scale
    if HAS_SOFTCAP:
        z = softcap - 2.0 * softcap / (1.0 + tl.exp(2.0 * z / softcap))
    return z * inv_temperature


@jit
def log2_logits(
    z, cols, bias_ptr, bias_stride, inv_temperature, n_cols, logit_scale, softcap, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A tile (n, c) of raw products as logits in log2 units, and the derivative of the softcap at each (1 without one)."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols.to(tl.int64) * bias_stride, mask=cols < n_cols, other=0.0)
        z += bias.to(tl.float32)[None, :]
    log2_e = 1.4426950408889634  # exp(z) = exp2(z * log2_e), and the temperature needs a multiplication anyway
    slope = 1.0
    if HAS_SOFTCAP:
        z = softcap - 2.0 * softcap / (1.0 + tl.exp2(z * (2.0 * log2_e * logit_scale / softcap)))  # tanh; inf: softcap
        capped = z / softcap
        slope = 1.0 - capped * capped
        z *= (inv_temperature * log2_e)[:, None]
    else:
        z *= (inv_temperature * (log2_e * logit_scale))[:, None]
    return z, slope


@jit
def chain(gradient, z, logit_scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """dL/d(h W^T) from dL/dz and the logits z, both (BLOCK,)."""
    gradient *= logit_scale * inv_temperature
    if HAS_SOFTCAP:
        capped = z / (inv_temperature * softcap)
        gradient *= 1.0 - capped * capped
    return gradient
