"""Advantages from the rewards of a group of rollouts, and the reward shaping and group selection around them."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from torch import Tensor

from rlvr_ops import estimators
from rlvr_ops.groups import Groups, check_finite, check_ids, check_like, make_groups

__all__ = ["ESTIMATORS", "easy_but_brittle", "group_advantages", "informative_groups", "overlong_penalty"]

ESTIMATORS = tuple(estimators.ESTIMATORS)


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    estimator: str = "grpo",
    *,
    group_ids: Tensor | None = None,
    eps: float = 1e-4,
    lengths: Tensor | None = None,
    squared_gradient_norms: Tensor | None = None,
    confidences: Tensor | None = None,
    pair_ids: Tensor | None = None,
    lambda_neg: float | Tensor | None = None,
    positive_weight: float | None = None,
    negative_group_weight: float | None = None,
) -> Tensor:
    """Advantage of every rollout over the other rollouts of its prompt.

    `rewards` is (B,). Say which of them share a prompt by `group_size`, the G rollouts of a prompt next to each other,
    or by `group_ids` (B,), whole numbers of any value, for groups of any sizes in any order. With r a group's rewards,
    G their number and r 0 or 1 where a * stands:

    - `grpo`          (r - mean) / (std + eps), std the sample standard deviation (arXiv 2402.03300). eps = 1e-4 is TRL's,
                      verl's is 1e-6; this matters where rewards hardly differ.
    - `dr_grpo`       r - mean (arXiv 2503.20783)
    - `rloo`          r minus the mean of the group's other rewards, which is G / (G - 1) (r - mean) (arXiv 2402.14740)
    - `opo`           r - sum(T r) / sum(T), T the rollout's tokens: needs `lengths` (arXiv 2505.23585)
    - `bnpo` *        (r - p) / Beta-pdf(p; a, b), p the pass rate, a and b from the mean and variance of the batch's pass
                      rates (arXiv 2506.02864 and its code). Compares prompts: give the whole batch at once. Where
                      all pass rates are equal, or there is one group, a = b = 1 and this is `dr_grpo`. Not TRL's `bnpo`,
                      which is a way to aggregate a loss.
    - `psr` *         r; `nsr` * r - 1; `w_reinforce` * positive_weight r - (1 - r), positive_weight 0.1 unless given.
                      No baseline and no normalisation (arXiv 2506.01347).
    - `paired` *      (u - mean) / (std + eps) over the rollouts of two prompts, u = 1 where correct and -lambda_neg where
                      wrong: needs `pair_ids` (B,), equal for the two groups of a pair, and `lambda_neg` (arXiv
                      2602.03452, weighted GRPO, from a reading note; neither the value nor the normalisation is verified).
                      One number for both prompts cancels in the normalisation, as any affine map of r does, up to eps;
                      one per rollout (B,) does not, say 0 on the hard prompt and more on the easy one.
    - `oblr`          r - sum(w r) / sum(w), w the squared norm of the rollout's grad log pi: needs
                      `squared_gradient_norms` (B,), which `squared_gradient_norms` estimates (arXiv 2511.23310, the form
                      of its baseline derived, not read; its learning rate is not here)
    - `reinforce_plus_plus`  (r - mean) / sqrt(var + 1e-8) over the batch (arXiv 2501.03262). With `lengths` a rollout
                      counts once a token, as verl whitens; without, once. Give the whole batch at once.
    - `lens` *        GRPO of the calibrated rewards r - (1 - r) / G p / (D - p), with p = `confidences` (B,), the rollout's
                      length-normalised probability exp(mean logp) under the policy that sampled, and
                      D = max(G / sum(r / p), 2 max p). Groups without a correct rollout are only centred, and weigh
                      negative_group_weight, 0.25 unless given (arXiv 2510.08696, section 5.1). Equation 14 there writes
                      the sum with the plain probability, which underflows; p is used here.

    Where there is nothing to compare, all but `psr`, `nsr` and `w_reinforce` give exactly 0, whatever rounding does to a
    mean: equal rewards in a group (for `lens` calibrated ones; in a pair for `paired`; in the batch for
    `reinforce_plus_plus`). So does a group of one, but `rloo` refuses it. Weights that are 0 throughout a group count
    alike. What an estimator does not use is refused, `eps` excepted. Computed in float64 and a constant to any
    gradient; the result has the dtype of floating `rewards`, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted; for a NaN or inf reward its rollout.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "dr_grpo")
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    >>> group_advantages(torch.tensor([1.0, 4.0, 0.0]), group_ids=torch.tensor([7, 3, 7]), estimator="rloo")
    Traceback (most recent call last):
    ValueError: estimator 'rloo' compares a rollout with its group's others: every group needs 2 or more, group 3 has 1.
    """
    groups = _check(rewards, "rewards", group_size, group_ids)
    chosen = _look_up(estimator)
    given = {
        "lengths": lengths,
        "squared_gradient_norms": squared_gradient_norms,
        "confidences": confidences,
        "pair_ids": pair_ids,
        "lambda_neg": lambda_neg,
        "positive_weight": positive_weight,
        "negative_group_weight": negative_group_weight,
    }
    _check_given(estimator, chosen, given, eps)
    if chosen.binary:
        _check_binary(rewards, "rewards", f"estimator {estimator!r} needs what the verifier said, not a shaped reward")
    if chosen.smallest_group > 1:
        _check_sizes(estimator, groups, chosen.smallest_group, group_size, group_ids)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    r = rewards.detach().to(torch.float32 if rewards.device.type == "mps" else torch.float64)
    inputs = {name: _input(name, value, rewards, r.dtype) for name, value in given.items() if value is not None}
    if "pair_ids" in inputs:
        inputs["pairs"] = _make_pairs(inputs.pop("pair_ids"), groups)
    if "eps" in chosen.takes:
        inputs["eps"] = eps
    return chosen.formula(r, groups, **inputs).to(dtype)


def informative_groups(correct: Tensor, group_size: int | None = None, *, group_ids: Tensor | None = None) -> Tensor:
    """Say for each group of rollouts whether some but not all are correct: (B,) bool or 0/1 -> (groups,) bool.

    The others have advantage 0 throughout; DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) replaces them. With
    `group_ids` the groups come in ascending order of their ids, as torch.unique gives them.

    >>> informative_groups(torch.tensor([1, 0, 1, 1]), 2)
    tensor([ True, False])
    """
    groups = _check(correct, "correct", group_size, group_ids)
    _check_binary(correct, "correct", "give what the verifier said, not the shaped reward")
    return groups.told_apart_each((correct != 0).long())


def easy_but_brittle(
    correct: Tensor, group_size: int | None = None, *, group_ids: Tensor | None = None, c: float
) -> Tensor:
    """Say for each group whether it is nearly solved: pass rate in [1 - c / G, 1 - 1 / G], which is 1 to c failures.

    (B,) bool or 0/1 -> (groups,) bool, in the order of `informative_groups`. These are the prompts that arXiv 2602.03452
    pairs with hard ones for estimator `paired`. Its c is not verified, so there is no default.

    >>> easy_but_brittle(torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1]), 4, c=2)
    tensor([ True, False, False])
    """
    groups = _check(correct, "correct", group_size, group_ids)
    _check_binary(correct, "correct", "give what the verifier said, not the shaped reward")
    if not c >= 1:
        raise ValueError(f"c must be at least 1, the failures a group may have, got {c!r}.")
    failures = groups.sum_each((correct == 0).long())
    return (failures >= 1) & (failures <= c)


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


def _check(values: Tensor, name: str, group_size: int | None, group_ids: Tensor | None) -> Groups:
    """The groups of rewards (B,) that are finite."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}.")
    groups = make_groups(name, values, group_size, group_ids)
    check_finite(name, values, group_size, group_ids)
    return groups


def _check_binary(values: Tensor, name: str, hint: str) -> None:
    if bool(((values != 0) & (values != 1)).any()):
        raise ValueError(f"{name} must hold only 0 and 1: {hint}.")


def _look_up(name: str) -> estimators.Estimator:
    if name in ESTIMATORS:
        return estimators.ESTIMATORS[name]
    if str(name).lower() in ("reinforce++", "rf++", "reinforce_pp"):
        near = ["reinforce_plus_plus"]
    else:
        near = difflib.get_close_matches(str(name), ESTIMATORS, n=1, cutoff=0.7)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}.{hint}")


def _check_given(name: str, chosen: estimators.Estimator, given: dict[str, Any], eps: float) -> None:
    """Raise where an estimator misses an argument or would ignore one."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0, got {eps}.")
    for argument, value in given.items():
        if value is None and argument in chosen.needs:
            raise ValueError(f"{argument} is needed by estimator {name!r}.")
        if value is not None and argument not in chosen.needs + chosen.takes:
            users = [n for n, e in estimators.ESTIMATORS.items() if argument in e.needs + e.takes]
            raise ValueError(f"{argument} is for estimator {' or '.join(users)}, not {name}: drop it.")


def _check_sizes(name: str, groups: Groups, least: int, group_size: int | None, group_ids: Tensor | None) -> None:
    rule = f"estimator {name!r} compares a rollout with its group's others:"
    if group_size is not None and group_size < least:
        raise ValueError(f"{rule} group_size must be {least} or more, got {group_size}.")
    if group_ids is not None and bool((groups.size() < least).any()):
        alone = int((groups.size() < least).nonzero()[0])
        raise ValueError(
            f"{rule} every group needs {least} or more, group {int(group_ids[alone])} has {int(groups.size()[alone])}."
        )


def _input(name: str, value: Any, rewards: Tensor, dtype: torch.dtype) -> Any:
    """A number as it is, ids as they are, other values (B,) in the dtype of the arithmetic, each checked."""
    if name == "pair_ids":
        return check_ids(name, value, "rewards", rewards)
    if not isinstance(value, Tensor):
        if name in ("lengths", "squared_gradient_norms", "confidences"):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")
        return value
    if name in ("positive_weight", "negative_group_weight"):
        raise TypeError(f"{name} must be a number, got a tensor.")
    check_like(name, value, "rewards", rewards)
    check_finite(name, value)
    low = value <= 0 if name == "confidences" else value < 0
    high = value > 1 if name == "confidences" else torch.zeros_like(low)
    if bool((low | high).any()):
        worst = int((low | high).nonzero()[0])
        wanted = "be probabilities above 0" if name == "confidences" else "not be negative"
        raise ValueError(f"{name} must {wanted}, got {value[worst].item()} for rollout {worst}.")
    return value.detach().to(dtype)


def _make_pairs(pair_ids: Tensor, groups: Groups) -> Groups:
    pairs = make_groups("pair_ids", pair_ids, None, pair_ids)
    first = groups.min_each(pairs.index)
    if bool((first != groups.max_each(pairs.index)).any()):
        raise ValueError("pair_ids must be equal for all rollouts of a group, got a group in two pairs.")
    held = Groups(first, pairs.count).size_each()
    if bool((held != 2).any()):
        wrong = int((held != 2).nonzero()[0])
        label = int(pair_ids[(pairs.index == wrong).nonzero()[0, 0]])
        raise ValueError(f"pair_ids must give every pair two groups, got {int(held[wrong])} for pair {label}.")
    return pairs
