"""weigh: from log-probabilities to the loss, its coefficient dL/dlogp, and each rollout's sums.

One program per rollout walks over its rows in blocks, so a rollout may have any length. The first walk reduces the rollout
(tokens, confidence shift, log ratio, drift). The second computes each token's loss. A third spreads the derivative by the
rollout's ratio over its tokens, where there is one. Deterministic, no atomics.
Bytes: at most 29 per row if later walks find the rollout in cache, 65 if not. FLOPs: about 40 per row.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from rlvr_kernels._triton import dense, device_guard, jit, tl
from rlvr_kernels.backend import use_triton
from rlvr_kernels.logits import sum_dtype
from rlvr_kernels.objective import TokenObjective, divergence_kernel, weight_kernel
from rlvr_kernels.surrogates import surrogate_kernel

BLOCK = 1024
NUM_WARPS = 8

SUMS = ("loss", "tokens", "wrong", "shift", "kl", "clipped_low", "clipped_high", "dropped")
"""The columns of `Weighed.sums`, over a rollout's active rows: the aggregated loss, 1, A < 0, logp - ref, the KL estimate,
ratio below its bounds, ratio above them, and dropped as too far off policy. The sums of a rollout's parts add up."""


@dataclass(frozen=True, eq=False)
class Rows:
    """n tokens of B rollouts: advantages (n,), cu_seqlens (B + 1,), the aggregation's weights (B,), log-probabilities (n,).

    old=None means on policy. sampling is NaN where the engine gave none. mask (n,): which tokens count, None means all.
    """

    advantages: torch.Tensor
    cu_seqlens: torch.Tensor
    weights: torch.Tensor
    old: torch.Tensor | None = None
    ref: torch.Tensor | None = None
    sampling: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.advantages.shape[0]

    def rollout(self) -> torch.Tensor:
        """The rollout (n,) of each row."""
        return torch.repeat_interleave(self.cu_seqlens.diff(), output_size=self.advantages.shape[0])

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums (B, ...) of values (n, ...) over the rows that count."""
        if self.mask is not None:
            values = values.masked_fill(~self.mask.view(-1, *[1] * (values.ndim - 1)), 0)
        return rollout_sums(values, self.cu_seqlens)

    def hiding(self, logp: torch.Tensor) -> "tuple[torch.Tensor, Rows]":
        """Set logp (n,) and the rows to 0 where masked, so that no exp reads padding."""
        if self.mask is None:
            return logp, self
        mask = self.mask
        return torch.where(mask, logp, 0), self._map(lambda x: x if x.dtype == torch.bool else torch.where(mask, x, 0))

    def row_weights(self) -> torch.Tensor:
        """The aggregation's weight (n,) of each row, 0 where masked."""
        weights = self.weights[self.rollout()]
        return weights if self.mask is None else weights.masked_fill(~self.mask, 0)

    def take(self, index: torch.Tensor | None) -> "Rows":
        """Select the rows `index` (k,), ascending, and shift the boundaries; None means all."""
        if index is None:
            return self
        bounds = torch.searchsorted(index, self.cu_seqlens)
        return self._map(lambda values: values[index], cu_seqlens=bounds)

    def __getitem__(self, part: slice) -> "Rows":
        """A slice of the rows. It keeps all B rollouts, of which some may be cut or empty."""
        if part.stop - part.start == len(self):
            return self
        bounds = self.cu_seqlens.clamp(part.start, part.stop) - part.start
        return self._map(lambda values: values[part], cu_seqlens=bounds)

    def _map(self, function, **changes):
        values = {name: getattr(self, name) for name in ("advantages", "old", "ref", "sampling", "mask")}
        return replace(self, **{n: None if x is None else function(x) for n, x in values.items()}, **changes)


def rollout_sums(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sum values (n, ...) over each rollout, (B, ...), in float64 where the device has it. Differentiable.

    A running sum in float32 is off by 4e-3 after a million tokens.
    """
    return torch.segment_reduce(values.to(sum_dtype(values.device)), "sum", offsets=cu_seqlens, axis=0).to(values.dtype)


class Weighed(NamedTuple):
    """losses (n,) and coef = dL/dlogp (n,), aggregated and 0 where masked; sums (B, 8) by rollout, see `SUMS`."""

    losses: torch.Tensor
    coef: torch.Tensor
    sums: torch.Tensor


def weigh(logp: torch.Tensor, rows: Rows, objective: TokenObjective, backend: str = "auto") -> Weighed:
    """Weigh log-probabilities (n,) of rows; the loss is the sum of `losses`.

    ACE's weight is applied here if it depends on `logp`. With confidence="old" it does not, and the advantages already
    include it.
    """
    return (_weigh_triton if use_triton(logp, backend) else _weigh_torch)(logp, rows, objective)


def _weigh_torch(logp: torch.Tensor, rows: Rows, objective: TokenObjective) -> Weighed:
    active, rollout = torch.ones_like(logp) if rows.mask is None else rows.mask.to(logp.dtype), rows.rollout()
    logp, rows = rows.hiding(logp)
    advantages, old, ref = rows.advantages, rows.old, rows.ref
    believed = old if old is not None and objective.ace.confidence == "old" else logp
    gap = torch.zeros_like(logp) if ref is None else believed - ref
    tokens, shift = rows.sums(torch.stack([active, gap], 1)).unbind(1)
    kept = _near_enough(logp, rows, objective, tokens)
    weight = kept
    if ref is not None and objective.weighs_current(old is not None):
        weight = kept * objective.ace.weight(objective.ace.shift(shift, tokens))
    weighted = torch.where(advantages < 0, advantages * weight[rollout], advantages)
    terms, coef, outside = _token_terms(logp, old, weighted, advantages, rows, objective, tokens, rollout)
    losses, kl = terms.loss, torch.zeros_like(logp)
    anchor = ref if objective.kl.against == "reference" else logp if old is None else old
    if anchor is not None:
        kl, by_kl = objective.kl.terms(logp, old, anchor)
        if objective.kl.beta > 0:
            losses, coef = losses + objective.kl.beta * kl, coef + objective.kl.beta * by_kl
    scale = rows.weights[rollout] if rows.mask is None else rows.row_weights()
    losses, coef = losses * scale, coef * scale
    if rows.mask is not None:  # a rollout that is NaN must not reach masked rows
        losses, coef = losses.masked_fill(~rows.mask, 0), coef.masked_fill(~rows.mask, 0)
    counts = (advantages > 0) | (weighted < 0)
    columns = (losses, active, advantages < 0, gap, kl, outside[0] & counts, outside[1] & counts, 1 - kept[rollout])
    table = logp.new_empty(len(rows), len(SUMS), dtype=sum_dtype(logp.device))
    for i, column in enumerate(columns):
        table[:, i] = column
    return Weighed(losses, coef, rows.sums(table).to(logp.dtype))


def _near_enough(logp, rows, objective, tokens):
    """1 (B,) where the mean of sampling (or old) - logp is at most the threshold, else 0. NaN tokens add nothing."""
    behaviour = rows.old if rows.sampling is None else rows.sampling
    if behaviour is None or objective.off_policy_mask_threshold is None:
        return torch.ones_like(tokens)
    drift = rows.sums(torch.where(behaviour.isnan(), 0, behaviour - logp)) / tokens.clamp(min=1)
    return (~(drift > objective.off_policy_mask_threshold)).to(logp.dtype)


def _token_terms(logp, old, weighted, advantages, rows, objective, tokens, rollout):
    """The surrogate's terms, its derivative by each logp, and where a ratio lies below and above its bounds, all (n,)."""
    surrogate, level = objective.surrogate, objective.level
    x, inside = torch.zeros_like(logp) if old is None else logp - old, None
    log_ratio = x
    if level == "product":
        x = rows.sums(log_ratio)[rollout]
    elif level != "token":
        if level == "geometric":
            a, b = (bound.masked_fill(advantages == 0, 0) for bound in surrogate.by_sign(advantages))  # A = 0: ratio 1
            inside = ~((log_ratio < a) | (log_ratio > b)) & (advantages != 0)
            x = log_ratio.clamp(a, b)
        x = (rows.sums(x) / tokens.clamp(min=1))[rollout]
    terms, clipped = surrogate.terms(x, logp, weighted), inside is not None
    slope = terms.slope
    if objective.spreads:
        slope = (rows.sums(slope) / tokens.clamp(min=1))[rollout]
        slope = torch.where(inside, slope, 0) if clipped else slope
    return terms, slope, (log_ratio < a, log_ratio > b) if clipped else (terms.below, terms.above)


def _weigh_triton(logp: torch.Tensor, rows: Rows, objective: TokenObjective) -> Weighed:
    old, ref, rollouts = rows.old, rows.ref, rows.weights.shape[0]
    behaviour = old if rows.sampling is None else rows.sampling
    behaviour = None if objective.off_policy_mask_threshold is None else behaviour
    names = ("logp", "old", "ref", "behaviour", "advantage", "mask", "cu_seqlens", "rollout_weight")
    given = dense(logp, old, ref, behaviour, rows.advantages, rows.mask, rows.cu_seqlens, rows.weights)
    losses, coef = torch.zeros_like(logp), torch.zeros_like(logp)
    sums = torch.empty(rollouts, len(SUMS), dtype=logp.dtype, device=logp.device)
    if rollouts:
        with device_guard(logp):
            weigh_kernel[(rollouts,)](
                **{f"{name}_ptr": x for name, x in zip(names, given, strict=True)}, losses_ptr=losses, coef_ptr=coef,
                sums_ptr=sums, threshold=float(objective.off_policy_mask_threshold or 0), LEVEL=objective.level,
                SPREADS=objective.spreads, HAS_OLD=old is not None, HAS_REF=ref is not None, HAS_MASK=rows.mask is not None,
                DROPS=behaviour is not None, ACE=ref is not None and objective.weighs_current(old is not None),
                OLD_CONFIDENCE=objective.ace.confidence == "old" and old is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
                **objective.surrogate.kernel_arguments(), **objective.ace.kernel_arguments(), **objective.kl.kernel_arguments(),
            )  # fmt: skip
    return Weighed(losses, coef, sums)


@jit
def weigh_kernel(
    logp_ptr, old_ptr, ref_ptr, behaviour_ptr, advantage_ptr, mask_ptr, cu_seqlens_ptr, rollout_weight_ptr, losses_ptr, coef_ptr,
    sums_ptr, positive_a, positive_b, negative_a, negative_b, beta, alpha, threshold,
    FORM: tl.constexpr, LEVEL: tl.constexpr, SPREADS: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr, DROPS: tl.constexpr, ACE: tl.constexpr, OLD_CONFIDENCE: tl.constexpr, MEAN: tl.constexpr,
    SHAPE: tl.constexpr, KL: tl.constexpr, CORRECTED: tl.constexpr, TO_OLD: tl.constexpr, BLOCK: tl.constexpr,
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
            gap = log_ratio_of(behaviour_ptr, logp_ptr, rows, active)
            drift += tl.sum(tl.where(gap == gap, gap, 0.0), 0)  # NaN is unknown and adds nothing
        if HAS_OLD and LEVEL != "token":
            x = log_ratio_of(logp_ptr, old_ptr, rows, active)
            if LEVEL == "geometric":
                a, b = bounds(advantage_ptr, rows, active, positive_a, positive_b, negative_a, negative_b)
                x = tl.where(active, tl.minimum(tl.maximum(x, a), b), 0.0)
            log_ratios += tl.sum(x, 0)
    count = tl.maximum(tokens, 1.0)
    ace = 1.0
    if ACE:
        ace = weight_kernel(shift / count if MEAN else shift, alpha, SHAPE)
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
    slope_sum = tl.full((), 0.0, tl.float64)  # a coefficient of every token: no rounding once per block
    negatives = 0.0
    for start in range(first, last, BLOCK):
        rows, active = active_rows(start, last, mask_ptr, HAS_MASK, BLOCK)
        logp = tl.load(logp_ptr + rows, mask=active, other=0.0)
        advantage = tl.load(advantage_ptr + rows, mask=active, other=0.0)
        old = logp
        log_ratio = tl.zeros_like(logp)  # not logp - old, which is NaN where logp is -inf
        if HAS_OLD:
            old = tl.load(old_ptr + rows, mask=active, other=0.0)
            log_ratio = logp - old
        x = log_ratio
        if LEVEL != "token":
            x = tl.zeros_like(logp) + log_ratios
        weighted = tl.where(advantage < 0, advantage * weight, advantage)
        a = tl.where(weighted > 0, positive_a, negative_a)
        b = tl.where(weighted > 0, positive_b, negative_b)
        loss, slope, low, high = surrogate_kernel(x, logp, weighted, a, b, FORM)
        kl = tl.zeros_like(loss)
        direct = kl
        if HAS_REF or TO_OLD:
            anchor = old
            if not TO_OLD:
                anchor = tl.load(ref_ptr + rows, mask=active, other=0.0)
            kl, by_logp = divergence_kernel(logp, old, anchor, KL, CORRECTED and HAS_OLD)
            if CORRECTED and not HAS_OLD:
                by_logp = logp - anchor
            loss += tl.where(beta > 0, beta * kl, 0.0)  # kl may be inf, and 0 * inf NaN
            direct = tl.where(beta > 0, beta * by_logp, 0.0)
        if LEVEL == "geometric":
            low = log_ratio < a
            high = log_ratio > b
        if FORM != "clip":  # clip takes A = 0 for a ratio of 1, within its bounds
            counts = (advantage > 0) | (weighted < 0)
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
        negatives += tl.sum((advantage < 0).to(tl.float32), 0)

    if SPREADS:
        tl.debug_barrier()  # the walk below adds to what the walk above stored
        slope = (slope_sum / count).to(tl.float32) * scale
        for start in range(first, last, BLOCK):
            rows, active = active_rows(start, last, mask_ptr, HAS_MASK, BLOCK)
            share = slope + tl.zeros([BLOCK], tl.float32)
            if LEVEL == "geometric":
                advantage = tl.load(advantage_ptr + rows, mask=active, other=0.0)
                share = tl.where(advantage == 0, 0.0, share)
                if HAS_OLD:
                    a, b = bounds(advantage_ptr, rows, active, positive_a, positive_b, negative_a, negative_b)
                    x = log_ratio_of(logp_ptr, old_ptr, rows, active)
                    share = tl.where((x < a) | (x > b), 0.0, share)
            tl.store(coef_ptr + rows, tl.load(coef_ptr + rows, mask=active, other=0.0) + share, mask=active)

    out = sums_ptr + rollout * 8
    tl.store(out + 0, loss_sum)
    tl.store(out + 1, tokens)
    tl.store(out + 2, negatives)
    tl.store(out + 3, shift)
    tl.store(out + 4, kl_sum)
    tl.store(out + 5, low_sum)
    tl.store(out + 6, high_sum)
    tl.store(out + 7, dropped * tokens)


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
    """The difference of two log-probabilities of a block of rows, 0 where not active."""
    return tl.load(logp_ptr + rows, mask=active, other=0.0) - tl.load(old_ptr + rows, mask=active, other=0.0)


@jit
def bounds(advantage_ptr, rows, active, positive_a, positive_b, negative_a, negative_b):
    """The bounds (a, b) for the sign of each row's advantage; (0, 0) where the advantage is 0."""
    advantage = tl.load(advantage_ptr + rows, mask=active, other=0.0)
    a = tl.where(advantage > 0, positive_a, tl.where(advantage < 0, negative_a, 0.0))
    return a, tl.where(advantage > 0, positive_b, tl.where(advantage < 0, negative_b, 0.0))
