"""crew_reward: the mean probability of a rollout's final answer. O(N)."""

from __future__ import annotations

from torch import Tensor

from rlvr_ops.rewards.token_confidence import mean_probability


def crew_reward(per_token_logps: Tensor, answer_mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean probability of the tokens of a rollout's final answer, where `answer_mask` is 1, (B,) (arXiv 2510.13501).

    `per_token_logps` is (B, T), or packed (N,) with `cu_seqlens`, in nats; the mask has its shape. NaN for a rollout in
    which no answer was found. The reward is for being sure, right or not: the paper ranks and filters with it, and trains
    on it together with correctness. A constant to any gradient, in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> crew_reward(torch.tensor([[0.1, 0.5, 1.0], [0.1, 0.2, 0.3]]).log(), torch.tensor([[0, 1, 1], [0, 0, 0]]))
    tensor([0.7500,    nan])
    """
    return mean_probability("per_token_logps", per_token_logps, "answer_mask", answer_mask, cu_seqlens)
