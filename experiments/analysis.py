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
RESAMPLES = 2000
LEAST_RANGE = 0.01
"""Two curves that share less than this of Pass@1 are not compared at equal Pass@1."""


def counts(row: dict[str, Any]) -> NDArray[np.int64]:
    """(evaluations, problems) right answers of a result."""
    return np.array([evaluation["correct"] for evaluation in row["rows"]])


def pass_rates(correct: NDArray[np.int64], samples: int, k: int) -> Array:
    """Pass@k of each entry, without bias."""
    table = np.array([pass_at_k(samples, c, k) for c in range(samples + 1)])
    return table[correct]


def at_equal_pass1(first: Array, second: Array) -> tuple[float, float]:
    """Mean Pass@64 of two curves over the Pass@1 that both go through; NaN if that is next to nothing.

    A curve is (evaluations, 2) of Pass@1 and Pass@64 along training. It counts where it reaches a Pass@1 for the first time,
    between evaluations by a straight line: the area under the curve, divided by its width.
    """
    low = max(first[0, 0], second[0, 0])
    high = min(first[:, 0].max(), second[:, 0].max())
    if high - low < LEAST_RANGE:
        return float("nan"), float("nan")
    grid = np.linspace(low, high, 65)
    return tuple(float(np.interp(grid, *_first_passage(curve)).mean()) for curve in (first, second))  # type: ignore[return-value]


def _first_passage(curve: Array) -> tuple[Array, Array]:
    """The points of a curve at which Pass@1 is higher than ever before."""
    best = np.maximum.accumulate(curve[:, 0])
    new = np.concatenate([[True], curve[1:, 0] > best[:-1]])
    return curve[new, 0], curve[new, 1]


@dataclass(frozen=True)
class Pairs:
    """Two arms on one task: the runs that share a seed, and so the initial policy, the problems and their order.

    Pass rates are (seeds, evaluations, problems), of one answer and of as many as were sampled.
    """

    one: tuple[Array, Array]
    other: tuple[Array, Array]


OUTCOMES: dict[str, Callable[[Array, Array], float]] = {
    "pass@1": lambda one, other: float(one[-1, 0] - other[-1, 0]),
    "pass@64": lambda one, other: float(one[-1, 1] - other[-1, 1]),
    "pass@64 at equal pass@1": lambda one, other: float(np.subtract(*at_equal_pass1(one, other))),
}
"""What is compared, from the (evaluations, 2) curves of two runs: at the last step, and along training."""


def pairs(results: Results, task: str, one: str, other: str) -> Pairs:
    """The pairs of two arms on a task that have been run."""
    seeds = sorted(c.seed for c in results if (c.task, c.arm) == (task, one) and Cell(task, other, c.seed) in results)

    def rates(arm: str) -> tuple[Array, Array]:
        if not seeds:
            return np.zeros((0, 0, 0)), np.zeros((0, 0, 0))
        correct = np.stack([counts(results[Cell(task, arm, seed)]) for seed in seeds])
        return pass_rates(correct, 64, 1), pass_rates(correct, 64, 64)

    return Pairs(rates(one), rates(other))


def differences(found: Pairs, problems: NDArray[np.int64] | None = None) -> Array:
    """(outcomes, seeds) of one arm minus the other, on all problems or on those of the given indices."""
    chosen = slice(None) if problems is None else problems
    one, other = (np.stack([rate[:, :, chosen].mean(-1) for rate in rates], -1) for rates in (found.one, found.other))
    return np.array([[outcome(*both) for both in zip(one, other, strict=True)] for outcome in OUTCOMES.values()])


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
    observed = [differences(task) for task in tasks]
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


def _deviations(task: Pairs, observed: Array, rng: np.random.Generator, resamples: int) -> Array:
    """(outcomes, resamples) of a task's mean over seeds, from the observed mean; 0 where a resample says nothing."""
    seeds, problems = observed.shape[1], task.one[0].shape[-1]
    widened = np.sqrt(seeds / max(seeds - 1, 1))
    found = np.zeros((len(OUTCOMES), resamples))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing
        for i in range(resamples):
            again = differences(task, rng.integers(problems, size=(problems,)))[:, rng.integers(seeds, size=(seeds,))]
            found[:, i] = widened * (np.nanmean(again, 1) - np.nanmean(observed, 1))
    return np.nan_to_num(found)


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
