"""trust_grpo_reward: a thinking reward that counts as far as it agrees with the outcomes of its group. O(B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlvr_ops.advantages.groups import check_like, make_groups
from rlvr_ops.rewards.judged import check_finite_rewards


def trust_grpo_reward(
    outcome_rewards: Tensor,
    thinking_rewards: Tensor,
    *,
    step: int,
    total_steps: int,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    alpha: float = 0.3,
) -> Tensor:
    """outcome + alpha gamma exp(-step / total_steps) thinking, (B,) (arXiv 2505.17018, equations 1 to 5).

    gamma is the group's trust in its thinking rewards: min(1, exp(mean thinking of the correct - mean of the wrong)),
    correct where outcome >= 0.5. Groups are given as in `group_advantages`. The paper leaves gamma undefined in a group that
    is all correct or all wrong; it is 0 there, as in the authors' code. That code also sets the thinking reward of clearly
    wrong answers to 0, which the paper does not mention: do so before the call if you want it. A constant to any gradient,
    in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> trust_grpo_reward(torch.tensor([1.0, 0.0]), torch.tensor([0.8, 0.2]), step=0, total_steps=100, group_size=2)
    tensor([1.2400, 0.0600])
    """
    outcome = check_finite_rewards("outcome_rewards", outcome_rewards)
    check_like("thinking_rewards", thinking_rewards, "outcome_rewards", outcome)
    thinking = check_finite_rewards("thinking_rewards", thinking_rewards).to(outcome.dtype)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
    if not total_steps >= 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not step >= 0:
        raise ValueError(f"step must be at least 0, got {step}")
    groups = make_groups("outcome_rewards", outcome, group_size, group_ids)
    right = (outcome >= 0.5).to(outcome.dtype)
    n_right, n_wrong = groups.sum(right), groups.sum(1 - right)
    mean_right = groups.sum(right * thinking) / n_right.clamp(min=1)
    mean_wrong = groups.sum((1 - right) * thinking) / n_wrong.clamp(min=1)
    gamma = torch.where((n_right > 0) & (n_wrong > 0), (mean_right - mean_wrong).clamp(max=0).exp(), 0)
    return outcome + alpha * math.exp(-step / total_steps) * gamma * thinking
