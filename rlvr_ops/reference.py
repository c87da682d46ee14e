"""The losses written out in the most obvious PyTorch: the truth everything else is tested against.

The logits exist in full, rollouts are visited in a plain loop, gradients come from autograd, and the dtype is that of
the inputs: give float64 for the truth. It is slow and needs (rows, V) of memory. Read it and test with it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = [
    "ReferenceLoss",
    "ReferenceScores",
    "reference_ace_advantages",
    "reference_policy_loss",
    "reference_policy_loss_from_logps",
    "reference_token_logps",
]


class ReferenceLoss(NamedTuple):
    """A loss, its detached metrics, and the log-probabilities it was computed from (masked rows are 0)."""

    loss: Tensor
    metrics: dict[str, Tensor]
    per_token_logps: Tensor


class ReferenceScores(NamedTuple):
    """What the policy says about each completion token, in nats, shaped like `completion_ids`; masked rows are 0."""

    logps: Tensor
    entropy: Tensor | None
    self_certainty: Tensor | None
    top1: Tensor | None


def reference_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    with_self_certainty: bool = False,
    with_top1: bool = False,
) -> ReferenceScores:
    """Log-probability of every completion token under softmax(z), and on request what else the logits z tell.

    z = logit_scale (h W^T + b); then softcap tanh(z / softcap) if asked for; then z / temperature.
    `hidden_states` is (B, T, H) or packed (N, H); `temperature` a number, (B,), or shaped like `completion_ids`.
    Masked rows never enter the matmul, so their hidden states may be NaN and their ids -100. Self-certainty is
    lse - mean(z) - log V (arXiv 2502.18581); top-1 is whether no token has a larger logit than the target.
    """
    shape = completion_ids.shape
    active = _active_rows(completion_ids, completion_mask)
    dtype = torch.promote_types(hidden_states.dtype, lm_head_weight.dtype)
    h = hidden_states.reshape(-1, hidden_states.shape[-1])[active].to(dtype)
    ids = completion_ids.reshape(-1)[active].long()

    z = h @ lm_head_weight.to(dtype).T
    if lm_head_bias is not None:
        z = z + lm_head_bias.to(dtype)
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (_per_row(temperature, shape)[active, None].to(dtype) if isinstance(temperature, Tensor) else temperature)

    log_p = z.log_softmax(dim=-1)
    target = ids[:, None]
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    self_certainty = z.logsumexp(dim=-1) - z.mean(dim=-1) - torch.log(z.new_tensor(z.shape[-1]))
    top1 = z.gather(-1, target)[:, 0] >= z.amax(dim=-1)

    def back(rows: Tensor) -> Tensor:
        return rows.new_zeros(active.shape).masked_scatter(active, rows).reshape(shape)

    return ReferenceScores(
        logps=back(log_p.gather(-1, target)[:, 0]),
        entropy=back(entropy) if with_entropy else None,
        self_certainty=back(self_certainty) if with_self_certainty else None,
        top1=back(top1) if with_top1 else None,
    )


def reference_policy_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    alpha: float = 0.0,
    confidence: str = "current",
    confidence_reduction: str = "mean",
    shape: str = "softplus",
    loss_type: str = "grpo",
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    with_entropy: bool = False,
) -> ReferenceLoss:
    """The loss of `rlvr_ops.policy_loss` from hidden states and full logits; the same keywords mean the same."""
    if isinstance(temperature, Tensor):
        temperature = _spread(temperature, _rollouts(completion_ids.shape, cu_seqlens)).reshape(completion_ids.shape)
    scores = reference_token_logps(
        hidden_states,
        lm_head_weight,
        completion_ids,
        completion_mask=completion_mask,
        temperature=temperature,
        lm_head_bias=lm_head_bias,
        softcap=softcap,
        logit_scale=logit_scale,
        with_entropy=with_entropy,
    )
    out = reference_policy_loss_from_logps(
        scores.logps,
        advantages,
        completion_mask=completion_mask,
        cu_seqlens=cu_seqlens,
        old_per_token_logps=old_per_token_logps,
        ref_per_token_logps=ref_per_token_logps,
        alpha=alpha,
        confidence=confidence,
        confidence_reduction=confidence_reduction,
        shape=shape,
        loss_type=loss_type,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        beta=beta,
        kl_estimator=kl_estimator,
        num_items_in_batch=num_items_in_batch,
        max_completion_length=max_completion_length,
    )
    if scores.entropy is not None:
        tokens = _active_rows(completion_ids, completion_mask).sum().clamp(min=1)
        out.metrics["entropy"] = scores.entropy.detach().sum() / tokens
    return out


def reference_policy_loss_from_logps(
    per_token_logps: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    alpha: float = 0.0,
    confidence: str = "current",
    confidence_reduction: str = "mean",
    shape: str = "softplus",
    loss_type: str = "grpo",
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
) -> ReferenceLoss:
    """The loss of `rlvr_ops.policy_loss_from_logps`, rollout by rollout; differentiable in `per_token_logps`.

    Per token  -min(min(rho, delta) A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A) + beta KL, with
    rho = exp(logp - old); without `old_per_token_logps` the policy is on policy: rho is 1 and its gradient flows.
    ACE (arXiv 2602.21420) multiplies the negative advantages of rollout i by 1 + alpha softplus(c_i).
    """
    layout = per_token_logps.shape
    active = _active_rows(per_token_logps, completion_mask)
    rollouts = _rollouts(layout, cu_seqlens)
    # Masked before any exp: a NaN or inf in padding would otherwise come back as a NaN gradient.
    logp = per_token_logps.reshape(-1).where(active, 0.0)
    old = logp.detach() if old_per_token_logps is None else _masked(old_per_token_logps, active)
    ref = None if ref_per_token_logps is None else _masked(ref_per_token_logps, active)
    if ref is None and (alpha > 0 or beta > 0):
        raise ValueError("ref_per_token_logps is needed when alpha or beta is above 0, got None.")
    adv = _spread(advantages, rollouts).where(active, 0.0)
    adv = adv.to(torch.promote_types(adv.dtype, logp.dtype))
    base = adv
    if ref is not None:
        believed = logp.detach() if confidence == "current" else old
        weighted, shifts, weights = _asymmetric(
            adv, believed - ref, active, rollouts, alpha, confidence_reduction, shape
        )
        adv = weighted if alpha > 0 else adv

    high = epsilon_low if epsilon_high is None else epsilon_high
    ratio = torch.exp((logp - old).where(adv != 0, 0.0))  # an overflow must not make NaN of an advantage of 0
    clipped = ratio.clamp(1 - epsilon_low, 1 + high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    per_token = -torch.min(bounded * adv, clipped * adv)
    if ref is not None:
        kl = _kl(logp - ref, kl_estimator)
        per_token = per_token + beta * kl if beta > 0 else per_token
    loss = _aggregate(per_token, active, rollouts, loss_type, num_items_in_batch, max_completion_length, layout)

    tokens = active.sum().clamp(min=1).to(ratio.dtype)
    low_clipped = active & (ratio < 1 - epsilon_low) & (base < 0)
    high_clipped = active & (ratio > 1 + high) & (base > 0)
    metrics = {
        "clip_ratio/low_mean": low_clipped.sum() / tokens,
        "clip_ratio/high_mean": high_clipped.sum() / tokens,
        "clip_ratio/region_mean": (low_clipped | high_clipped).sum() / tokens,
    }
    if ref is not None:
        metrics["kl"] = kl.detach().where(active, 0.0).sum() / tokens
        metrics.update(_ace_metrics(base, shifts, weights, rollouts))
    return ReferenceLoss(loss, metrics, logp.reshape(layout))


def reference_ace_advantages(
    advantages: Tensor,
    per_token_logps: Tensor,
    ref_per_token_logps: Tensor,
    completion_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    alpha: float = 1.0,
    confidence_reduction: str = "mean",
    shape: str = "softplus",
) -> Tensor:
    """Advantages with every negative one multiplied by 1 + alpha softplus(c_i); the others and the shape untouched."""
    active = _active_rows(per_token_logps, completion_mask)
    rollouts = _rollouts(per_token_logps.shape, cu_seqlens)
    shift_rows = _masked(per_token_logps, active) - _masked(ref_per_token_logps, active)
    rows = _spread(advantages, rollouts)
    per_row, _, weights = _asymmetric(rows, shift_rows, active, rollouts, alpha, confidence_reduction, shape)
    if advantages.ndim == 1 and len(advantages) == len(rollouts):
        return torch.where(advantages < 0, advantages * weights, advantages)
    return per_row.reshape(advantages.shape)


def _asymmetric(
    adv: Tensor, shift_rows: Tensor, active: Tensor, rollouts: list[slice], alpha: float, reduction: str, shape: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Re-weighted advantages per row; the confidence shift and the weight 1 + alpha f(shift) per rollout."""
    adv = adv.clone()
    shifts = adv.new_zeros(len(rollouts))
    weights = adv.new_ones(len(rollouts))
    for i, rows in enumerate(rollouts):
        shift = shift_rows[rows][active[rows]].sum()
        if reduction == "mean":
            shift = shift / active[rows].sum().clamp(min=1)
        shifts[i] = shift
        weights[i] = 1 + alpha * (softplus(shift) if shape == "softplus" else shift.relu())
        adv[rows] = torch.where(adv[rows] < 0, adv[rows] * weights[i], adv[rows])
    return adv, shifts, weights


def _kl(log_ratio: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || ref) per token from log_ratio = logp - ref (Schulman's k1, k2, k3)."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return torch.expm1(-log_ratio) + log_ratio


def _aggregate(
    per_token: Tensor,
    active: Tensor,
    rollouts: list[slice],
    loss_type: str,
    num_items: float | Tensor | None,
    max_completion_length: int | None,
    layout: torch.Size,
) -> Tensor:
    """Sum the active tokens' losses over the denominator of `loss_type`; 0, still attached, if there is none."""
    if loss_type == "bnpo" and num_items is not None:
        raise ValueError("num_items_in_batch has no meaning for bnpo: its denominator is local by definition.")
    total = per_token[:0].sum()
    for rows in rollouts:
        mine = per_token[rows].where(active[rows], 0.0)
        total = total + (mine.sum() / active[rows].sum().clamp(min=1) if loss_type == "grpo" else mine.sum())
    if loss_type in ("dapo", "bnpo"):
        return total / (num_items if num_items is not None else active.sum().clamp(min=1))
    count = num_items if num_items is not None else max(len(rollouts), 1)
    if loss_type == "grpo":
        return total / count
    length = max_completion_length if max_completion_length is not None else max(layout[1], 1)
    return total / (count * length)


def _ace_metrics(base: Tensor, shifts: Tensor, weights: Tensor, rollouts: list[slice]) -> dict[str, Tensor]:
    """Describe the wrong rollouts, those with a negative advantage: mean shift, weights, and the three classes."""
    wrong = torch.stack([(base[rows] < 0).any() for rows in rollouts]) if rollouts else shifts > 0
    count = wrong.sum().clamp(min=1).to(shifts.dtype)
    return {
        "ace/shift/mean": shifts.where(wrong, 0.0).sum() / count,
        "ace/weight/mean": weights.where(wrong, 0.0).sum() / count,
        "ace/weight/max": weights.where(wrong, 0.0).amax() if rollouts else weights.sum(),
        "ace/frac_overconfident": (wrong & (shifts > 0.05)).sum() / count,
        "ace/frac_exploratory": (wrong & (shifts.abs() <= 0.05)).sum() / count,
        "ace/frac_self_correcting": (wrong & (shifts < -0.05)).sum() / count,
    }


def _active_rows(like: Tensor, completion_mask: Tensor | None) -> Tensor:
    if completion_mask is None:
        return torch.ones(like.numel(), dtype=torch.bool, device=like.device)
    return completion_mask.reshape(-1) != 0


def _rollouts(layout: torch.Size, cu_seqlens: Tensor | None) -> list[slice]:
    if cu_seqlens is None:
        n_rollouts, length = layout
        return [slice(i * length, (i + 1) * length) for i in range(n_rollouts)]
    ends = cu_seqlens.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _per_row(values: Tensor, layout: torch.Size) -> Tensor:
    """(B,), (B, T) or (N,) values as one per row."""
    if values.shape == layout:
        return values.reshape(-1)
    return values[:, None].expand(layout).reshape(-1)


def _spread(values: Tensor, rollouts: list[slice]) -> Tensor:
    """One value per row from one per rollout or one per row; where there are as many rows as rollouts, per rollout."""
    if values.shape != (len(rollouts),):
        return values.reshape(-1)
    pieces = [values[i].expand(rows.stop - rows.start) for i, rows in enumerate(rollouts)]
    return torch.cat(pieces) if pieces else values.new_zeros(0)


def _masked(values: Tensor, active: Tensor) -> Tensor:
    return values.detach().reshape(-1).where(active, 0.0)
