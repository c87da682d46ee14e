"""Rewards that look at confidence, not only at the answer: pure functions from verdicts and confidences (B,) to (B,).

A NaN confidence is an answer whose confidence could not be read (`stated_confidences`). It is never a silent 0: the reward
is NaN, which `group_advantages` refuses by name, unless the paper itself says what such an answer is worth. All rewards
are constants to any gradient, in float32 or, for float64 inputs, float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_ops.confidence import mean_probability
from rlvr_ops.groups import check_like, make_groups
from rlvr_ops.judged import check_confidences, check_correct, check_finite_rewards

__all__ = ["PPOCRewards", "crew_reward", "ppo_c_reward", "prompt4trust_reward", "rlcr_reward", "trust_grpo_reward"]


class PPOCRewards(NamedTuple):
    """The calibrated rewards (B,), and the running mean to give to the next call."""

    rewards: Tensor
    running_mean: Tensor


def rlcr_reward(correct: Tensor, confidences: Tensor) -> Tensor:
    """1[correct] - (q - 1[correct])^2 with q the stated confidence: correctness and Brier score (arXiv 2507.16806).

    In [-1, 1]; for either verdict the best q is the true probability. NaN where q is NaN. The authors' code gives such an
    answer what is the least here, whether it is correct or not: `reward.nan_to_num(nan=-1.0)`. (It adds 1 to every other
    one, and asks for more of the format than a readable confidence.)

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> rlcr_reward(torch.tensor([1, 1, 0]), torch.tensor([1.0, 0.5, 1.0]))
    tensor([ 1.0000,  0.7500, -1.0000])
    """
    q, y = _judged(correct, confidences)
    return y - (q - y).square()


def crew_reward(per_token_logps: Tensor, answer_mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean probability of the tokens of a rollout's final answer, whose mask is 1 on them alone (arXiv 2510.13501).

    `per_token_logps` is (B, T), or packed (N,) with `cu_seqlens`, in nats. NaN for a rollout in which no answer was
    found. It rewards being sure, right or not: the paper ranks and filters with it, and trains on it together with
    correctness.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> crew_reward(torch.tensor([[0.1, 0.5, 1.0], [0.1, 0.2, 0.3]]).log(), torch.tensor([[0, 1, 1], [0, 0, 0]]))
    tensor([0.7500,    nan])
    """
    return mean_probability("per_token_logps", per_token_logps, "answer_mask", answer_mask, cu_seqlens)


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
    """outcome + alpha gamma exp(-step / total_steps) thinking, gamma the group's trust in its thinking rewards.

    gamma = min(1, exp(mean thinking reward of the correct - of the wrong)), correct where outcome >= 0.5: a thinking
    reward that prefers wrong answers is trusted less (arXiv 2505.17018, equations 1 to 5). Groups as in
    `group_advantages`. In a group that is all correct or all wrong gamma has no meaning in the paper; it is 0, as in the
    authors' code. That code also gives clearly wrong answers a thinking reward of 0, which the paper does not: pass it so if
    you want it.

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


def ppo_c_reward(
    rewards: Tensor,
    confidences: Tensor,
    running_mean: float | Tensor,
    *,
    weight: float = 0.5,
    ema: float = 0.1,
) -> PPOCRewards:
    """r + weight |r| (q - 0.5) where r is at least the running mean, and r - weight |r| (q - 0.5) below it.

    Confidence pays off for answers better than usual and costs for others (PPO-C, arXiv 2410.09724). `rewards` (B,) are a
    reward model's for the answers without their stated confidence; `confidences` (B,) are in [0, 1]. The running mean
    is state that you keep: pass what the last call returned. As in the authors' code it takes in this batch's mean first,
    with weight `ema`, and what it then is decides; there it begins as the reward model's mean reward, and rewards are
    clamped to [-10, 10] before. NaN where q is NaN, though the reward still counts in the mean; the authors take 0.5 there,
    which leaves r as it is: `confidences.nan_to_num(nan=0.5)`.

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
    before = torch.as_tensor(running_mean, dtype=r.dtype, device=r.device).detach()
    if before.ndim or not bool(before.isfinite()):
        raise ValueError(f"running_mean must be one finite number, got {running_mean}")
    mean = ema * r.mean() + (1 - ema) * before
    change = weight * r.abs() * (q.to(r.dtype) - 0.5)
    return PPOCRewards(torch.where(r >= mean, r + change, r - change), mean)


def prompt4trust_reward(correct: Tensor, confidences: Tensor) -> Tensor:
    """log q if correct, log(1 - q) - 1 if wrong, log 1e-12 where q is NaN: the logarithmic score (arXiv 2507.09279).

    In nats, at most 0, and below -1 for a wrong answer. q and 1 - q are taken as at least 1e-10, as in the authors' code, so
    nothing readable is worth less than an unreadable confidence. (Their first versions lack the -1.)

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> prompt4trust_reward(torch.tensor([1, 0, 1]), torch.tensor([0.5, 0.5, float("nan")]))
    tensor([ -0.6931,  -1.6931, -27.6310])
    """
    q, y = _judged(correct, confidences)
    stated = torch.where(y == 1, q, 1 - q).clamp(min=1e-10).log() - (1 - y)
    return torch.where(q.isnan(), math.log(1e-12), stated)


def _judged(correct: Tensor, confidences: Tensor) -> tuple[Tensor, Tensor]:
    q = check_confidences(confidences, may_be_nan=True)
    return q, check_correct(correct, "confidences", q).to(q.dtype)
