"""overlong_penalty: DAPO's soft punishment of long rollouts."""

from __future__ import annotations

import torch
from rlvr_kernels.checks import check_tensor
from rlvr_kernels.logits import sum_dtype
from torch import Tensor


def overlong_penalty(lengths: Tensor, *, max_length: int, cache: int) -> Tensor:
    """What DAPO adds to the reward of a rollout of `lengths` tokens, in [-1, 0] (arXiv 2503.14476, equation 13).

    0 up to `max_length - cache` tokens, then a straight line down to -1 at `max_length`, and -1 beyond. The source leaves
    `cache = 0` undefined; here it is a step from 0 to -1 after `max_length`.

    `lengths` has any shape. The result has its shape, and its dtype if that is floating, else float32. Differentiable in
    floating `lengths`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> overlong_penalty(torch.tensor([10, 90, 95, 100]), max_length=100, cache=10)
    tensor([ 0.0000,  0.0000, -0.5000, -1.0000])
    """
    if not 0 <= cache <= max_length:
        raise ValueError(f"cache must lie between 0 and max_length = {max_length}, got {cache}")
    check_tensor("lengths", lengths, floating=False)
    if bool((~(lengths >= 0)).any()):  # NaN too
        raise ValueError(f"lengths must not be negative, got {lengths.min().item()}")
    dtype = lengths.dtype if lengths.is_floating_point() else torch.float32
    room = max_length - cache - lengths.to(sum_dtype(lengths.device))
    if cache == 0:
        return torch.zeros_like(room, dtype=dtype).masked_fill(room < 0, -1.0)
    return (room / cache).clamp(-1.0, 0.0).to(dtype) + 0.0  # -0.0 + 0.0 is 0.0
