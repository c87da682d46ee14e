"""ace_advantages: ACE as a re-weighting of advantages, for a trainer that takes advantages and nothing else."""

import torch
from rlvr_kernels.checks import check_tensor
from rlvr_kernels.logits import accumulator_dtype
from rlvr_kernels.objective import Ace
from torch import Tensor

from rlvr_ops.rollouts import make_layout, per_rollout_or_token, per_token


def ace_advantages(
    advantages: Tensor,
    per_token_logps: Tensor,
    ref_per_token_logps: Tensor,
    completion_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    alpha: float = 1.0,
    confidence_reduction: str = "mean",
    shape: str = "softplus",
) -> Tensor:
    """A (1 + alpha f(c)) where A < 0 and A elsewhere, shaped like `advantages`, (B,) or one per token (arXiv 2602.21420).

    c is each rollout's mean (or sum) of per_token_logps - ref_per_token_logps over its unmasked tokens. `per_token_logps` come
    from the policy whose confidence counts: the one in training, or the one that sampled. A constant to any gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> ref = torch.full((2, 4), -1.0)
    >>> ace_advantages(torch.tensor([1.0, -1.0]), ref, ref)
    tensor([ 1.0000, -1.6931])
    """
    ace = Ace(alpha, "current", confidence_reduction, shape)
    check_tensor("per_token_logps", per_token_logps)
    check_tensor("ref_per_token_logps", ref_per_token_logps)
    layout = make_layout("per_token_logps", per_token_logps, completion_mask, cu_seqlens)
    device, dtype = per_token_logps.device, accumulator_dtype(per_token_logps.dtype)
    ref: Tensor = per_token("ref_per_token_logps", ref_per_token_logps, layout, "per_token_logps", device, dtype)  # type: ignore[assignment]
    per_rollout_or_token("advantages", advantages, layout, device, dtype)
    advantages = advantages.to(device)
    gap = layout.zero_where_masked(per_token_logps.detach().reshape(-1).to(dtype) - ref).reshape(-1)
    weight = ace.weight(ace.shift(layout.per_rollout(gap), layout.tokens()))
    if advantages.shape != (layout.rollouts,):
        weight = weight[layout.rollout()].view(layout.shape)
    return torch.where(advantages < 0, (advantages * weight).to(advantages.dtype), advantages).detach()
