"""The losses for a trainer that already has log-probabilities: the same weigh operation, the same numbers."""

from rlvr_kernels.logits import accumulator_dtype
from torch import Tensor

from rlvr_ops import arguments, ops
from rlvr_ops.aggregation import rollout_weights
from rlvr_ops.diagnostics import policy_metrics
from rlvr_ops.losses import Constants, LossOutput, make_spec


def policy_loss_from_logps(
    per_token_logps: Tensor,
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
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> LossOutput:
    """`policy_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; the keywords mean the same.

    Differentiable in `per_token_logps`. What a masked token holds, NaN included, never reaches the loss or a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> import torch
    >>> out = policy_loss_from_logps(torch.zeros(2, 3), torch.tensor([1.0, -1.0]), loss_type="dapo")
    >>> out.loss
    tensor(0.)
    """
    spec = make_spec(
        alpha, confidence, confidence_reduction, shape, epsilon_low, epsilon_high, delta, beta, kl_estimator
    )
    arguments.check_tensor("per_token_logps", per_token_logps)
    layout = arguments.make_layout("per_token_logps", per_token_logps, completion_mask, cu_seqlens)
    dtype = accumulator_dtype(per_token_logps.dtype)
    old, ref = old_per_token_logps, ref_per_token_logps
    given = Constants.collect(layout, advantages, old, ref, spec, per_token_logps.device, dtype, "per_token_logps")
    if validate:
        for name, values in (
            ("per_token_logps", per_token_logps),
            ("advantages", advantages),
            ("old_per_token_logps", old),
            ("ref_per_token_logps", ref),
        ):
            arguments.check_finite(name, values, layout)
    weights = rollout_weights(loss_type, layout, num_items_in_batch, max_completion_length, dtype)
    losses, _coef, statistics = ops.weigh(
        per_token_logps.reshape(-1).to(dtype), given.old, given.ref, given.advantages, layout.mask, layout.cu_seqlens, weights,
        ops.encode(spec), backend,
    )  # fmt: skip
    metrics = policy_metrics(statistics, spec, given.ref is not None, None, layout.mask)
    return LossOutput(losses.sum(), metrics, layout.zero_where_masked(per_token_logps.detach().reshape(-1)))
