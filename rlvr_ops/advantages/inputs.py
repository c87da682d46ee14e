"""What `group_advantages` checks of an estimator's arguments, and the form its formula takes them in."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from torch import Tensor

from rlvr_ops.advantages.estimators import ESTIMATORS, Estimator
from rlvr_ops.advantages.groups import Groups, check_ids, check_like, make_groups

OTHER_NAMES = {
    "reinforce++": "reinforce_plus_plus",
    "rf++": "reinforce_plus_plus",
    "reinforce_pp": "reinforce_plus_plus",
}
FUNCTIONS = {
    "gdpo": "gdpo_advantages",
    "optimal_token_baseline": "otb_advantages",
    "tir_optimal_token_baseline": "otb_advantages",
}
"""What has a function of its own, under verl's names."""


def look_up(name: str) -> Estimator:
    """The estimator of that name."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    given = str(name).lower()
    near = [OTHER_NAMES[given]] if given in OTHER_NAMES else difflib.get_close_matches(given, ESTIMATORS, 1, 0.7)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    hint = f": use {FUNCTIONS[given]}" if given in FUNCTIONS else hint
    raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}{hint}")


def check_given(name: str, chosen: Estimator, given: dict[str, Any], eps: float) -> None:
    """Raise where the estimator lacks an argument or would ignore one."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0, got {eps}")
    for argument, value in given.items():
        if value is None and argument in chosen.needs:
            raise ValueError(f"{argument} is needed by estimator {name!r}")
        if value is not None and argument not in chosen.needs + chosen.takes:
            users = [n for n, e in ESTIMATORS.items() if argument in e.needs + e.takes]
            raise ValueError(f"{argument} is for estimator {' or '.join(users)}, not {name}: drop it")


def check_rewards(name: str, chosen: Estimator, rewards: Tensor) -> None:
    """Raise unless an estimator of verdicts got zeros and ones."""
    if chosen.binary and bool(((rewards != 0) & (rewards != 1)).any()):
        raise ValueError(
            f"rewards must hold only 0 and 1: estimator {name!r} needs what the verifier said, not a shaped reward"
        )


def check_sizes(name: str, chosen: Estimator, groups: Groups, group_size: int | None, group_ids: Tensor | None) -> None:
    """Raise where a group is smaller than the estimator can compare."""
    least = chosen.smallest_group
    rule = f"estimator {name!r} compares a rollout with its group's others:"
    if group_size is not None and group_size < least:
        raise ValueError(f"{rule} group_size must be {least} or more, got {group_size}")
    if group_ids is not None and least > 1 and bool((groups.size() < least).any()):
        alone = int((groups.size() < least).nonzero()[0])
        raise ValueError(
            f"{rule} every group needs {least} or more, group {int(group_ids[alone])} has {int(groups.size()[alone])}"
        )


def check_finite(name: str, values: Tensor, group_size: int | None = None, group_ids: Tensor | None = None) -> None:
    """Raise at a NaN or infinite value of (B,), naming its rollout and, where known, its group."""
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    worst = int((~finite).nonzero()[0])
    where = f"rollout {worst}"
    if group_size is not None:
        where += f" (group {worst // group_size})"
    elif group_ids is not None:
        where += f" (group {int(group_ids[worst])})"
    hint = ": did its verifier fail, or could a confidence not be read?" if name.startswith("rewards") else ""
    raise ValueError(f"{name} must be finite, got {values[worst].item()} for {where}{hint}")


def prepare(name: str, value: Any, rewards: Tensor, dtype: torch.dtype) -> Any:
    """The checked argument: a number or ids unchanged, other values (B,) in the dtype of the arithmetic."""
    if name == "pair_ids":
        return check_ids(name, value, "rewards", rewards)
    if not isinstance(value, Tensor):
        if name in ("lengths", "squared_gradient_norms", "confidences", "reward_baselines"):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        return value
    if name in ("positive_weight", "negative_group_weight"):
        raise TypeError(f"{name} must be a number, got a tensor")
    check_like(name, value, "rewards", rewards)
    check_finite(name, value)
    if name == "reward_baselines":
        return value.detach().to(dtype)
    outside = (value <= 0) | (value > 1) if name == "confidences" else value < 0
    if bool(outside.any()):
        worst = int(outside.nonzero()[0])
        wanted = "be probabilities above 0" if name == "confidences" else "not be negative"
        raise ValueError(f"{name} must {wanted}, got {value[worst].item()} for rollout {worst}")
    return value.detach().to(dtype)


def make_pairs(pair_ids: Tensor, groups: Groups) -> Groups:
    """The pairs as groups of rollouts; raise unless every pair has two groups."""
    pairs = make_groups("pair_ids", pair_ids, None, pair_ids)
    first = groups.min_each(pairs.index)
    if bool((first != groups.max_each(pairs.index)).any()):
        raise ValueError("pair_ids must be equal for all rollouts of a group, got a group in two pairs")
    held = Groups(first, pairs.count).size_each()
    if bool((held != 2).any()):
        wrong = int((held != 2).nonzero()[0])
        label = int(pair_ids[(pairs.index == wrong).nonzero()[0, 0]])
        raise ValueError(f"pair_ids must give every pair two groups, got {int(held[wrong])} for pair {label}")
    return pairs
