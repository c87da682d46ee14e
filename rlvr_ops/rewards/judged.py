"""What rewards and calibration metrics check: verdicts of 0 and 1, confidences in [0, 1], finite rewards, all (B,)."""

from __future__ import annotations

import torch
from rlvr_kernels.checks import check_finite, check_tensor
from torch import Tensor

from rlvr_ops.checks import check_verdicts


def check_confidences(confidences: Tensor, *, may_be_nan: bool) -> Tensor:
    """The confidences (B,) as constants in float32 or wider. NaN, an answer without one, passes only if `may_be_nan`."""
    check_tensor("confidences", confidences)
    if confidences.ndim != 1:
        raise ValueError(f"confidences must have shape (B,), one per answer, got {tuple(confidences.shape)}")
    values = confidences.detach().to(torch.promote_types(confidences.dtype, torch.float32))
    if not may_be_nan and bool(values.isnan().any()):
        raise ValueError(
            f"confidences must not be NaN, got NaN at {int(values.isnan().nonzero()[0])}: "
            "leave answers without a confidence out, and say how many"
        )
    outside = (values < 0) | (values > 1)
    if bool(outside.any()):
        worst = int(outside.nonzero()[0])
        raise ValueError(f"confidences must lie in [0, 1], got {float(values[worst]):g} at {worst}")
    return values


def check_correct(correct: Tensor, like_name: str, like: Tensor) -> Tensor:
    """The verdicts as bool, one for each entry of `like`."""
    check_tensor("correct", correct, like.device, floating=False)
    if correct.shape != like.shape:
        raise ValueError(
            f"correct must have shape {tuple(like.shape)} like {like_name}, one verdict for each, got {tuple(correct.shape)}"
        )
    check_verdicts("correct", correct)
    return correct == 1


def check_finite_rewards(name: str, rewards: Tensor) -> Tensor:
    """The rewards (B,) as constants in float32 or wider."""
    check_tensor(name, rewards)
    if rewards.ndim != 1:
        raise ValueError(f"{name} must have shape (B,), one per rollout, got {tuple(rewards.shape)}")
    check_finite(name, rewards)
    return rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32)) + 0.0  # -0.0 + 0.0 is 0.0
