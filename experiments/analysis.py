"""From results to numbers with intervals: Pass@k at equal steps, Pass@64 at equal Pass@1, paired differences.

It carries out the plan of docs/reproduction.md, which also lists what was amended after the first runs.
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
    """The pairs of two arms on a task that have been run.

    Raises:
        ValueError: they were run on different problems.
    """
    seeds = sorted(c.seed for c in results if (c.task, c.arm) == (task, one) and Cell(task, other, c.seed) in results)
    for seed in seeds:
        if len({results[Cell(task, arm, seed)]["fingerprint"] for arm in (one, other)}) > 1:
            raise ValueError(f"{task}/{one}/{seed} and {task}/{other}/{seed} were not run on the same problems")

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


Interval = tuple[float, float]
NOTHING = float("nan"), float("nan")


@dataclass(frozen=True)
class Difference:
    """A mean over tasks and seeds with its intervals.

    Intervals and p are NaN if a task has fewer than two pairs that say something.

    Attributes:
        interval: of 95 %, over seeds and problems.
        corrected: of 95 % for all `family` comparisons at once, by Bonferroni.
        given_problems: for all at once as well, but of these problems alone: the differences that `sign_flip` does not reject.
        p: of the sign-flip test over pairs.
        said, pairs: how many pairs it is from, and how many there are; where curves had nothing in common one says nothing.
    """

    mean: float
    interval: Interval
    corrected: Interval
    given_problems: Interval
    p: float
    said: int
    pairs: int


def compare(tasks: Sequence[Pairs], family: int, resamples: int | None = None) -> dict[str, Difference]:
    """Each outcome's mean of the tasks' mean differences, by a hierarchical bootstrap over seeds and problems in each task.

    Both are drawn with replacement, the same problems for all seeds of a task, as they were the same. A bootstrap of S seeds
    has (S - 1)/S of their variance, so deviations from the mean are widened by sqrt(S / (S - 1)). Drawing both counts what is
    peculiar to one seed on one problem three times, so the interval is conservative: up to sqrt(3) times too wide where that
    is all there is (Owen, 2007, The pigeonhole bootstrap). The interval given the problems counts it once.
    """
    rng, resamples = np.random.default_rng(0), resamples or RESAMPLES
    each = [_resampled(task, rng, resamples) for task in tasks]
    return {
        outcome: _difference([tuple(part[i] for part in task) for task in each], family, rng)
        for i, outcome in enumerate(OUTCOMES)
    }


def _difference(tasks: Sequence[tuple[Array, ...]], family: int, rng: np.random.Generator) -> Difference:
    """Of one outcome, from each task's `_resampled`."""
    observed = [values for values, _ in tasks]
    values = [one[~np.isnan(one)] for one in observed]
    said, total = sum(map(len, values)), sum(map(len, observed))
    mean = float(np.mean([one.mean() for one in values if len(one)])) if said else float("nan")
    if min(map(len, values)) < 2:
        return Difference(mean, NOTHING, NOTHING, NOTHING, float("nan"), said, total)
    deviations, every = np.mean([drawn for _, drawn in tasks], 0), np.concatenate(values)
    return Difference(
        mean,
        _interval(mean, deviations, 0.05),
        _interval(mean, deviations, 0.05 / family),
        not_rejected(every, 0.05 / family, rng),
        sign_flip(every, rng),
        said,
        total,
    )


def _interval(mean: float, deviations: Array, outside: float) -> Interval:
    low, high = (mean + np.quantile(deviations, [outside / 2, 1 - outside / 2])).tolist()
    return low, high


def _resampled(task: Pairs, rng: np.random.Generator, resamples: int) -> tuple[Array, Array]:
    """(outcomes, seeds) as observed, and (outcomes, resamples) deviations of their mean."""
    problems = task.one[0].shape[-1]
    alike = np.full(problems, 1 / problems)
    observed = differences(task, alike[None])[:, 0]
    drawn = differences(task, rng.multinomial(problems, alike, resamples) / problems)
    return observed, np.array([_deviations(*both, rng) for both in zip(drawn, observed, strict=True)])


def _deviations(values: Array, observed: Array, rng: np.random.Generator) -> Array:
    """(resamples,) of the mean of seeds drawn from those with an observed difference; 0 where a resample says nothing.

    values: (resamples, seeds).
    """
    said = ~np.isnan(observed)
    among, n = values[:, said], int(said.sum())
    if n < 2:
        return np.zeros(len(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing
        means = np.nanmean(np.take_along_axis(among, rng.integers(n, size=among.shape), 1), 1)
    return np.sqrt(n / (n - 1)) * np.nan_to_num(means - observed[said].mean())


def sign_flip(values: Array, rng: np.random.Generator) -> float:
    """How often random signs give a mean as far from 0 as the observed one: a two-sided p, exact up to 2^14 sign patterns."""
    return _share_as_far(values, _signs(len(values), rng), 0.0)


def not_rejected(values: Array, level: float, rng: np.random.Generator) -> Interval:
    """The means that `sign_flip` does not reject at a level: infinite if the pairs are too few to reject any."""
    signs = _signs(len(values), rng)
    if _share_as_far(values, signs, values.min() - 1) > level:
        return -np.inf, np.inf

    def end(outside: float) -> float:
        inside = values.mean()
        for _ in range(40):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if _share_as_far(values, signs, middle) > level else (inside, middle)
        return float(inside)

    return end(values.min() - 1), end(values.max() + 1)


def _signs(n: int, rng: np.random.Generator, flips: int = 20_000) -> Array:
    """(patterns, n): all patterns of signs if they are no more than `flips`, else so many at random, and that of no flip."""
    if 2**n <= flips:
        return np.where((np.arange(2**n)[:, None] >> np.arange(n)) & 1, -1.0, 1.0)
    return np.concatenate([np.ones((1, n)), rng.choice([-1.0, 1.0], size=(flips, n))])


def _share_as_far(values: Array, signs: Array, middle: float) -> float:
    """Of the patterns of signs, those whose sum is as far from 0 as that of the values less `middle`."""
    return float(np.mean(np.abs(signs @ (values - middle)) >= abs((values - middle).sum()) - 1e-12))


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
