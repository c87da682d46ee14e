"""weigh: from log-probabilities to the loss, its coefficient dL/dlogp and every rollout's statistics.

One program per rollout. It reads the rollout's rows once for what the whole rollout says (tokens, confidence shift,
log ratio, drift), once for every token's loss, and a third time where the derivative by the rollout's ratio is spread
over its tokens: in blocks, so that a rollout may have any length. Deterministic: no atomics.
Bytes: at most 29 per row if its walks find a rollout in cache, 65 if not. FLOPs: about 40 per row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from rlvr_kernels._triton import dense, device_guard, jit, tl
from rlvr_kernels.backend import use_triton
from rlvr_kernels.spec import PolicySpec
from rlvr_kernels.surrogate import numbers
from rlvr_kernels.token_terms import (
    asymmetric_weight,
    asymmetric_weight_kernel,
    kernel_arguments,
    token_terms,
    token_terms_kernel,
)

BLOCK = 1024
NUM_WARPS = 8

STATISTICS = ("loss", "tokens", "wrong", "shift", "weight", "kl", "clipped_low", "clipped_high", "dropped")
"""The columns of `Weighed.statistics`: sums over the rollout's active rows, except shift and weight (ACE's), and wrong
and dropped, which are 1 if any advantage is negative and if the rollout is so far off policy that such ones are dropped."""


class Weighed(NamedTuple):
    """losses (N,) and coef = dL/dlogp (N,), both with the aggregation's weight in them and 0 where masked; statistics (B, 9)."""

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
    *,
    behaviour: torch.Tensor | None = None,
) -> Weighed:
    """Weigh N packed rows of B rollouts; L = sum of `losses`.

    logp, old, ref, advantages, behaviour are (N,) in one float dtype, mask (N,) bool; cu_seqlens (B + 1,) int64;
    rollout_weight (B,) is what the aggregation multiplies each of a rollout's tokens by. behaviour, for the off-policy
    mask, is what sampled: NaN where it is not known; None means old.
    """
    behaviour = old if behaviour is None else behaviour
    behaviour = None if spec.off_policy_mask_threshold is None else behaviour
    if use_triton(logp, backend):
        return _weigh_triton(logp, old, ref, behaviour, advantages, mask, cu_seqlens, rollout_weight, spec)
    rollout = rollout_of_row(cu_seqlens, logp.shape[0])
    active = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    # Masked rows are 0 from here on, so that no exp sees what stands in them.
    logp, advantages = torch.where(active, logp, 0), torch.where(active, advantages, 0)
    old, ref, behaviour = (None if x is None else torch.where(active, x, 0) for x in (old, ref, behaviour))

    def per_rollout(values: torch.Tensor) -> torch.Tensor:
        kept = torch.where(active, values.to(logp.dtype), 0)
        return torch.zeros_like(rollout_weight, dtype=logp.dtype).index_add_(0, rollout, kept)

    tokens = per_rollout(active)
    shift, weight = torch.zeros_like(tokens), torch.ones_like(tokens)
    if ref is not None:
        shift = _confidence_shift(logp, old, ref, spec, per_rollout, tokens)
        weight = asymmetric_weight(shift, spec) if spec.alpha > 0 else weight
    kept = _near_enough(logp, behaviour, spec, per_rollout, tokens)
    log_ratio = None if old is None else logp - old
    x, open_ = _what_the_surrogate_sees(log_ratio, advantages, spec, per_rollout, tokens, rollout)
    terms = token_terms(logp, log_ratio, x, ref, advantages, (weight * kept)[rollout], spec)
    slope = terms.slope
    if spec.spreads:
        slope = (per_rollout(slope) / tokens.clamp(min=1))[rollout]
        slope = slope if open_ is None else torch.where(open_, slope, 0)
    scale = torch.where(active, rollout_weight[rollout], 0)
    losses, coef = terms.loss * scale, (slope + terms.direct) * scale
    wrong = (per_rollout(advantages < 0) > 0).to(logp.dtype)
    low, high = (terms.clipped_low, terms.clipped_high) if open_ is None else _outside(log_ratio, advantages, spec)
    counts = (advantages > 0) | (advantages * kept[rollout] < 0)
    sums = [per_rollout(terms.kl), *(per_rollout(x & counts) for x in (low, high))]
    return Weighed(losses, coef, torch.stack([per_rollout(losses), tokens, wrong, shift, weight, *sums, 1 - kept], 1))


def rollout_of_row(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    """The rollout (N,) that each of N packed rows belongs to."""
    return torch.repeat_interleave(cu_seqlens.diff(), output_size=rows)


PerRollout = Callable[[torch.Tensor], torch.Tensor]


def _confidence_shift(
    logp: torch.Tensor, old: torch.Tensor | None, ref: torch.Tensor, spec: PolicySpec, per_rollout: PerRollout,
    tokens: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """c (B,): how much likelier the policy has made each rollout than the reference did."""
    confident = old if spec.confidence == "old" and old is not None else logp
    total = per_rollout(confident - ref)
    return total / tokens.clamp(min=1) if spec.confidence_reduction == "mean" else total


def _near_enough(
    logp: torch.Tensor, behaviour: torch.Tensor | None, spec: PolicySpec, per_rollout: PerRollout, tokens: torch.Tensor
) -> torch.Tensor:
    """1 (B,) where the mean of behaviour - logp is at most the threshold, else 0. Unknown tokens add nothing to it."""
    if behaviour is None or spec.off_policy_mask_threshold is None:
        return torch.ones_like(tokens)
    drift = per_rollout(torch.where(behaviour.isnan(), 0, behaviour - logp)) / tokens.clamp(min=1)
    return (drift <= spec.off_policy_mask_threshold).to(logp.dtype)


def _what_the_surrogate_sees(
    log_ratio: torch.Tensor | None, advantages: torch.Tensor, spec: PolicySpec, per_rollout: PerRollout,
    tokens: torch.Tensor, rollout: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """x (N,), and for gmpo the tokens whose log ratio is inside its bounds."""
    if log_ratio is None or spec.level == "token":
        return log_ratio, None
    if spec.level == "product":
        return per_rollout(log_ratio)[rollout], None
    inside = None
    if spec.level == "geometric":
        low, high = _outside(log_ratio, advantages, spec)
        inside = ~(low | high)
        log_ratio = log_ratio.clamp(*_bounds(advantages, spec))
    return (per_rollout(log_ratio) / tokens.clamp(min=1))[rollout], inside


def _outside(
    log_ratio: torch.Tensor | None, advantages: torch.Tensor, spec: PolicySpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a log ratio is below and above the bounds (N,) of gmpo."""
    assert log_ratio is not None
    a, b = _bounds(advantages, spec)
    return log_ratio < a, log_ratio > b


def _bounds(advantages: torch.Tensor, spec: PolicySpec) -> tuple[torch.Tensor, torch.Tensor]:
    """gmpo's bounds (N,) by the sign of each advantage; 0 and 0 without one, so that such a token adds nothing (verl's)."""
    a, b = numbers(spec.surrogate, advantages)
    return a.masked_fill(advantages == 0, 0), b.masked_fill(advantages == 0, 0)


def _weigh_triton(
    logp: torch.Tensor, old: torch.Tensor | None, ref: torch.Tensor | None, behaviour: torch.Tensor | None,
    advantages: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor, rollout_weight: torch.Tensor, spec: PolicySpec,
) -> Weighed:  # fmt: skip
    rollouts = rollout_weight.shape[0]
    logp, old, ref, behaviour, advantages, mask = dense(logp, old, ref, behaviour, advantages, mask)  # type: ignore[assignment]
    cu_seqlens, rollout_weight = dense(cu_seqlens, rollout_weight)  # type: ignore[assignment]
    losses, coef = torch.zeros_like(logp), torch.zeros_like(logp)
    statistics = torch.empty(rollouts, len(STATISTICS), dtype=logp.dtype, device=logp.device)
    if rollouts:
        with device_guard(logp):
            weigh_kernel[(rollouts,)](
                logp, old, ref, behaviour, advantages, mask, cu_seqlens, rollout_weight, losses, coef, statistics,
                threshold=float(spec.off_policy_mask_threshold or 0), LEVEL=spec.level, SPREADS=spec.spreads,
                HAS_OLD=old is not None, HAS_REF=ref is not None, HAS_MASK=mask is not None, DROPS=behaviour is not None,
                ACE=spec.alpha > 0 and ref is not None, OLD_CONFIDENCE=spec.confidence == "old" and old is not None,
                MEAN=spec.confidence_reduction == "mean", BLOCK=BLOCK, num_warps=NUM_WARPS, **kernel_arguments(spec),
            )  # fmt: skip
    return Weighed(losses, coef, statistics)


@jit
def weigh_kernel(
    logp_ptr, old_ptr, ref_ptr, behaviour_ptr, advantage_ptr, mask_ptr, cu_seqlens_ptr, rollout_weight_ptr, losses_ptr, coef_ptr,
    statistics_ptr, positive_a, positive_b, negative_a, negative_b, beta, alpha, threshold,
    FORM: tl.constexpr, LEVEL: tl.constexpr, SPREADS: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr, DROPS: tl.constexpr, ACE: tl.constexpr, OLD_CONFIDENCE: tl.constexpr, MEAN: tl.constexpr,
    SHAPE: tl.constexpr, KL: tl.constexpr, CORRECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program weighs one rollout: rows cu_seqlens[i] .. cu_seqlens[i + 1]."""
    rollout = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + rollout).to(tl.int64)
    last = tl.load(cu_seqlens_ptr + rollout + 1).to(tl.int64)
    scale = tl.load(rollout_weight_ptr + rollout)

    tokens = 0.0
    shift = 0.0
    drift = 0.0
    log_ratios = 0.0
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
        if DROPS:
            gap = tl.load(behaviour_ptr + rows, mask=active, other=0.0) - tl.load(
                logp_ptr + rows, mask=active, other=0.0
            )
            drift += tl.sum(tl.where(gap == gap, gap, 0.0), 0)  # NaN: unknown
        if HAS_OLD and LEVEL != "token":
            x = log_ratio_of(logp_ptr, old_ptr, rows, active)
            if LEVEL == "geometric":
                a, b = bounds(advantage_ptr, rows, active, positive_a, positive_b, negative_a, negative_b)
                x = tl.where(active, tl.minimum(tl.maximum(x, a), b), 0.0)
            log_ratios += tl.sum(x, 0)
    count = tl.maximum(tokens, 1.0)
    if MEAN:
        shift = shift / count
    ace = 1.0
    if ACE:
        ace = asymmetric_weight_kernel(shift, alpha, SHAPE)
    dropped = 0.0
    if DROPS:
        dropped = tl.where(drift / count > threshold, 1.0, 0.0)
    weight = ace * (1.0 - dropped)
    if LEVEL != "product":
        log_ratios = log_ratios / count

    loss_sum = 0.0
    kl_sum = 0.0
    low_sum = 0.0
    high_sum = 0.0
    slope_sum = 0.0
    wrong = 0.0
    for start in range(first, last, BLOCK):
        rows, active = active_rows(start, last, mask_ptr, HAS_MASK, BLOCK)
        logp = tl.load(logp_ptr + rows, mask=active, other=0.0)
        advantage = tl.load(advantage_ptr + rows, mask=active, other=0.0)
        log_ratio = tl.zeros_like(logp)
        ref = logp
        if HAS_OLD:
            log_ratio = logp - tl.load(old_ptr + rows, mask=active, other=0.0)
        if HAS_REF:
            ref = tl.load(ref_ptr + rows, mask=active, other=0.0)
        x = log_ratio
        if LEVEL != "token":
            x = tl.zeros_like(logp) + log_ratios
        loss, slope, direct, kl, low, high = token_terms_kernel(
            logp, log_ratio, x, ref, advantage, weight, positive_a, positive_b, negative_a, negative_b, beta,
            FORM, HAS_REF, KL, CORRECTED,
        )  # fmt: skip
        if LEVEL == "geometric":
            a, b = bounds(advantage_ptr, rows, active, positive_a, positive_b, negative_a, negative_b)
            low = log_ratio < a
            high = log_ratio > b
        if FORM != "clip":  # there a ratio is 1 without an advantage, and inside
            counts = (advantage > 0) | (advantage * weight < 0)
            low = low & counts
            high = high & counts
        if SPREADS:
            slope_sum += tl.sum(tl.where(active, slope, 0.0), 0)
            slope = tl.zeros_like(slope)
        tl.store(losses_ptr + rows, loss * scale, mask=active)
        tl.store(coef_ptr + rows, (slope + direct) * scale, mask=active)
        loss_sum += tl.sum(tl.where(active, loss * scale, 0.0), 0)
        kl_sum += tl.sum(tl.where(active, kl, 0.0), 0)
        low_sum += tl.sum((low & active).to(tl.float32), 0)
        high_sum += tl.sum((high & active).to(tl.float32), 0)
        wrong = tl.maximum(wrong, tl.max(tl.where(advantage < 0, 1.0, 0.0), 0))

    if SPREADS:
        tl.debug_barrier()  # what is added to below was written above
        slope = slope_sum / count * scale
        for start in range(first, last, BLOCK):
            rows, active = active_rows(start, last, mask_ptr, HAS_MASK, BLOCK)
            share = slope + tl.zeros([BLOCK], tl.float32)
            if LEVEL == "geometric" and HAS_OLD:
                a, b = bounds(advantage_ptr, rows, active, positive_a, positive_b, negative_a, negative_b)
                x = log_ratio_of(logp_ptr, old_ptr, rows, active)
                share = tl.where((x < a) | (x > b), 0.0, share)
            tl.store(coef_ptr + rows, tl.load(coef_ptr + rows, mask=active, other=0.0) + share, mask=active)

    out = statistics_ptr + rollout * 9
    tl.store(out + 0, loss_sum)
    tl.store(out + 1, tokens)
    tl.store(out + 2, wrong)
    tl.store(out + 3, shift)
    tl.store(out + 4, ace)
    tl.store(out + 5, kl_sum)
    tl.store(out + 6, low_sum)
    tl.store(out + 7, high_sum)
    tl.store(out + 8, dropped)


@jit
def active_rows(start, last, mask_ptr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The rows start .. start + BLOCK and which of them are inside the rollout and unmasked, both (BLOCK,)."""
    rows = start + tl.arange(0, BLOCK).to(tl.int64)
    active = rows < last
    if HAS_MASK:
        active = active & (tl.load(mask_ptr + rows, mask=active, other=0) != 0)
    return rows, active


@jit
def log_ratio_of(logp_ptr, old_ptr, rows, active):
    """logp - old of a block of rows, 0 where not active."""
    return tl.load(logp_ptr + rows, mask=active, other=0.0) - tl.load(old_ptr + rows, mask=active, other=0.0)


@jit
def bounds(advantage_ptr, rows, active, positive_a, positive_b, negative_a, negative_b):
    """The bounds (a, b) that go with the sign of each row's advantage; 0 and 0 without one."""
    advantage = tl.load(advantage_ptr + rows, mask=active, other=0.0)
    a = tl.where(advantage > 0, positive_a, tl.where(advantage < 0, negative_a, 0.0))
    return a, tl.where(advantage > 0, positive_b, tl.where(advantage < 0, negative_b, 0.0))
