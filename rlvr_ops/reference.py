"""The losses written out in the most obvious PyTorch: the truth everything else is tested against.

The logits exist in full, rollouts are visited in a plain loop, gradients come from autograd, and the dtype is that of
the inputs: give float64 for the truth. It is slow and needs (rows, V) of memory. Read it and test with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from rlvr_kernels.spec import Surrogate
from torch import Tensor

from rlvr_ops.reference_terms import (
    ace_metrics,
    active_rows,
    aggregate,
    asymmetric,
    kl_penalty,
    masked,
    per_row,
    sampling_weights,
    slices,
    spread,
    stale,
    surrogate_losses,
    top_entropy_rows,
)
from rlvr_ops.surrogates import resolve

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
    sum_p_squared: Tensor | None = None


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
    with_sum_p_squared: bool = False,
) -> ReferenceScores:
    """Log-probability of every completion token under softmax(z), and on request what else the logits z tell.

    z = logit_scale (h W^T + b); then softcap tanh(z / softcap) if asked for; then z / temperature.
    `hidden_states` is (B, T, H) or packed (N, H); `temperature` a number, (B,), or shaped like `completion_ids`.
    Masked rows never enter the matmul, so their hidden states may be NaN and their ids -100. Self-certainty is
    lse - mean(z) - log V (arXiv 2502.18581); top-1 is whether no token has a larger logit than the target.
    """
    shape = completion_ids.shape
    active = active_rows(completion_ids, completion_mask)
    dtype = torch.promote_types(hidden_states.dtype, lm_head_weight.dtype)
    h = hidden_states.reshape(-1, hidden_states.shape[-1])[active].to(dtype)
    ids = completion_ids.reshape(-1)[active].long()

    z = h @ lm_head_weight.to(dtype).T
    if lm_head_bias is not None:
        z = z + lm_head_bias.to(dtype)
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (per_row(temperature, shape)[active, None].to(dtype) if isinstance(temperature, Tensor) else temperature)

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
        sum_p_squared=back(log_p.exp().square().sum(dim=-1)) if with_sum_p_squared else None,
    )


def reference_policy_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    surrogate: str | Surrogate = "ppo_clip",
    importance_sampling_level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    alpha: float = 0.0,
    confidence: str = "current",
    confidence_reduction: str = "mean",
    shape: str = "softplus",
    loss_type: str = "grpo",
    beta: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None,
    sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None,
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
        temperature = spread(temperature, slices(completion_ids.shape, cu_seqlens)).reshape(completion_ids.shape)
    scores = reference_token_logps(
        hidden_states,
        lm_head_weight,
        completion_ids,
        completion_mask=completion_mask,
        temperature=temperature,
        lm_head_bias=lm_head_bias,
        softcap=softcap,
        logit_scale=logit_scale,
        with_entropy=with_entropy or entropy_coef > 0 or top_entropy_quantile < 1,
    )
    return reference_policy_loss_from_logps(
        scores.logps,
        advantages,
        completion_mask=completion_mask,
        cu_seqlens=cu_seqlens,
        old_per_token_logps=old_per_token_logps,
        ref_per_token_logps=ref_per_token_logps,
        sampling_per_token_logps=sampling_per_token_logps,
        per_token_entropies=scores.entropy,
        surrogate=surrogate,
        importance_sampling_level=importance_sampling_level,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        alpha=alpha,
        confidence=confidence,
        confidence_reduction=confidence_reduction,
        shape=shape,
        loss_type=loss_type,
        beta=beta,
        kl_estimator=kl_estimator,
        use_bias_correction_kl=use_bias_correction_kl,
        entropy_coef=entropy_coef,
        top_entropy_quantile=top_entropy_quantile,
        off_policy_mask_threshold=off_policy_mask_threshold,
        sampling_correction=sampling_correction,
        sampling_clip_max=sampling_clip_max,
        sampling_clip_min=sampling_clip_min,
        num_items_in_batch=num_items_in_batch,
        max_completion_length=max_completion_length,
    )


def reference_policy_loss_from_logps(
    per_token_logps: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None,
    per_token_entropies: Tensor | None = None,
    surrogate: str | Surrogate = "ppo_clip",
    importance_sampling_level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    alpha: float = 0.0,
    confidence: str = "current",
    confidence_reduction: str = "mean",
    shape: str = "softplus",
    loss_type: str = "grpo",
    beta: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None,
    sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None,
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
) -> ReferenceLoss:
    """The loss of `rlvr_ops.policy_loss_from_logps`, rollout by rollout; differentiable in log-probabilities and entropies.

    Without `old_per_token_logps` the policy is on policy: rho is 1 and its gradient flows. ACE (arXiv 2602.21420)
    multiplies the negative advantages of rollout i by 1 + alpha softplus(c_i).
    """
    layout = per_token_logps.shape
    active = active_rows(per_token_logps, completion_mask)
    rollouts = slices(layout, cu_seqlens)
    numbers = resolve(surrogate, epsilon_low, epsilon_high, delta)
    # Masked before any exp: a NaN or inf in padding would otherwise come back as a NaN gradient.
    logp = per_token_logps.reshape(-1).where(active, 0.0)
    old = logp.detach() if old_per_token_logps is None else masked(old_per_token_logps, active)
    ref = None if ref_per_token_logps is None else masked(ref_per_token_logps, active)
    sampling = None if sampling_per_token_logps is None else masked(sampling_per_token_logps, active)
    if ref is None and (alpha > 0 or beta > 0):
        raise ValueError("ref_per_token_logps is needed when alpha or beta is above 0, got None.")
    adv = spread(advantages, rollouts).where(active, 0.0)
    adv = adv.to(torch.promote_types(adv.dtype, logp.dtype))
    drifted = old  # what the surrogate's ratio is taken against
    if sampling_correction is not None:
        assert sampling is not None
        found = sampling_weights(
            sampling_correction,
            sampling_clip_min,
            float("inf") if sampling_clip_max is None else sampling_clip_max,
            old,
            sampling,
            active,
            rollouts,
        )
        if numbers.form == "vespo":
            drifted = old - found.clamp(min=1e-8).log()
        elif numbers.form == "gmpo" and sampling_correction.startswith("token"):
            for rows in rollouts:
                adv[rows] = adv[rows] * torch.exp((found[rows][active[rows]] + 1e-10).log().mean())
        else:
            adv = adv * found
    base = adv
    if ref is not None:
        believed = logp.detach() if confidence == "current" else old
        weighted, shifts, weights = asymmetric(
            adv, believed - ref, active, rollouts, alpha, confidence_reduction, shape
        )
        adv = weighted if alpha > 0 else adv
    if off_policy_mask_threshold is not None:
        behaviour = old if sampling is None else sampling
        dropped = stale(logp, behaviour, off_policy_mask_threshold, active, rollouts)
        for i, rows in enumerate(rollouts):
            adv[rows] = torch.where((adv[rows] < 0) & dropped[i], 0.0, adv[rows])
    chosen = active
    if top_entropy_quantile < 1:
        assert per_token_entropies is not None
        chosen = top_entropy_rows(per_token_entropies.detach().reshape(-1), active, top_entropy_quantile)
        adv = adv.where(chosen, 0.0)

    per_token, low, high = surrogate_losses(
        numbers, importance_sampling_level, logp, drifted, adv, base, active, rollouts
    )
    if ref is not None:
        kl = kl_penalty(logp, ref, kl_estimator, torch.exp(logp - old) if use_bias_correction_kl else None)
        per_token = per_token + beta * kl if beta > 0 else per_token
    if entropy_coef > 0:
        assert per_token_entropies is not None
        per_token = per_token - entropy_coef * per_token_entropies.reshape(-1).where(chosen, 0.0)
    loss = aggregate(per_token, active, rollouts, loss_type, num_items_in_batch, max_completion_length, layout)

    tokens = active.sum().clamp(min=1).to(logp.dtype)
    low, high = (x & active for x in (low, high))
    metrics = {
        "clip_ratio/low_mean": low.sum() / tokens,
        "clip_ratio/high_mean": high.sum() / tokens,
        "clip_ratio/region_mean": (low | high).sum() / tokens,
    }
    if ref is not None:
        metrics["kl"] = kl.detach().where(active, 0.0).sum() / tokens
        metrics.update(ace_metrics(base, shifts, weights, rollouts))
    if per_token_entropies is not None:
        metrics["entropy"] = masked(per_token_entropies, active).sum() / tokens
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
    active = active_rows(per_token_logps, completion_mask)
    rollouts = slices(per_token_logps.shape, cu_seqlens)
    shift_rows = masked(per_token_logps, active) - masked(ref_per_token_logps, active)
    rows = spread(advantages, rollouts)
    per_row, _, weights = asymmetric(rows, shift_rows, active, rollouts, alpha, confidence_reduction, shape)
    if advantages.ndim == 1 and len(advantages) == len(rollouts):
        return torch.where(advantages < 0, advantages * weights, advantages)
    return per_row.reshape(advantages.shape)
