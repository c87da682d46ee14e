"""The losses for a trainer that already has log-probabilities: the same weigh operation, the same numbers."""

import torch
from rlvr_kernels.logits import accumulator_dtype
from torch import Tensor

from rlvr_ops import arguments
from rlvr_ops.aggregation import rollout_weights
from rlvr_ops.constants import Constants, Loss
from rlvr_ops.diagnostics import policy_metrics
from rlvr_ops.entropy import top_entropy, weighted_sum
from rlvr_ops.hyperparameters import Hyperparameters, SurrogateLike, make_hyperparameters
from rlvr_ops.layout import Layout
from rlvr_ops.schedules import LossOutput, weigh


def policy_loss_from_logps(
    per_token_logps: Tensor,
    advantages: Tensor,
    *,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None,
    per_token_entropies: Tensor | None = None,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    surrogate: SurrogateLike = "ppo_clip",
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
    backend: str = "auto",
    validate: bool = False,
) -> LossOutput:
    """`policy_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; the keywords mean the same.

    Differentiable in `per_token_logps` and in `per_token_entropies`, nats and shaped like them, which entropy_coef and
    top_entropy_quantile need. What a masked token holds, NaN included, never reaches the loss or a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> import torch
    >>> out = policy_loss_from_logps(torch.zeros(2, 3), torch.tensor([1.0, -1.0]), loss_type="dapo")
    >>> out.loss
    tensor(0.)
    """
    hyper = make_hyperparameters(
        surrogate=surrogate, importance_sampling_level=importance_sampling_level, epsilon_low=epsilon_low,
        epsilon_high=epsilon_high, delta=delta, alpha=alpha, confidence=confidence, confidence_reduction=confidence_reduction,
        shape=shape, beta=beta, kl_estimator=kl_estimator, use_bias_correction_kl=use_bias_correction_kl,
        entropy_coef=entropy_coef, top_entropy_quantile=top_entropy_quantile,
        off_policy_mask_threshold=off_policy_mask_threshold, sampling_correction=sampling_correction,
        sampling_clip_max=sampling_clip_max, sampling_clip_min=sampling_clip_min,
    )  # fmt: skip
    arguments.check_tensor("per_token_logps", per_token_logps)
    layout = arguments.make_layout("per_token_logps", per_token_logps, completion_mask, cu_seqlens)
    dtype, device = accumulator_dtype(per_token_logps.dtype), per_token_logps.device
    given = Constants.collect(
        layout, advantages, old_per_token_logps, ref_per_token_logps, sampling_per_token_logps, hyper, device, dtype,
        "per_token_logps",
    )  # fmt: skip
    entropy = _entropies(per_token_entropies, layout, hyper, device, dtype)
    if validate:
        arguments.check_all_finite(
            layout, per_token_logps=per_token_logps, advantages=advantages, old_per_token_logps=old_per_token_logps,
            ref_per_token_logps=ref_per_token_logps, sampling_per_token_logps=arguments.zero_where_nan(sampling_per_token_logps),
            per_token_entropies=per_token_entropies,
        )  # fmt: skip
    weights = rollout_weights(loss_type, layout, num_items_in_batch, max_completion_length, dtype)
    loss = Loss(layout, given, weights, hyper)
    kept = None
    if entropy is not None and top_entropy_quantile < 1:
        kept = top_entropy(entropy.detach(), layout.mask, top_entropy_quantile)
    logp = per_token_logps.reshape(-1).to(dtype)
    value, _coef, statistics = weigh(logp, layout.mask, loss, kept, backend)
    if entropy is not None and entropy_coef > 0:
        value = value - entropy_coef * weighted_sum(entropy, loss.row_weights(layout.mask, kept))
    metrics = policy_metrics(statistics, loss, None if entropy is None else entropy.detach(), layout.mask)
    return LossOutput(value, metrics, layout.zero_where_masked(per_token_logps.detach().reshape(-1)))


def _entropies(
    values: Tensor | None, layout: Layout, hyper: Hyperparameters, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """The entropies (R,), attached."""
    if values is None:
        if hyper.wants_entropy:
            name = "entropy_coef" if hyper.entropy_coef > 0 else "top_entropy_quantile"
            raise ValueError(
                f"per_token_entropies is missing, and {name} needs it: token_logps(with_entropy=True) gives it"
            )
        return None
    arguments.per_token("per_token_entropies", values, layout, "per_token_logps", device, dtype)
    return values.reshape(-1).to(dtype)
