"""Rewards that are proper scoring rules: the best confidence to state is the true one. Verdicts and confidences (B,), O(B).

A NaN confidence means that none could be read (`stated_confidences`). It never counts as 0: the reward is NaN, which
`group_advantages` refuses by name, unless the paper says what it is worth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlvr_ops.rewards.judged import check_confidences, check_correct


def rlcr_reward(correct: Tensor, confidences: Tensor) -> Tensor:
    """1[correct] - (q - 1[correct])^2 with q the stated confidence: correctness and Brier score (arXiv 2507.16806).

    In [-1, 1]. NaN where q is NaN; the authors' code gives such an answer the least reward, correct or not:
    `reward.nan_to_num(nan=-1.0)`. (Their code adds 1 to every other reward, and asks for more of the format than a readable
    confidence.) A constant to any gradient, in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> rlcr_reward(torch.tensor([1, 1, 0]), torch.tensor([1.0, 0.5, 1.0]))
    tensor([ 1.0000,  0.7500, -1.0000])
    """
    q, y = _judged(correct, confidences)
    return y - (q - y).square()


def prompt4trust_reward(correct: Tensor, confidences: Tensor) -> Tensor:
    """log q if correct, log(1 - q) - 1 if wrong, log 1e-12 where q is NaN: the logarithmic score (arXiv 2507.09279).

    In nats, at most 0, and at most -1 for a wrong answer. q and 1 - q are clamped to 1e-10 from below, as in the authors'
    code, so every readable confidence is worth more than an unreadable one. (Their first versions lack the -1.) A constant
    to any gradient, in float32 or wider.

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
