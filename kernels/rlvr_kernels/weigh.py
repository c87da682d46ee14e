"""weigh: from log-probabilities to the loss, its coefficient dL/dlogp and every rollout's statistics.

One program per rollout. It reads the rollout's rows once for the confidence shift (where the loss has one) and once for
everything else, in blocks, so that a rollout may have any length. Deterministic: no atomics.
Bytes: at most 24 per row. FLOPs: about 40 per row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from rlvr_kernels._triton import dense, device_guard, jit, tl
from rlvr_kernels.backend import use_triton
from rlvr_kernels.spec import PolicySpec
from rlvr_kernels.surrogate import (
    asymmetric_weight,
    asymmetric_weight_kernel,
    kernel_arguments,
    token_terms,
    token_terms_kernel,
)

BLOCK = 1024
NUM_WARPS = 4

STATISTICS = ("loss", "tokens", "wrong", "shift", "weight", "kl", "clipped_low", "clipped_high")
"""The columns of `Weighed.statistics`: sums over the rollout's active rows, except shift, weight and wrong, which is 1 if
any advantage is negative."""


class Weighed(NamedTuple):
    """losses (N,) and coef = dL/dlogp (N,), both with the aggregation's weight in them and 0 where masked; statistics (B, 8)."""

    losses: torch.Tensor
    coef: torch.Tensor
    statistics: torch.Tensor


def weigh(
    logp: torch.Tensor,
    old: torch.Tensor | None,
    ref: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    rollout_weight: torch.Tensor,
    spec: PolicySpec,
    backend: str = "auto",
) -> Weighed:
    """Weigh N packed rows of B rollouts; L = sum of `losses`.

    logp, old, ref, advantages are (N,) in one float dtype, mask (N,) bool; cu_seqlens (B + 1,) int64; rollout_weight
    (B,) is what the aggregation multiplies each of a rollout's tokens by.
    """
    if use_triton(logp, backend):
        return _weigh_triton(logp, old, ref, advantages, mask, cu_seqlens, rollout_weight, spec)
    rollouts = rollout_weight.shape[0]
    rollout = rollout_of_row(cu_seqlens, logp.shape[0])
    active = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask

    def per_rollout(values: torch.Tensor) -> torch.Tensor:
        kept = torch.where(active, values.to(logp.dtype), 0)
        return torch.zeros(rollouts, dtype=logp.dtype, device=logp.device).index_add_(0, rollout, kept)

    tokens = per_rollout(active)
    shift, weight = torch.zeros_like(tokens), torch.ones_like(tokens)
    if ref is not None:
        shift = _confidence_shift(logp, old, ref, spec, per_rollout, tokens)
        weight = asymmetric_weight(shift, spec) if spec.alpha > 0 else weight
    quiet = [
        None if x is None else torch.where(active, x, 0) for x in (logp, old, ref)
    ]  # so that exp sees no masked row
    terms = token_terms(quiet[0], quiet[1], quiet[2], torch.where(active, advantages, 0), weight[rollout], spec)  # type: ignore[arg-type]
    scale = torch.where(active, rollout_weight[rollout], 0)
    losses, coef = terms.loss * scale, terms.coef * scale
    wrong = (per_rollout(advantages < 0) > 0).to(logp.dtype)
    sums = [per_rollout(x) for x in (terms.kl, terms.clipped_low, terms.clipped_high)]
    return Weighed(losses, coef, torch.stack([per_rollout(losses), tokens, wrong, shift, weight, *sums], 1))


def rollout_of_row(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    """The rollout (N,) that each of N packed rows belongs to."""
    return torch.repeat_interleave(cu_seqlens.diff(), output_size=rows)


def _confidence_shift(
    logp: torch.Tensor,
    old: torch.Tensor | None,
    ref: torch.Tensor,
    spec: PolicySpec,
    per_rollout: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
) -> torch.Tensor:
    """c (B,): how much likelier the policy has made each rollout than the reference did."""
    confident = old if spec.confidence == "old" and old is not None else logp
    total = per_rollout(confident - ref)
    return total / tokens.clamp(min=1) if spec.confidence_reduction == "mean" else total


def _weigh_triton(
    logp: torch.Tensor, old: torch.Tensor | None, ref: torch.Tensor | None, advantages: torch.Tensor, mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor, rollout_weight: torch.Tensor, spec: PolicySpec,
) -> Weighed:  # fmt: skip
    rollouts = rollout_weight.shape[0]
    logp, old, ref, advantages, mask = dense(logp, old, ref, advantages, mask)  # type: ignore[assignment]
    cu_seqlens, rollout_weight = dense(cu_seqlens, rollout_weight)  # type: ignore[assignment]
    losses, coef = torch.zeros_like(logp), torch.zeros_like(logp)
    statistics = torch.empty(rollouts, len(STATISTICS), dtype=logp.dtype, device=logp.device)
    if rollouts:
        with device_guard(logp):
            weigh_kernel[(rollouts,)](
                logp, old, ref, advantages, mask, cu_seqlens, rollout_weight, losses, coef, statistics,
                HAS_OLD=old is not None, HAS_REF=ref is not None, HAS_MASK=mask is not None,
                ACE=spec.alpha > 0 and ref is not None, OLD_CONFIDENCE=spec.confidence == "old" and old is not None,
                MEAN=spec.confidence_reduction == "mean", BLOCK=BLOCK, num_warps=NUM_WARPS, **kernel_arguments(spec),
            )  # fmt: skip
    return Weighed(losses, coef, statistics)


@jit
def weigh_kernel(
    logp_ptr, old_ptr, ref_ptr, advantage_ptr, mask_ptr, cu_seqlens_ptr, rollout_weight_ptr, losses_ptr, coef_ptr, statistics_ptr,
    epsilon_low, epsilon_high, delta, beta, alpha,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_MASK: tl.constexpr, ACE: tl.constexpr, OLD_CONFIDENCE: tl.constexpr,
    MEAN: tl.constexpr, SHAPE: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program weighs one rollout: rows cu_seqlens[i] .. cu_seqlens[i + 1]."""
    rollout = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + rollout).to(tl.int64)
    last = tl.load(cu_seqlens_ptr + rollout + 1).to(tl.int64)
    scale = tl.load(rollout_weight_ptr + rollout)

    tokens = 0.0
    shift = 0.0
    weight = 1.0
    for start in range(first, last, BLOCK):
        rows, active = active_rows(start, last, mask_ptr, HAS_MASK, BLOCK)
        tokens += tl.sum(active.to(tl.float32), 0)
        if HAS_REF:
            ref = tl.load(ref_ptr + rows, mask=active, other=0.0)
            if OLD_CONFIDENCE:
                confident = tl.load(old_ptr + rows, mask=active, other=0.0)
            else:
                confident = tl.load(logp_ptr + rows, mask=active, other=0.0)
            shift += tl.sum(confident - ref, 0)
    if MEAN:
        shift = shift / tl.maximum(tokens, 1.0)
    if ACE:
        weight = asymmetric_weight_kernel(shift, alpha, SHAPE)

    loss_sum = 0.0
    kl_sum = 0.0
    low_sum = 0.0
    high_sum = 0.0
    wrong = 0.0
    for start in range(first, last, BLOCK):
        rows, active = active_rows(start, last, mask_ptr, HAS_MASK, BLOCK)
        logp = tl.load(logp_ptr + rows, mask=active, other=0.0)
        advantage = tl.load(advantage_ptr + rows, mask=active, other=0.0)
        old = logp
        ref = logp
        if HAS_OLD:
            old = tl.load(old_ptr + rows, mask=active, other=0.0)
        if HAS_REF:
            ref = tl.load(ref_ptr + rows, mask=active, other=0.0)
        loss, coef, kl, clipped_low, clipped_high = token_terms_kernel(
            logp, old, ref, advantage, weight, epsilon_low, epsilon_high, delta, beta, HAS_OLD, HAS_REF, KL
        )
        tl.store(losses_ptr + rows, loss * scale, mask=active)
        tl.store(coef_ptr + rows, coef * scale, mask=active)
        loss_sum += tl.sum(tl.where(active, loss * scale, 0.0), 0)
        kl_sum += tl.sum(tl.where(active, kl, 0.0), 0)
        low_sum += tl.sum((clipped_low & active).to(tl.float32), 0)
        high_sum += tl.sum((clipped_high & active).to(tl.float32), 0)
        wrong = tl.maximum(wrong, tl.max(tl.where(advantage < 0, 1.0, 0.0), 0))
    out = statistics_ptr + rollout * 8
    tl.store(out + 0, loss_sum)
    tl.store(out + 1, tokens)
    tl.store(out + 2, wrong)
    tl.store(out + 3, shift)
    tl.store(out + 4, weight)
    tl.store(out + 5, kl_sum)
    tl.store(out + 6, low_sum)
    tl.store(out + 7, high_sum)


@jit
def active_rows(start, last, mask_ptr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The rows start .. start + BLOCK and which of them are inside the rollout and unmasked, both (BLOCK,)."""
    rows = start + tl.arange(0, BLOCK).to(tl.int64)
    active = rows < last
    if HAS_MASK:
        active = active & (tl.load(mask_ptr + rows, mask=active, other=0) != 0)
    return rows, active
