"""The formulas of `group_advantages`, one function each: rewards (B,) and their groups to advantages (B,).

`group_advantages` has checked the values and made them float64 (float32 on MPS, which has no float64). An estimator that
compares rollouts returns exactly 0 where none differ, whatever rounding does to a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_ops.advantages.groups import Groups


def grpo(r: Tensor, groups: Groups, *, eps: float) -> Tensor:
    """(r - mean) / (std + eps)."""
    return torch.where(groups.told_apart(r), (r - groups.mean(r)) / (groups.std(r) + eps), 0.0)


def dr_grpo(r: Tensor, groups: Groups) -> Tensor:
    """r - mean."""
    return torch.where(groups.told_apart(r), r - groups.mean(r), 0.0)


def rloo(r: Tensor, groups: Groups) -> Tensor:
    """r minus the mean of the group's others."""
    others = (groups.sum(r) - r) / (groups.size() - 1)
    return torch.where(groups.told_apart(r), r - others, 0.0)


def lite_ppo(r: Tensor, groups: Groups, *, eps: float) -> Tensor:
    """r - the group's mean, divided by the batch's std + eps."""
    return torch.where(groups.told_apart(r), (r - groups.mean(r)) / (groups.batch().std(r) + eps), 0.0)


def gpg(r: Tensor, groups: Groups) -> Tensor:
    """r - mean, times the batch's rollouts over those in groups that are told apart."""
    apart = groups.told_apart(r)
    return dr_grpo(r, groups) * len(r) / apart.sum().clamp(min=1)


def grpo_passk(r: Tensor, groups: Groups, *, eps: float) -> Tensor:
    """(r - second largest) / (std + eps) for the best rollout, 0 for the others and where several are best."""
    best = r == groups.max(r)
    second = groups.max(r.masked_fill(best, -math.inf))
    return torch.where(best & (groups.sum(best.long()) == 1), (r - second) / (groups.std(r) + eps), 0.0)


def maxrl(r: Tensor, groups: Groups) -> Tensor:
    """(r - p) / p, p the pass rate."""
    return torch.where(groups.told_apart(r), r / groups.mean(r) - 1, 0.0)


def remax(r: Tensor, groups: Groups, *, reward_baselines: Tensor) -> Tensor:
    """r - the reward of the greedy completion."""
    return r - reward_baselines


def opo(r: Tensor, groups: Groups, *, lengths: Tensor) -> Tensor:
    """r - sum T r / sum T."""
    return torch.where(groups.told_apart(r), r - groups.weighted_mean(r, lengths), 0.0)


def oblr(r: Tensor, groups: Groups, *, squared_gradient_norms: Tensor) -> Tensor:
    """r - E[|g|^2 r] / E[|g|^2]."""
    return torch.where(groups.told_apart(r), r - groups.weighted_mean(r, squared_gradient_norms), 0.0)


def bnpo(r: Tensor, groups: Groups) -> Tensor:
    """(r - p) / Beta-pdf(p; a, b)."""
    rates = groups.mean_each(r)
    a, b = beta_of_rates(rates)
    normalizer = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    density = (normalizer + torch.xlogy(a - 1, rates) + torch.xlogy(b - 1, 1 - rates)).exp()
    scale = (1 / density).clamp(max=1e6)  # the published code's bound
    return torch.where(groups.told_apart(r), (r - rates[groups.index]) * scale[groups.index], 0.0)


def beta_of_rates(rates: Tensor) -> tuple[Tensor, Tensor]:
    """a = 1 + a0 / 3 and b = 1 + b0 / 3, where Beta(a0, b0) has the mean and sample variance of the pass rates (groups,).

    Both are at least 1, as in the published code. Equal rates, or a single group, say nothing about a distribution:
    a = b = 1, the uniform density, which makes `bnpo` the same as `dr_grpo`.
    """
    mean = rates.mean()
    variance = (rates - mean).square().sum() / max(len(rates) - 1, 1)
    varies = rates.amax() != rates.amin() if len(rates) else torch.zeros_like(mean, dtype=torch.bool)
    concentration = torch.where(varies, mean * (1 - mean) / variance - 1, 0.0)
    return (1 + concentration * mean / 3).clamp(min=1), (1 + concentration * (1 - mean) / 3).clamp(min=1)


def psr(r: Tensor, groups: Groups) -> Tensor:
    """1 where correct, else 0."""
    return r


def nsr(r: Tensor, groups: Groups) -> Tensor:
    """-1 where wrong, else 0."""
    return r - 1


def w_reinforce(r: Tensor, groups: Groups, *, positive_weight: float = 0.1) -> Tensor:
    """The positive weight where correct, -1 where wrong."""
    return positive_weight * r - (1 - r)


def paired(r: Tensor, groups: Groups, *, pairs: Groups, lambda_neg: float | Tensor, eps: float) -> Tensor:
    """(u - mean) / (std + eps) over the rollouts of both prompts, u = 1 where correct and -lambda_neg where wrong."""
    return grpo(r - lambda_neg * (1 - r), pairs, eps=eps)


def reinforce_plus_plus(r: Tensor, groups: Groups, *, lengths: Tensor | None = None) -> Tensor:
    """(r - mean) / sqrt(variance + 1e-8) over the batch, a rollout counted once a token if lengths are given."""
    batch = groups.batch()
    centred, variance = centre(r, batch, lengths)
    return torch.where(batch.told_apart(r), centred * torch.rsqrt(variance + 1e-8), 0.0)


def reinforce_plus_plus_baseline(r: Tensor, groups: Groups, *, lengths: Tensor | None = None) -> Tensor:
    """`reinforce_plus_plus` of r - the group's mean."""
    whitened = reinforce_plus_plus(dr_grpo(r, groups), groups, lengths=lengths)
    if lengths is not None:
        return whitened
    return torch.where(groups.told_apart(r), whitened, 0.0)  # over rollouts the batch's mean is 0, but for rounding


def centre(values: Tensor, batch: Groups, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values less the batch's mean, and the sample variance, a rollout counted once a token if lengths are given."""
    weights = torch.ones_like(values) if lengths is None else torch.where(lengths.sum() == 0, 1.0, lengths)
    total = weights.sum()
    centred = values - batch.weighted_mean(values, weights)
    return centred, batch.weighted_mean(centred.square(), weights) * total / (total - 1).clamp(min=1)


def lens(r: Tensor, groups: Groups, *, confidences: Tensor, negative_group_weight: float = 0.25, eps: float) -> Tensor:
    """`grpo` of the calibrated rewards; only centred, and weighted, in groups without a correct rollout."""
    calibrated = lens_rewards(r, groups, confidences)
    solved = groups.max(r) > 0
    return torch.where(solved, grpo(calibrated, groups, eps=eps), negative_group_weight * dr_grpo(calibrated, groups))


def lens_rewards(r: Tensor, groups: Groups, p: Tensor) -> Tensor:
    """r - (1 - r) / G p / (D - p), with D = max(G / sum(r / p), 2 max p), or 2 max p where nothing is correct."""
    evidence = groups.sum(r / p)
    importance = torch.where(evidence > 0, groups.size() / evidence, 0.0)
    difficulty = torch.maximum(importance, 2 * groups.max(p))
    return r - (1 - r) / groups.size() * p / (difficulty - p)


class Estimator(NamedTuple):
    """A formula, the arguments it needs, those it takes, whether rewards must be 0 or 1, and the smallest group it compares."""

    formula: Callable[..., Tensor]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    binary: bool = False
    smallest_group: int = 1


ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator(grpo, takes=("eps",)),
    "dr_grpo": Estimator(dr_grpo),
    "rloo": Estimator(rloo, smallest_group=2),
    "lite_ppo": Estimator(lite_ppo, takes=("eps",)),
    "gpg": Estimator(gpg),
    "grpo_passk": Estimator(grpo_passk, takes=("eps",), smallest_group=2),
    "maxrl": Estimator(maxrl, binary=True),
    "remax": Estimator(remax, needs=("reward_baselines",)),
    "opo": Estimator(opo, needs=("lengths",)),
    "bnpo": Estimator(bnpo, binary=True),
    "psr": Estimator(psr, binary=True),
    "nsr": Estimator(nsr, binary=True),
    "w_reinforce": Estimator(w_reinforce, takes=("positive_weight",), binary=True),
    "paired": Estimator(paired, needs=("pair_ids", "lambda_neg"), takes=("eps",), binary=True),
    "oblr": Estimator(oblr, needs=("squared_gradient_norms",)),
    "reinforce_plus_plus": Estimator(reinforce_plus_plus, takes=("lengths",)),
    "reinforce_plus_plus_baseline": Estimator(reinforce_plus_plus_baseline, takes=("lengths",)),
    "lens": Estimator(lens, needs=("confidences",), takes=("negative_group_weight", "eps"), binary=True),
}
