"""ppo_c_reward: a reward model's score, raised or lowered by the confidence stated with it. O(B)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_ops.advantages.groups import check_like
from rlvr_ops.checks import check_all_tensors
from rlvr_ops.rewards.judged import check_confidences, check_finite_rewards


class PPOCRewards(NamedTuple):
    """The calibrated rewards (B,), and the running mean () to pass to the next call."""

    rewards: Tensor
    running_mean: Tensor


def ppo_c_reward(
    rewards: Tensor,
    confidences: Tensor,
    running_mean: float | Tensor,
    *,
    weight: float = 0.5,
    ema: float = 0.1,
) -> PPOCRewards:
    """r + weight |r| (q - 0.5) where r is at least the running mean, r - weight |r| (q - 0.5) below it (arXiv 2410.09724).

    Confidence pays for answers better than usual and costs for others. `rewards` (B,) are a reward model's, for the answers
    without their stated confidence; `confidences` (B,) are in [0, 1]. You keep the running mean: pass what the last call
    returned. As in the authors' code it first takes in this batch's mean with weight `ema`, and is then compared with. There
    it starts at the reward model's mean reward, and rewards are clamped to [-10, 10] beforehand.

    NaN where q is NaN, though the reward still counts in the mean. The authors use q = 0.5 there, which leaves r unchanged:
    pass `confidences.nan_to_num(nan=0.5)`. Both results are a constant to any gradient, in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> ppo_c_reward(torch.tensor([2.0, -2.0]), torch.tensor([1.0, 1.0]), 0.0)
    PPOCRewards(rewards=tensor([ 2.5000, -2.5000]), running_mean=tensor(0.))
    """
    r = check_finite_rewards("rewards", rewards)
    if not len(r):
        raise ValueError("rewards must hold at least one reward, got none")
    q = check_confidences(confidences, may_be_nan=True)
    check_like("confidences", q, "rewards", r)
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be at least 0 and finite, got {weight}")
    if not 0 <= ema <= 1:
        raise ValueError(f"ema must lie in [0, 1], got {ema}")
    check_all_tensors(running_mean=running_mean if isinstance(running_mean, Tensor) else None)
    before = torch.as_tensor(running_mean, dtype=r.dtype, device=r.device).detach()
    if before.ndim or not bool(before.isfinite()):
        raise ValueError(f"running_mean must be one finite number, got {running_mean}")
    mean = ema * r.mean() + (1 - ema) * before + 0.0  # -0.0 + 0.0 is 0.0
    change = weight * r.abs() * (q.to(r.dtype) - 0.5)
    return PPOCRewards(torch.where(r >= mean, r + change, r - change), mean)
