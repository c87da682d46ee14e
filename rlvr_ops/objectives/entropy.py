"""What a loss makes of entropies: the sum in its bonus, and the tokens of highest entropy."""

import torch
from torch import Tensor


def top_tokens(entropy: Tensor, active: Tensor | None, share: float) -> Tensor | None:
    """The tokens (R,) whose entropy is at least the (1 - share) quantile of the active ones' (2506.01939); None for all.

    The quantile is interpolated between neighbours, as torch.quantile does, without its limit of 2^24 values.
    """
    if share == 1:
        return None
    active = torch.ones_like(entropy, dtype=torch.bool) if active is None else active
    if not entropy.shape[0]:
        return active
    last = (active.sum() - 1).clamp(min=0)
    position = (1 - share) * last.double()
    below = position.long()
    values = entropy.masked_fill(~active, float("inf")).sort().values  # no shape depends on a count: no host sync
    low, high = values.gather(0, torch.stack([below, torch.minimum(below + 1, last)])).unbind()
    return active & (entropy >= low + (high - low) * (position - below).to(low.dtype))


def weighted_sum(entropy: Tensor, row_weights: Tensor) -> Tensor:
    """Sum entropies (R,) times row_weights (R,). Entries of weight 0 are ignored, NaN included."""
    return torch.where(row_weights == 0, 0, entropy * row_weights).sum()
