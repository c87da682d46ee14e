"""PPO's clip under different aggregations: GRPO, DAPO, Dr. GRPO, BNPO. The keywords are explained in `ace_loss`."""

from rlvr_kernels.objective import KL, Entropy
from rlvr_kernels.surrogates import Clip
from torch import Tensor

from rlvr_ops.head.head import Head
from rlvr_ops.head.plan import Plan
from rlvr_ops.losses.policy_loss import policy_loss
from rlvr_ops.losses.policy_loss_from_logps import policy_loss_from_logps
from rlvr_ops.objectives.objective import LossOutput, Objective, correction
from rlvr_ops.rollouts import Rollouts


def grpo_loss(
    hidden_states: Tensor, lm_head_weight: Tensor | Head, completion_ids: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, epsilon_low: float = 0.2, epsilon_high: float | None = None,
    delta: float | None = None, beta: float = 0.0, kl_estimator: str = "k3", use_bias_correction_kl: bool = False,
    kl_against: str = "reference", entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None, sampling_correction: str | None = None,
    sampling_clip_max: float | None = 3.0, sampling_clip_min: float | None = None, temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
    num_items_in_batch: float | Tensor | None = None, score_inactive: bool = False, with_entropy: bool = False,
    schedule: str = "auto", workspace_bytes: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """GRPO: the mean over rollouts of each one's mean clipped surrogate, with an optional KL term (arXiv 2402.03300)."""
    objective = Objective(
        Clip(epsilon_low, epsilon_high, delta), kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against),
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation="grpo",
    )  # fmt: skip
    rollouts = Rollouts(
        completion_ids, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps,
        completion_mask, cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    head = Head(lm_head_weight, lm_head_bias, logit_scale, softcap, temperature)
    plan = Plan(schedule, workspace_bytes, backend, score_inactive, with_entropy, validate)
    return policy_loss(hidden_states, head, rollouts, objective, plan)


def grpo_loss_from_logps(
    per_token_logps: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, per_token_entropies: Tensor | None = None, epsilon_low: float = 0.2,
    epsilon_high: float | None = None, delta: float | None = None, beta: float = 0.0, kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False, kl_against: str = "reference", entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None, sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None, num_items_in_batch: float | Tensor | None = None, backend: str = "auto",
    validate: bool = False,
) -> LossOutput:  # fmt: skip
    """`grpo_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; see `policy_loss_from_logps`."""
    objective = Objective(
        Clip(epsilon_low, epsilon_high, delta), kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against),
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation="grpo",
    )  # fmt: skip
    rollouts = Rollouts(
        None, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps, completion_mask,
        cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    return policy_loss_from_logps(
        per_token_logps, rollouts, objective, per_token_entropies=per_token_entropies, backend=backend, validate=validate
    )  # fmt: skip


def dapo_loss(
    hidden_states: Tensor, lm_head_weight: Tensor | Head, completion_ids: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, epsilon_low: float = 0.2, epsilon_high: float | None = 0.28,
    delta: float | None = None, beta: float = 0.0, kl_estimator: str = "k3", use_bias_correction_kl: bool = False,
    kl_against: str = "reference", entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None, sampling_correction: str | None = None,
    sampling_clip_max: float | None = 3.0, sampling_clip_min: float | None = None, temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
    num_items_in_batch: float | Tensor | None = None, score_inactive: bool = False, with_entropy: bool = False,
    schedule: str = "auto", workspace_bytes: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """DAPO: the token mean over the global batch, with clip-higher: epsilon_high=0.28 (arXiv 2503.14476)."""
    objective = Objective(
        Clip(epsilon_low, epsilon_high, delta), kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against),
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation="dapo",
    )  # fmt: skip
    rollouts = Rollouts(
        completion_ids, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps,
        completion_mask, cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    head = Head(lm_head_weight, lm_head_bias, logit_scale, softcap, temperature)
    plan = Plan(schedule, workspace_bytes, backend, score_inactive, with_entropy, validate)
    return policy_loss(hidden_states, head, rollouts, objective, plan)


def dapo_loss_from_logps(
    per_token_logps: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, per_token_entropies: Tensor | None = None, epsilon_low: float = 0.2,
    epsilon_high: float | None = 0.28, delta: float | None = None, beta: float = 0.0, kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False, kl_against: str = "reference", entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None, sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None, num_items_in_batch: float | Tensor | None = None, backend: str = "auto",
    validate: bool = False,
) -> LossOutput:  # fmt: skip
    """`dapo_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; see `policy_loss_from_logps`."""
    objective = Objective(
        Clip(epsilon_low, epsilon_high, delta), kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against),
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation="dapo",
    )  # fmt: skip
    rollouts = Rollouts(
        None, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps, completion_mask,
        cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    return policy_loss_from_logps(
        per_token_logps, rollouts, objective, per_token_entropies=per_token_entropies, backend=backend, validate=validate
    )  # fmt: skip


def dr_grpo_loss(
    hidden_states: Tensor, lm_head_weight: Tensor | Head, completion_ids: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, epsilon_low: float = 0.2, epsilon_high: float | None = None,
    delta: float | None = None, beta: float = 0.0, kl_estimator: str = "k3", use_bias_correction_kl: bool = False,
    kl_against: str = "reference", entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None, sampling_correction: str | None = None,
    sampling_clip_max: float | None = 3.0, sampling_clip_min: float | None = None, temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
    num_items_in_batch: float | Tensor | None = None, max_completion_length: int | None = None,
    score_inactive: bool = False, with_entropy: bool = False, schedule: str = "auto",
    workspace_bytes: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """Dr. GRPO: the sum over tokens, divided by a constant length, which removes GRPO's length bias (arXiv 2503.20783)."""
    objective = Objective(
        Clip(epsilon_low, epsilon_high, delta), kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against),
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation="dr_grpo",
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        completion_ids, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps,
        completion_mask, cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    head = Head(lm_head_weight, lm_head_bias, logit_scale, softcap, temperature)
    plan = Plan(schedule, workspace_bytes, backend, score_inactive, with_entropy, validate)
    return policy_loss(hidden_states, head, rollouts, objective, plan)


def dr_grpo_loss_from_logps(
    per_token_logps: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, per_token_entropies: Tensor | None = None, epsilon_low: float = 0.2,
    epsilon_high: float | None = None, delta: float | None = None, beta: float = 0.0, kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False, kl_against: str = "reference", entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None, sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None, num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """`dr_grpo_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; see `policy_loss_from_logps`."""
    objective = Objective(
        Clip(epsilon_low, epsilon_high, delta), kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against),
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation="dr_grpo",
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        None, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps, completion_mask,
        cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    return policy_loss_from_logps(
        per_token_logps, rollouts, objective, per_token_entropies=per_token_entropies, backend=backend, validate=validate
    )  # fmt: skip


def bnpo_loss(
    hidden_states: Tensor, lm_head_weight: Tensor | Head, completion_ids: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, epsilon_low: float = 0.2, epsilon_high: float | None = None,
    delta: float | None = None, beta: float = 0.0, kl_estimator: str = "k3", use_bias_correction_kl: bool = False,
    kl_against: str = "reference", entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None, sampling_correction: str | None = None,
    sampling_clip_max: float | None = 3.0, sampling_clip_min: float | None = None, temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
    score_inactive: bool = False, with_entropy: bool = False, schedule: str = "auto",
    workspace_bytes: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """BNPO's aggregation: the token mean over the batch at hand (arXiv 2506.02864).

    `group_advantages(estimator='bnpo')` gives its advantages.
    """
    objective = Objective(
        Clip(epsilon_low, epsilon_high, delta), kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against),
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation="bnpo",
    )  # fmt: skip
    rollouts = Rollouts(
        completion_ids, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps,
        completion_mask, cu_seqlens,
    )  # fmt: skip
    head = Head(lm_head_weight, lm_head_bias, logit_scale, softcap, temperature)
    plan = Plan(schedule, workspace_bytes, backend, score_inactive, with_entropy, validate)
    return policy_loss(hidden_states, head, rollouts, objective, plan)


def bnpo_loss_from_logps(
    per_token_logps: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, per_token_entropies: Tensor | None = None, epsilon_low: float = 0.2,
    epsilon_high: float | None = None, delta: float | None = None, beta: float = 0.0, kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False, kl_against: str = "reference", entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None, sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """`bnpo_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; see `policy_loss_from_logps`."""
    objective = Objective(
        Clip(epsilon_low, epsilon_high, delta), kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against),
        off_policy_mask_threshold=off_policy_mask_threshold, entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation="bnpo",
    )  # fmt: skip
    rollouts = Rollouts(
        None, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps, completion_mask,
        cu_seqlens,
    )  # fmt: skip
    return policy_loss_from_logps(
        per_token_logps, rollouts, objective, per_token_entropies=per_token_entropies, backend=backend, validate=validate
    )  # fmt: skip
