"""The losses written out in the most obvious PyTorch: the truth everything else is tested against.

The logits exist in full, rollouts are visited in a plain loop, gradients come from autograd, and the dtype is that of
the inputs: give float64 for the truth. It is slow and needs (rows, V) of memory. Read it and test with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from rlvr_kernels.objective import Ace
from rlvr_kernels.surrogates import Surrogate
from torch import Tensor

from rlvr_ops.head.head import Head
from rlvr_ops.objectives.objective import Objective
from rlvr_ops.reference.terms import (
    ace_metrics,
    active_rows,
    aggregate,
    asymmetric,
    masked,
    per_row,
    sampling_weights,
    slices,
    spread,
    stale,
    surrogate_losses,
    top_entropy_rows,
)
from rlvr_ops.rollouts import Rollouts


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
    """Log-probability of every completion token under softmax(z) and, on request, other statistics of the logits z.

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
    hidden_states: Tensor, head: Head, rollouts: Rollouts, objective: Objective, *, with_entropy: bool = False
) -> ReferenceLoss:
    """The loss of `rlvr_ops.policy_loss` from hidden states and full logits."""
    ids = rollouts.completion_ids
    assert ids is not None
    temperature = head.temperature
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = spread(temperature, slices(ids.shape, rollouts.cu_seqlens)).reshape(ids.shape)
    scores = reference_token_logps(
        hidden_states,
        head.weight,
        ids,
        completion_mask=rollouts.completion_mask,
        temperature=temperature,
        lm_head_bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        with_entropy=with_entropy or objective.entropy.wanted,
    )
    return reference_policy_loss_from_logps(scores.logps, rollouts, objective, per_token_entropies=scores.entropy)


def reference_policy_loss_from_logps(
    per_token_logps: Tensor, batch: Rollouts, objective: Objective, *, per_token_entropies: Tensor | None = None
) -> ReferenceLoss:
    """The loss of `rlvr_ops.policy_loss_from_logps`, rollout by rollout; differentiable in log-probabilities and entropies.

    Without `old_per_token_logps` the policy is on policy: rho is 1 and its gradient flows. ACE (arXiv 2602.21420)
    multiplies the negative advantages of rollout i by 1 + alpha softplus(c_i).
    """
    layout = per_token_logps.shape
    active = active_rows(per_token_logps, batch.completion_mask)
    rollouts = slices(layout, batch.cu_seqlens)
    surrogate, ace, kl_term, correction = objective.surrogate, objective.ace, objective.kl, objective.sampling
    assert isinstance(surrogate, Surrogate)
    # Masked before any exp: a NaN or inf in padding would otherwise come back as a NaN gradient.
    logp = per_token_logps.reshape(-1).where(active, 0.0)
    given = (batch.old_per_token_logps, batch.ref_per_token_logps, batch.sampling_per_token_logps)
    old, ref, sampling = (None if x is None else masked(x, active) for x in given)
    old = logp.detach() if old is None else old
    if ref is None and objective.needs_reference:
        raise ValueError("ref_per_token_logps is needed when alpha or beta is above 0, got None.")
    adv = spread(batch.advantages, rollouts).where(active, 0.0)
    adv = adv.to(torch.promote_types(adv.dtype, logp.dtype))
    drifted = old  # the denominator of the surrogate's ratio
    if correction is not None:
        assert sampling is not None
        found = sampling_weights(correction, old, sampling, active, rollouts)
        if surrogate.form == "vespo":
            drifted = old - found.clamp(min=1e-8).log()
        elif surrogate.form == "gmpo" and not correction.per_rollout:
            for rows in rollouts:
                adv[rows] = adv[rows] * torch.exp((found[rows][active[rows]] + 1e-10).log().mean())
        else:
            adv = torch.where(adv == 0, 0.0, adv * found)
    base = adv.clone()
    if ref is not None:
        believed = logp.detach() if ace.confidence == "current" else old
        weighted, shifts, weights = asymmetric(adv, believed - ref, active, rollouts, ace)
        adv = weighted if ace.alpha > 0 else adv
    if objective.off_policy_mask_threshold is not None:
        behaviour = old if sampling is None else sampling
        dropped = stale(logp, behaviour, objective.off_policy_mask_threshold, active, rollouts)
        for i, rows in enumerate(rollouts):
            adv[rows] = torch.where((adv[rows] < 0) & dropped[i], 0.0, adv[rows])
    chosen = active
    if objective.entropy.top_quantile < 1:
        assert per_token_entropies is not None
        chosen = top_entropy_rows(per_token_entropies.detach().reshape(-1), active, objective.entropy.top_quantile)
        adv = adv.where(chosen, 0.0)

    per_token, low, high = surrogate_losses(objective, logp, drifted, adv, base, active, rollouts)
    anchor = ref if kl_term.against == "reference" else old
    if anchor is not None:
        kl = kl_term.penalty(logp, old, anchor)
        per_token = per_token + kl_term.beta * kl if kl_term.beta > 0 else per_token
    if objective.entropy.coef > 0:
        assert per_token_entropies is not None
        per_token = per_token - objective.entropy.coef * per_token_entropies.reshape(-1).where(chosen, 0.0)
    loss = aggregate(per_token, active, rollouts, objective, batch.num_items_in_batch, layout)

    tokens = active.sum().clamp(min=1).to(logp.dtype)
    low, high = (x & active for x in (low, high))
    metrics = {
        "clip_ratio/low_mean": low.sum() / tokens,
        "clip_ratio/high_mean": high.sum() / tokens,
        "clip_ratio/region_mean": (low | high).sum() / tokens,
    }
    if anchor is not None:
        metrics["kl"] = kl.detach().where(active, 0.0).sum() / tokens
    if ref is not None:
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
    ace = Ace(alpha, "current", confidence_reduction, shape)
    per_row, _, weights = asymmetric(rows, shift_rows, active, rollouts, ace)
    if advantages.ndim == 1 and len(advantages) == len(rollouts):
        return torch.where(advantages < 0, advantages * weights, advantages)
    return per_row.reshape(advantages.shape)
