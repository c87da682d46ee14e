"""Advantages from the rewards of a group of rollouts, and the reward shaping and group selection around them."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

__all__ = ["ESTIMATORS", "group_advantages", "informative_groups", "overlong_penalty"]

ESTIMATORS = ("grpo", "dr_grpo", "rloo")


def group_advantages(rewards: Tensor, group_size: int, estimator: str = "grpo", *, eps: float = 1e-4) -> Tensor:
    """Advantage of every rollout over the other rollouts of its prompt.

    `rewards` is (B,), the G rollouts of a prompt next to each other. With r a group's rewards:

    - `grpo`     (r - mean) / (std + eps), std the sample standard deviation (arXiv 2402.03300)
    - `dr_grpo`  r - mean (arXiv 2503.20783)
    - `rloo`     r minus the mean of the group's other rewards, which is G / (G - 1) (r - mean) (arXiv 2402.14740)

    A group whose rewards are all equal teaches nothing and gets exactly 0, whatever rounding does to its mean. So
    does a group of one under `grpo` and `dr_grpo`; `rloo` has nobody to compare it with and refuses. Statistics are
    taken in float32 at least, and the result has the dtype of floating `rewards`, float32 for whole numbers.

    Raises:
        ValueError: a wrong rank or length, a NaN or inf reward, an unknown estimator, eps below 0.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "dr_grpo")
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    _check_rewards(rewards, group_size)
    if estimator not in ESTIMATORS:
        near = difflib.get_close_matches(str(estimator), ESTIMATORS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}.{hint}")
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}.")
    if estimator == "rloo" and group_size < 2:
        raise ValueError(
            "estimator 'rloo' compares a rollout with its group's others: group_size must be 2 or more, got 1."
        )
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    r = rewards.detach().to(torch.promote_types(dtype, torch.float32)).reshape(-1, group_size)
    advantages = r - r.mean(dim=1, keepdim=True)
    if estimator == "rloo":
        advantages = advantages * (group_size / (group_size - 1))
    elif estimator == "grpo" and group_size > 1 and len(r) > 0:
        advantages = advantages / (r.std(dim=1, keepdim=True) + eps)
    told_apart = (r != r[:, :1]).any(dim=1, keepdim=True)
    return advantages.where(told_apart, 0.0).reshape(-1).to(dtype)


def informative_groups(correct: Tensor, group_size: int) -> Tensor:
    """Say for each group of rollouts whether some but not all are correct: (B,) bool or 0/1 -> (B / G,) bool.

    The others have advantage 0 throughout; DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) replaces them.

    >>> informative_groups(torch.tensor([1, 0, 1, 1]), 2)
    tensor([ True, False])
    """
    _check_rewards(correct, group_size, name="correct")
    if bool(((correct != 0) & (correct != 1)).any()):
        raise ValueError("correct must hold only 0 and 1: give what the verifier said, not the shaped reward.")
    solved = (correct != 0).reshape(-1, group_size)
    return solved.any(dim=1) & ~solved.all(dim=1)


def overlong_penalty(lengths: Tensor, *, max_length: int, cache: int) -> Tensor:
    """What DAPO adds to the reward of a rollout of that many tokens (arXiv 2503.14476, equation 13).

    0 up to `max_length - cache` tokens, then falling in a straight line to -1 at `max_length`, and -1 beyond it.
    Unlike its source, which leaves `cache = 0` undefined, that means no slope: 0 up to `max_length`, -1 beyond.

    >>> overlong_penalty(torch.tensor([10, 90, 95, 100]), max_length=100, cache=10)
    tensor([ 0.0000,  0.0000, -0.5000, -1.0000])
    """
    if not 0 <= cache <= max_length:
        raise ValueError(f"cache must lie between 0 and max_length = {max_length}, got {cache}.")
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a torch.Tensor, got {type(lengths).__name__}.")
    if lengths.numel() and bool((lengths < 0).any()):
        raise ValueError(f"lengths must not be negative, got {lengths.min().item()}.")
    dtype = lengths.dtype if lengths.is_floating_point() else torch.float32
    room = (max_length - cache - lengths).to(dtype)
    if cache == 0:
        return torch.zeros_like(room).masked_fill(room < 0, -1.0)
    return (room / cache).clamp(-1.0, 0.0)


def _check_rewards(rewards: Tensor, group_size: int, name: str = "rewards") -> None:
    if not isinstance(rewards, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(rewards).__name__}.")
    if not isinstance(group_size, int):
        raise TypeError(f"group_size must be a whole number, got {group_size!r}.")
    if group_size < 1:
        raise ValueError(f"group_size must be 1 or more, got {group_size}.")
    if rewards.ndim != 1:
        raise ValueError(f"{name} must have shape (B,), one per rollout, got {tuple(rewards.shape)}.")
    if len(rewards) % group_size:
        raise ValueError(
            f"{name} must have a multiple of group_size = {group_size} entries, one per rollout, got {len(rewards)}."
        )
    if rewards.is_floating_point() and not bool(torch.isfinite(rewards).all()):
        worst = int((~torch.isfinite(rewards)).nonzero()[0])
        raise ValueError(
            f"{name} must be finite, got {rewards[worst].item()} for rollout {worst}"
            f" (group {worst // group_size}): did its verifier fail?"
        )
