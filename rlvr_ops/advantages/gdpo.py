"""gdpo_advantages: several rewards a rollout (B, K), each normalised in its group before they are added. O(B K)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from rlvr_kernels.checks import check_tensor
from rlvr_kernels.logits import sum_dtype
from torch import Tensor

from rlvr_ops.advantages import inputs
from rlvr_ops.advantages.estimators import centre, grpo
from rlvr_ops.advantages.groups import Groups, make_groups


def gdpo_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    reward_weights: Sequence[float] | None = None,
    lengths: Tensor | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """Advantage of every rollout from its K rewards: `grpo` of each, their weighted sum, normalised over the batch.

    x = sum_k w_k (r_k - mean_k) / (std_k + eps) in a group, then (x - mean) / (std + eps) over the batch, with sample
    deviations (GDPO, arXiv 2601.05242 and its code). Adding rewards first, as GRPO does, gives rollouts of equal sums one
    advantage, and lets the reward that varies most decide. It compares prompts, so pass the whole batch at once.

    `rewards` is (B, K), grouped as in `group_advantages`. `reward_weights` are K numbers, 1 by default. With `lengths` (B,)
    in tokens a rollout counts once a token in the batch's mean and deviation, as in verl; without, once, as in TRL, and in
    NeMo-RL with use_leave_one_out_baseline off. eps is 1e-4 in TRL and 1e-6 in the others. Groups that differ in no reward
    get exactly 0, unless `lengths` move the mean. A constant to any gradient, in the dtype of floating `rewards`, else
    float32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted; the rollout of a NaN or inf reward.

    >>> gdpo_advantages(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 2, eps=0.0)
    tensor([ 1.2247, -1.2247,  0.0000,  0.0000])
    """
    check_tensor("rewards", rewards, floating=False)
    if rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards must have shape (B, K), K rewards per rollout, got {tuple(rewards.shape)}")
    groups = make_groups("rewards", rewards[:, 0], group_size, group_ids)
    for k, column in enumerate(rewards.unbind(1)):
        inputs.check_finite(f"rewards[:, {k}]", column, group_size, group_ids)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0, got {eps}")
    wide = rewards.detach().to(sum_dtype(rewards.device))
    weights = _check_weights(reward_weights, rewards.shape[1])
    tokens = None if lengths is None else inputs.prepare("lengths", lengths, rewards[:, 0], wide.dtype)
    total = sum(
        (weight * grpo(column, groups, eps=eps) for weight, column in zip(weights, wide.unbind(1), strict=True)),
        start=torch.zeros_like(wide[:, 0]),
    )
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    return _over_batch(total, groups, tokens, eps).to(dtype) + 0.0  # -0.0 + 0.0 is 0.0


def _check_weights(weights: Sequence[float] | None, count: int) -> Sequence[float]:
    weights = [1.0] * count if weights is None else weights
    if len(weights) != count:
        raise ValueError(f"reward_weights must have K = {count} numbers, one per column of rewards, got {len(weights)}")
    for weight in weights:
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"reward_weights must be finite numbers, got {weight!r}")
    return weights


def _over_batch(total: Tensor, groups: Groups, lengths: Tensor | None, eps: float) -> Tensor:
    """(total - mean) / (std + eps) over the batch; exactly 0 where nothing differs."""
    batch = groups.batch()
    centred, variance = centre(total, batch, lengths)
    compared = groups if lengths is None else batch  # over rollouts the mean is 0, since it is 0 in every group
    return torch.where(compared.told_apart(total), centred / (variance.sqrt() + eps), 0.0)
