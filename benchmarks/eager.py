"""The losses in eager PyTorch with full logits, as someone who cares about speed would write them."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus


def logps_by_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (B, T) in float32: PyTorch's own fused log-softmax and gather."""
    logits = (hidden @ weight.T).float()
    return -cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="none").view(ids.shape)


def logps_by_logsumexp(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (B, T) in float32: the target's logit less the log-sum-exp."""
    logits = (hidden @ weight.T).float()
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def clipped_loss(logp: Tensor, old: Tensor, advantages: Tensor, ref: Tensor | None) -> Tensor:
    """GRPO's loss, mean over rollouts of token means; ACE's if `ref` is given. No masked tokens."""
    if ref is not None:
        shift = (logp.detach() - ref).mean(dim=1)
        advantages = torch.where(advantages < 0, advantages * (1 + softplus(shift)), advantages)
    ratio = torch.exp(logp - old)
    advantages = advantages[:, None]
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean(dim=1).mean()
