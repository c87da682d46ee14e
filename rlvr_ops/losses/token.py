"""Token losses whose clip drops no gradient: CISPO, DISPO, SAPO, REINFORCE. The keywords are explained in `ace_loss`."""

from rlvr_kernels.objective import KL, Ace, Entropy
from rlvr_kernels.surrogates import Cispo, Dispo, Reinforce, Sapo
from torch import Tensor

from rlvr_ops.head.head import Head
from rlvr_ops.head.plan import Plan
from rlvr_ops.losses.policy_loss import policy_loss
from rlvr_ops.losses.policy_loss_from_logps import policy_loss_from_logps
from rlvr_ops.objectives.objective import LossOutput, Objective, correction
from rlvr_ops.rollouts import Rollouts


def cispo_loss(
    hidden_states: Tensor, lm_head_weight: Tensor | Head, completion_ids: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, importance_sampling_level: str = "token", alpha: float = 0.0,
    confidence: str = "current", confidence_reduction: str = "mean", shape: str = "softplus",
    loss_type: str = "dapo", beta: float = 0.0, kl_estimator: str = "k3", use_bias_correction_kl: bool = False,
    kl_against: str = "reference", entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None, sampling_correction: str | None = None,
    sampling_clip_max: float | None = 3.0, sampling_clip_min: float | None = None, temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
    num_items_in_batch: float | Tensor | None = None, max_completion_length: int | None = None,
    score_inactive: bool = False, with_entropy: bool = False, schedule: str = "auto",
    workspace_bytes: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """CISPO: a clipped, constant ratio times the log-probability, so no token loses its gradient (arXiv 2506.13585).

    TRL's convention: the ratio is at most 5. `CispoTwoSided` is verl's.
    """
    objective = Objective(
        Cispo(), ace=Ace(alpha, confidence, confidence_reduction, shape),
        kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against), importance_sampling_level=importance_sampling_level,
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation=loss_type,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        completion_ids, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps,
        completion_mask, cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    head = Head(lm_head_weight, lm_head_bias, logit_scale, softcap, temperature)
    plan = Plan(schedule, workspace_bytes, backend, score_inactive, with_entropy, validate)
    return policy_loss(hidden_states, head, rollouts, objective, plan)


def cispo_loss_from_logps(
    per_token_logps: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, per_token_entropies: Tensor | None = None,
    importance_sampling_level: str = "token", alpha: float = 0.0, confidence: str = "current",
    confidence_reduction: str = "mean", shape: str = "softplus", loss_type: str = "dapo", beta: float = 0.0,
    kl_estimator: str = "k3", use_bias_correction_kl: bool = False, kl_against: str = "reference",
    entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None, sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None, num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """`cispo_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; see `policy_loss_from_logps`."""
    objective = Objective(
        Cispo(), ace=Ace(alpha, confidence, confidence_reduction, shape),
        kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against), importance_sampling_level=importance_sampling_level,
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation=loss_type,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        None, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps, completion_mask,
        cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    return policy_loss_from_logps(
        per_token_logps, rollouts, objective, per_token_entropies=per_token_entropies, backend=backend, validate=validate
    )  # fmt: skip


def dispo_loss(
    hidden_states: Tensor, lm_head_weight: Tensor | Head, completion_ids: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, importance_sampling_level: str = "token", alpha: float = 0.0,
    confidence: str = "current", confidence_reduction: str = "mean", shape: str = "softplus",
    loss_type: str = "dapo", beta: float = 0.0, kl_estimator: str = "k3", use_bias_correction_kl: bool = False,
    kl_against: str = "reference", entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None, sampling_correction: str | None = None,
    sampling_clip_max: float | None = 3.0, sampling_clip_min: float | None = None, temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
    num_items_in_batch: float | Tensor | None = None, max_completion_length: int | None = None,
    score_inactive: bool = False, with_entropy: bool = False, schedule: str = "auto",
    workspace_bytes: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """DISPO: CISPO with separate bounds for right and wrong tokens (arXiv 2602.00983); see `Dispo`."""
    objective = Objective(
        Dispo(), ace=Ace(alpha, confidence, confidence_reduction, shape),
        kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against), importance_sampling_level=importance_sampling_level,
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation=loss_type,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        completion_ids, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps,
        completion_mask, cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    head = Head(lm_head_weight, lm_head_bias, logit_scale, softcap, temperature)
    plan = Plan(schedule, workspace_bytes, backend, score_inactive, with_entropy, validate)
    return policy_loss(hidden_states, head, rollouts, objective, plan)


def dispo_loss_from_logps(
    per_token_logps: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, per_token_entropies: Tensor | None = None,
    importance_sampling_level: str = "token", alpha: float = 0.0, confidence: str = "current",
    confidence_reduction: str = "mean", shape: str = "softplus", loss_type: str = "dapo", beta: float = 0.0,
    kl_estimator: str = "k3", use_bias_correction_kl: bool = False, kl_against: str = "reference",
    entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None, sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None, num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """`dispo_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; see `policy_loss_from_logps`."""
    objective = Objective(
        Dispo(), ace=Ace(alpha, confidence, confidence_reduction, shape),
        kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against), importance_sampling_level=importance_sampling_level,
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation=loss_type,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        None, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps, completion_mask,
        cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    return policy_loss_from_logps(
        per_token_logps, rollouts, objective, per_token_entropies=per_token_entropies, backend=backend, validate=validate
    )  # fmt: skip


def sapo_loss(
    hidden_states: Tensor, lm_head_weight: Tensor | Head, completion_ids: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, importance_sampling_level: str = "token", alpha: float = 0.0,
    confidence: str = "current", confidence_reduction: str = "mean", shape: str = "softplus",
    loss_type: str = "grpo", beta: float = 0.0, kl_estimator: str = "k3", use_bias_correction_kl: bool = False,
    kl_against: str = "reference", entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None, sampling_correction: str | None = None,
    sampling_clip_max: float | None = 3.0, sampling_clip_min: float | None = None, temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
    num_items_in_batch: float | Tensor | None = None, max_completion_length: int | None = None,
    score_inactive: bool = False, with_entropy: bool = False, schedule: str = "auto",
    workspace_bytes: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """SAPO: a soft gate instead of the clip, sharper for wrong tokens (arXiv 2511.20347); see `Sapo`."""
    objective = Objective(
        Sapo(), ace=Ace(alpha, confidence, confidence_reduction, shape),
        kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against), importance_sampling_level=importance_sampling_level,
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation=loss_type,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        completion_ids, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps,
        completion_mask, cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    head = Head(lm_head_weight, lm_head_bias, logit_scale, softcap, temperature)
    plan = Plan(schedule, workspace_bytes, backend, score_inactive, with_entropy, validate)
    return policy_loss(hidden_states, head, rollouts, objective, plan)


def sapo_loss_from_logps(
    per_token_logps: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, per_token_entropies: Tensor | None = None,
    importance_sampling_level: str = "token", alpha: float = 0.0, confidence: str = "current",
    confidence_reduction: str = "mean", shape: str = "softplus", loss_type: str = "grpo", beta: float = 0.0,
    kl_estimator: str = "k3", use_bias_correction_kl: bool = False, kl_against: str = "reference",
    entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None, sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None, num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """`sapo_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; see `policy_loss_from_logps`."""
    objective = Objective(
        Sapo(), ace=Ace(alpha, confidence, confidence_reduction, shape),
        kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against), importance_sampling_level=importance_sampling_level,
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation=loss_type,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        None, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps, completion_mask,
        cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    return policy_loss_from_logps(
        per_token_logps, rollouts, objective, per_token_entropies=per_token_entropies, backend=backend, validate=validate
    )  # fmt: skip


def reinforce_loss(
    hidden_states: Tensor, lm_head_weight: Tensor | Head, completion_ids: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, alpha: float = 0.0, confidence: str = "current",
    confidence_reduction: str = "mean", shape: str = "softplus", loss_type: str = "grpo", beta: float = 0.0,
    kl_estimator: str = "k3", use_bias_correction_kl: bool = False, kl_against: str = "reference",
    entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None, sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None, temperature: float | Tensor = 1.0, lm_head_bias: Tensor | None = None,
    softcap: float | None = None, logit_scale: float = 1.0, num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None, score_inactive: bool = False, with_entropy: bool = False,
    schedule: str = "auto", workspace_bytes: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """REINFORCE: the log-probability times the advantage, without an importance ratio."""
    objective = Objective(
        Reinforce(), ace=Ace(alpha, confidence, confidence_reduction, shape),
        kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against), off_policy_mask_threshold=off_policy_mask_threshold,
        entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation=loss_type,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        completion_ids, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps,
        completion_mask, cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    head = Head(lm_head_weight, lm_head_bias, logit_scale, softcap, temperature)
    plan = Plan(schedule, workspace_bytes, backend, score_inactive, with_entropy, validate)
    return policy_loss(hidden_states, head, rollouts, objective, plan)


def reinforce_loss_from_logps(
    per_token_logps: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, per_token_entropies: Tensor | None = None, alpha: float = 0.0,
    confidence: str = "current", confidence_reduction: str = "mean", shape: str = "softplus",
    loss_type: str = "grpo", beta: float = 0.0, kl_estimator: str = "k3", use_bias_correction_kl: bool = False,
    kl_against: str = "reference", entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None, sampling_correction: str | None = None,
    sampling_clip_max: float | None = 3.0, sampling_clip_min: float | None = None,
    num_items_in_batch: float | Tensor | None = None, max_completion_length: int | None = None, backend: str = "auto",
    validate: bool = False,
) -> LossOutput:  # fmt: skip
    """`reinforce_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; see `policy_loss_from_logps`."""
    objective = Objective(
        Reinforce(), ace=Ace(alpha, confidence, confidence_reduction, shape),
        kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against), off_policy_mask_threshold=off_policy_mask_threshold,
        entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation=loss_type,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        None, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps, completion_mask,
        cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    return policy_loss_from_logps(
        per_token_logps, rollouts, objective, per_token_entropies=per_token_entropies, backend=backend, validate=validate
    )  # fmt: skip
