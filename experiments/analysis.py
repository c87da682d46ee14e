"""From results to numbers with intervals: Pass@k at equal steps, Pass@64 at equal Pass@1, paired differences.

Written before the runs; docs/reproduction.md has the plan that this carries out.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.plan import Cell
from rlvr_ops import pass_at_k

Array = NDArray[np.float64]
Results = dict[Cell, dict[str, Any]]
RESAMPLES = 10_000
LEAST_RANGE = 0.01
"""Two curves that share less than this of Pass@1 are not compared at equal Pass@1."""


def counts(row: dict[str, Any]) -> NDArray[np.int64]:
    """(evaluations, problems) right answers of a result."""
    return np.array([evaluation["correct"] for evaluation in row["rows"]])


def pass_rates(correct: NDArray[np.int64], samples: int, k: int) -> Array:
    """Pass@k of each entry, without bias."""
    table = np.array([pass_at_k(samples, c, k) for c in range(samples + 1)])
    return table[correct]


def at_equal_pass1(first: Array, second: Array) -> tuple[Array, Array]:
    """Mean Pass@64 of two curves over the Pass@1 that both go through; NaN if that is next to nothing.

    A curve is (..., evaluations, 2) of Pass@1 and Pass@64 along training. It counts where it reaches a Pass@1 for the first
    time, between evaluations by a straight line: the area under the curve, divided by its width.
    """
    low = np.maximum(first[..., 0, 0], second[..., 0, 0])
    width = np.minimum(first[..., 0].max(-1), second[..., 0].max(-1)) - low
    grid = low[..., None] + width[..., None] * np.linspace(0, 1, 65)
    means = (_interpolated(grid, *_first_passage(curve)).mean(-1) for curve in (first, second))
    one, other = (np.where(width >= LEAST_RANGE, mean, np.nan) for mean in means)
    return one, other


def _first_passage(curve: Array) -> tuple[Array, Array]:
    """The highest Pass@1 so far (..., evaluations), and the Pass@64 where it was reached."""
    best = np.maximum.accumulate(curve[..., 0], -1)
    new = np.diff(best, axis=-1, prepend=-1.0) > 0
    reached = np.maximum.accumulate(np.where(new, np.arange(best.shape[-1]), 0), -1)
    return best, np.take_along_axis(curve[..., 1], reached, -1)


def _interpolated(grid: Array, x: Array, y: Array) -> Array:
    """`numpy.interp` of each row: (..., points) on lines through (..., evaluations), x not falling."""
    left = ((x[..., None, :] <= grid[..., None]).sum(-1) - 1).clip(0, x.shape[-1] - 2)
    x0, x1, y0, y1 = (np.take_along_axis(values, left + i, -1) for values in (x, y) for i in (0, 1))
    share = np.divide(grid - x0, x1 - x0, out=np.zeros_like(grid), where=x1 > x0).clip(0, 1)
    return y0 + share * (y1 - y0)


@dataclass(frozen=True)
class Pairs:
    """Two arms on one task: the runs that share a seed, and so the initial policy, the problems and their order.

    Pass rates are (seeds, evaluations, problems), of one answer and of as many as were sampled.
    """

    one: tuple[Array, Array]
    other: tuple[Array, Array]


OUTCOMES: dict[str, Callable[[Array, Array], Array]] = {
    "pass@1": lambda one, other: one[..., -1, 0] - other[..., -1, 0],
    "pass@64": lambda one, other: one[..., -1, 1] - other[..., -1, 1],
    "pass@64 at equal pass@1": lambda one, other: np.subtract(*at_equal_pass1(one, other)),
}
"""What is compared, from the (..., evaluations, 2) curves of runs: at the last step, and along training."""


def pairs(results: Results, task: str, one: str, other: str) -> Pairs:
    """The pairs of two arms on a task that have been run."""
    seeds = sorted(c.seed for c in results if (c.task, c.arm) == (task, one) and Cell(task, other, c.seed) in results)

    def rates(arm: str) -> tuple[Array, Array]:
        if not seeds:
            return np.zeros((0, 0, 0)), np.zeros((0, 0, 0))
        correct = np.stack([counts(results[Cell(task, arm, seed)]) for seed in seeds])
        return pass_rates(correct, 64, 1), pass_rates(correct, 64, 64)

    return Pairs(rates(one), rates(other))


def differences(found: Pairs, weights: Array) -> Array:
    """(outcomes, draws, seeds) of one arm minus the other, for problems that weigh (draws, problems) of each draw."""
    one, other = (
        np.stack([np.einsum("dp,sep->dse", weights, rate, optimize=True) for rate in rates], -1)
        for rates in (found.one, found.other)
    )
    return np.array([outcome(one, other) for outcome in OUTCOMES.values()])


@dataclass(frozen=True)
class Difference:
    """A mean over tasks and seeds with its intervals.

    Attributes:
        low, high: of 95 %.
        low_corrected, high_corrected: of 95 % for all `family` comparisons at once, by Bonferroni.
        p: of the sign-flip test over pairs.
        runs: how many pairs it is from; where curves had nothing in common there was none.
    """

    mean: float
    low: float
    high: float
    low_corrected: float
    high_corrected: float
    p: float
    runs: int


def compare(tasks: Sequence[Pairs], family: int, resamples: int | None = None) -> dict[str, Difference]:
    """Each outcome's mean of the tasks' mean differences, by a hierarchical bootstrap over seeds and problems in each task.

    Both are drawn with replacement, the same problems for all seeds of a task, as they were the same. A bootstrap of S seeds
    has (S - 1)/S of the variance, so deviations from the mean are widened by sqrt(S / (S - 1)).
    """
    rng, resamples = np.random.default_rng(0), resamples or RESAMPLES
    observed = [differences(task, _alike(task))[:, 0] for task in tasks]
    drawn = [_deviations(task, values, rng, resamples) for task, values in zip(tasks, observed, strict=True)]
    levels = [0.025, 0.975, 0.025 / family, 1 - 0.025 / family]
    found = {}
    for i, outcome in enumerate(OUTCOMES):
        usable = [j for j, values in enumerate(observed) if not np.isnan(values[i]).all()]
        if not usable:
            nan = float("nan")
            found[outcome] = Difference(nan, nan, nan, nan, nan, nan, 0)
            continue
        mean = np.mean([np.nanmean(observed[j][i]) for j in usable])
        spread = np.mean([drawn[j][i] for j in usable], 0)
        low, high, low_all, high_all = (float(mean + np.quantile(spread, level)) for level in levels)
        every = np.concatenate([observed[j][i][~np.isnan(observed[j][i])] for j in usable])
        found[outcome] = Difference(float(mean), low, high, low_all, high_all, sign_flip(every, rng), len(every))
    return found


def _alike(task: Pairs) -> Array:
    """(1, problems): each problem once."""
    problems = task.one[0].shape[-1]
    return np.full((1, problems), 1 / problems)


def _deviations(task: Pairs, observed: Array, rng: np.random.Generator, resamples: int) -> Array:
    """(outcomes, resamples) of a task's mean over seeds, from the observed mean; 0 where a resample says nothing."""
    seeds, problems = observed.shape[1], task.one[0].shape[-1]
    weights = rng.multinomial(problems, _alike(task)[0], resamples) / problems
    drawn = rng.integers(seeds, size=(1, resamples, seeds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing
        again = np.nanmean(np.take_along_axis(differences(task, weights), drawn, -1), -1)
        return np.sqrt(seeds / max(seeds - 1, 1)) * np.nan_to_num(again - np.nanmean(observed, 1)[:, None])


def sign_flip(values: Array, rng: np.random.Generator, flips: int = 20_000) -> float:
    """How often random signs give a mean as far from 0 as the observed one: a two-sided p, exact up to 2^14 sign patterns."""
    n = len(values)
    if 2**n <= flips:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12))
    signs = rng.choice([-1, 1], size=(flips, n))
    return float((1 + np.sum(np.abs(signs @ values) >= abs(values.sum()) - 1e-12)) / (1 + flips))


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    found, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        found[i] = largest
    return found
