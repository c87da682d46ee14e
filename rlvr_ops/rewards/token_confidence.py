"""How sure a policy is of a whole rollout: means over its tokens, (B, T) or packed (N,) to (B,). O(N)."""

from __future__ import annotations

from torch import Tensor

from rlvr_ops.checks import active_logps, active_values, check_all_tensors
from rlvr_ops.rollouts import make_layout


def mean_token_probability(
    per_token_logps: Tensor, completion_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mean of exp(logp) over a rollout's unmasked tokens, (B,): a confidence in [0, 1].

    `per_token_logps` is (B, T), or packed (N,) with `cu_seqlens`, in nats; rounding may leave it a hair above 0, which
    counts as 0. This is not exp of the mean, which one unlikely token ruins. NaN for a rollout without a token. A constant
    to any gradient, in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> mean_token_probability(torch.tensor([[0.5, 1.0, 0.1]]).log(), torch.tensor([[1, 1, 0]]))
    tensor([0.7500])
    """
    return mean_probability("per_token_logps", per_token_logps, "completion_mask", completion_mask, cu_seqlens)


def mean_self_certainty(
    self_certainty: Tensor, completion_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mean over a rollout's unmasked tokens of `token_logps(..., with_self_certainty=True).self_certainty`, (B,).

    In nats, 0 for uniform distributions and without an upper bound (arXiv 2502.18581). It orders rollouts under one policy
    and is not a probability. `self_certainty` is (B, T), or packed (N,) with `cu_seqlens`. NaN for a rollout without a
    token. A constant to any gradient, in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> mean_self_certainty(torch.tensor([1.0, 3.0, 5.0]), cu_seqlens=torch.tensor([0, 2, 3]))
    tensor([2., 5.])
    """
    values, counts = active_values("self_certainty", self_certainty, "completion_mask", completion_mask)
    return _mean(values, counts, cu_seqlens)


def mean_probability(
    name: str, per_token_logps: Tensor, mask_name: str, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """`mean_token_probability` of arguments by any name."""
    logps, counts = active_logps(name, per_token_logps, mask_name, mask)
    return _mean(logps.exp() * counts, counts, cu_seqlens)


def _mean(values: Tensor, counts: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """sum / count of every rollout, (B,), of values that are 0 where they do not count; 0 / 0 is NaN."""
    check_all_tensors(cu_seqlens=cu_seqlens)
    layout = make_layout("the per-token values", values, None, cu_seqlens)
    return layout.per_rollout(values.flatten()) / layout.per_rollout(counts.flatten().long())
