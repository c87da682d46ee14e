"""lse_fold: fold a tile of logits into each row's running log-sum-exp, target logit and optional sums.

A tile (n, c) holds columns first_col .. first_col + c of n rows' logits. Folding all tiles of the vocabulary, in any order,
gives the statistics of whole rows. One program per row loops over its columns.
Bytes: n * c * itemsize read, 20 n read and written. FLOPs: about 4 n c, so memory-bound.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from rlvr_kernels._triton import device_guard, jit, tl
from rlvr_kernels.backend import use_triton
from rlvr_kernels.logits import LogitMap, accumulator_dtype, load_logits, row_blocks

BLOCK = 4096
NUM_WARPS = 8


@dataclass
class RowState:
    """The running statistics of each row, all (n,): maximum m, total = sum of exp(z - m), and the target's logit.

    Optional: weighted = sum of exp(z - m) (z - m), for the entropy; summed = sum of z, for the mean logit; squared = sum of
    exp(2 (z - m)), for the sum of squared probabilities.
    """

    maximum: torch.Tensor
    total: torch.Tensor
    target: torch.Tensor
    weighted: torch.Tensor | None = None
    summed: torch.Tensor | None = None
    squared: torch.Tensor | None = None

    @staticmethod
    def empty(
        rows: int, like: torch.Tensor, *, entropy: bool = False, mean: bool = False, squares: bool = False
    ) -> "RowState":
        """The state of `rows` rows before the first tile."""
        dtype, device = accumulator_dtype(like.dtype), like.device

        def filled(value: float) -> torch.Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        sums = (filled(0) if wanted else None for wanted in (entropy, mean, squares))
        return RowState(filled(-float("inf")), filled(0), filled(-float("inf")), *sums)

    def __getitem__(self, rows: slice) -> "RowState":
        parts = (self.maximum, self.total, self.target, self.weighted, self.summed, self.squared)
        return RowState(*(None if part is None else part[rows] for part in parts))  # type: ignore[arg-type]

    def lse(self) -> torch.Tensor:
        """log sum_j exp z_j."""
        return self.maximum + self.total.log()

    def logp(self) -> torch.Tensor:
        """The target's log-probability. In this order of operations a one-hot row gives exactly 0."""
        return (self.target - self.maximum) - self.total.log()

    def entropy(self) -> torch.Tensor | None:
        """H = -sum_j p_j log p_j in nats."""
        return None if self.weighted is None else self.total.log() - self.weighted / self.total

    def sum_p_squared(self) -> torch.Tensor | None:
        """sum_j p_j^2, the probability that two independent samples agree."""
        return None if self.squared is None else self.squared / self.total.square()

    def top1(self) -> torch.Tensor:
        """Whether no token is likelier than the target."""
        return self.target == self.maximum


class Scores(NamedTuple):
    """All (n,), float32 (float64 for float64): logp, lse, and the statistics asked for."""

    logp: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logit: torch.Tensor | None = None
    top1: torch.Tensor | None = None
    sum_p_squared: torch.Tensor | None = None

    def part(self, rows: slice) -> "Scores":
        """The scores of some of the rows."""
        return Scores(*(None if one is None else one[rows] for one in self))  # type: ignore[arg-type]


def state_of(scores: Scores, vocabulary: int) -> RowState:
    """A state that has these scores, for a shard to combine with those of others."""
    weighted = None if scores.entropy is None else -scores.entropy
    summed = None if scores.mean_logit is None else scores.mean_logit * vocabulary
    target = scores.logp + scores.lse
    return RowState(scores.lse, torch.ones_like(target), target, weighted, summed, scores.sum_p_squared)


def lse_fold(
    tile: torch.Tensor,
    ids: torch.Tensor,
    first_col: int,
    state: RowState,
    logit_map: LogitMap,
    backend: str = "auto",
) -> None:
    """Fold tile (n, c) of raw h W^T into `state`, in place.

    ids (n,) index the whole vocabulary; logit_map covers the tile's rows and columns. The optional sums are folded if
    `state` holds them.
    """
    if use_triton(tile, backend):
        _lse_fold_triton(tile, ids, first_col, state, logit_map)
        return
    for rows in row_blocks(*tile.shape):
        _fold_block(tile[rows], ids[rows] - first_col, state[rows], logit_map[rows, :])


def _fold_block(raw: torch.Tensor, local_ids: torch.Tensor, state: RowState, logit_map: LogitMap) -> None:
    """Fold raw h W^T (r, c), which stay as they are."""
    z = logit_map.logits(raw)
    held = (local_ids >= 0) & (local_ids < z.shape[1])
    picked = z.gather(1, local_ids.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    state.target.copy_(torch.where(held, picked, state.target))
    if state.summed is not None:
        state.summed += z.sum(1)
    maximum = torch.maximum(state.maximum, z.amax(1))
    anchor = torch.where(maximum.isinf(), 0, maximum)  # every logit so far may be -inf
    moved = torch.where(state.total > 0, state.maximum - anchor, 0)
    below = torch.sub(z, anchor[:, None], out=None if z is raw else z)
    if state.squared is not None:
        state.squared.mul_((2 * moved).exp()).add_((2 * below).exp_().sum(1))
    mass = below.exp() if state.weighted is not None else below.exp_()
    if state.weighted is not None:
        inner = below.clamp_(min=-1e30).mul_(mass).sum(1)  # the clamp makes 0 * -inf 0
        state.weighted.add_(state.total * moved).mul_(moved.exp()).add_(inner)
    state.total.mul_(moved.exp()).add_(mass.sum(1))
    state.maximum.copy_(maximum)


def _lse_fold_triton(
    tile: torch.Tensor, ids: torch.Tensor, first_col: int, state: RowState, logit_map: LogitMap
) -> None:
    rows, cols = tile.shape
    if not rows:
        return
    with device_guard(tile):
        lse_fold_kernel[(rows,)](
            tile_ptr=tile, ids_ptr=ids.contiguous(), maximum_ptr=state.maximum, total_ptr=state.total,
            target_ptr=state.target, weighted_ptr=state.weighted, summed_ptr=state.summed, squared_ptr=state.squared,
            n_cols=cols, first_col=first_col, row_stride=tile.stride(0), ENTROPY=state.weighted is not None,
            MEAN=state.summed is not None, SQUARES=state.squared is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
            **logit_map.kernel_arguments(),
        )  # fmt: skip


@jit
def lse_fold_kernel(
    tile_ptr, bias_ptr, ids_ptr, inv_temperature_ptr, maximum_ptr, total_ptr, target_ptr, weighted_ptr, summed_ptr,
    squared_ptr, n_cols, first_col, row_stride, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, MEAN: tl.constexpr, SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program folds one row of the tile."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * row_stride
    inv_temperature = tl.load(inv_temperature_ptr + row)
    local_id = tl.load(ids_ptr + row) - first_col
    maximum = tl.load(maximum_ptr + row)
    total = tl.load(total_ptr + row)
    target = tl.load(target_ptr + row)
    weighted = 0.0
    summed = 0.0
    squared = 0.0
    if ENTROPY:
        weighted = tl.load(weighted_ptr + row)
    if MEAN:
        summed = tl.load(summed_ptr + row)
    if SQUARES:
        squared = tl.load(squared_ptr + row)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < n_cols
        z = load_logits(row_ptr, bias_ptr, cols, inside, logit_scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
        target = tl.maximum(target, tl.max(tl.where(inside & (cols == local_id), z, -float("inf")), 0))
        if MEAN:
            summed += tl.sum(tl.where(inside, z, 0.0), 0)
        peak = tl.maximum(maximum, tl.max(z, 0))
        anchor = tl.where(peak == -float("inf"), 0.0, peak)  # every logit so far may be -inf
        moved = tl.where(total > 0, maximum - anchor, 0.0)
        mass = tl.exp(z - anchor)
        if ENTROPY:
            inner = tl.sum(tl.where(mass > 0, mass * (z - anchor), 0.0), 0)
            weighted = (weighted + total * moved) * tl.exp(moved) + inner
        if SQUARES:
            squared = squared * tl.exp(2.0 * moved) + tl.sum(mass * mass, 0)
        total = total * tl.exp(moved) + tl.sum(mass, 0)
        maximum = peak
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)
    tl.store(target_ptr + row, target)
    if ENTROPY:
        tl.store(weighted_ptr + row, weighted)
    if MEAN:
        tl.store(summed_ptr + row, summed)
    if SQUARES:
        tl.store(squared_ptr + row, squared)
