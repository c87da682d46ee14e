"""Pass@k without bias, and how far to trust a mean over problems."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

__all__ = ["bootstrap_interval", "paired_bootstrap_interval", "pass_at_k"]


def pass_at_k(n: Any, c: Any, k: int) -> Any:
    """Probability that at least one of k answers is correct, from n sampled answers of which c are: without bias.

    1 - C(n - c, k) / C(n, k) (arXiv 2107.03374), the chance that k of the n drawn without replacement hit one of the
    c. The tempting 1 - (1 - c/n)^k is biased. Summed as k logarithms, so that n of a million is fine.

    `n` and `c` are whole numbers, giving a float; or one or both are tensors, arrays or lists that broadcast against
    each other (one entry per problem), giving a float64 tensor. Average over the problems yourself.

    Raises:
        ValueError: k below 1 or above n, c below 0 or above n, numbers that are not whole.

    >>> round(pass_at_k(4, 1, 2), 9)
    0.5
    """
    scalar = isinstance(n, Integral) and isinstance(c, Integral)
    n_all, c_all = torch.broadcast_tensors(_whole("n", n), _whole("c", c))
    if k < 1 or int(k) != k:
        raise ValueError(f"k must be a whole number of at least 1, got {k}.")
    k = int(k)
    _refuse(n_all < k, n_all, f"n must be at least k = {k} (draw more answers per problem)")
    _refuse(c_all < 0, c_all, "c must not be negative")
    _refuse(c_all > n_all, c_all, "c must not be above n (no more correct answers than answers)")
    wrong = n_all - c_all
    # prod_{j<k} (n - c - j) / (n - j), each factor 1 - c / (n - j); a factor of 0 (fewer wrong answers than k) ends it.
    log_miss = torch.zeros_like(n_all)
    for j in range(k):
        log_miss += torch.log1p(-c_all / (n_all - j)).where(wrong > j, -torch.inf)
    result = -torch.expm1(log_miss)
    return result.item() if scalar else result


def bootstrap_interval(
    values: Sequence[float] | Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval for the mean of `values`, one value per problem, by resampling the problems.

    The same seed gives the same interval on every machine with the same torch. It says how much the choice of
    problems moves the mean; several training runs need several seeds, and this knows nothing of them.

    >>> bootstrap_interval([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    v = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if v.ndim != 1 or len(v) == 0:
        raise ValueError(f"values must have shape (problems,) with at least one problem, got {tuple(v.shape)}.")
    if not bool(torch.isfinite(v).all()):
        raise ValueError(f"values must be finite, got {v[~torch.isfinite(v)][0].item()}.")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}.")
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.float64)
    rows = max(1, 2**22 // len(v))  # resamples at a time, so that memory does not grow with their number
    for start in range(0, resamples, rows):
        part = means[start : start + rows]
        part.copy_(v[torch.randint(len(v), (len(part), len(v)), generator=generator)].mean(dim=1))
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def paired_bootstrap_interval(
    before: Sequence[float] | Tensor,
    after: Sequence[float] | Tensor,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval for mean(after - before), where entry i of both is the same problem.

    Pairing takes out how hard each problem is, so the interval is narrower than the two means' intervals suggest:
    the gain is significant at `level` when the low end is above 0.

    >>> paired_bootstrap_interval([0.0, 0.5], [0.25, 0.75])
    (0.25, 0.25)
    """
    b = torch.as_tensor(before, dtype=torch.float64)
    a = torch.as_tensor(after, dtype=torch.float64)
    if b.shape != a.shape:
        raise ValueError(
            "before and after must have one value for each of the same problems,"
            f" got {tuple(b.shape)} and {tuple(a.shape)}."
        )
    return bootstrap_interval(a - b, level=level, resamples=resamples, seed=seed)


def _whole(name: str, values: Any) -> Tensor:
    given = torch.as_tensor(values)
    exact = given.to(torch.float64)
    if given.dtype == torch.bool or not bool((exact == exact.round()).all()):
        raise ValueError(f"{name} must hold whole numbers, got {values}.")
    return exact


def _refuse(bad: Tensor, values: Tensor, message: str) -> None:
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{message}, got {int(values[bad][0])}{f' for problem {at[0]}' if at else ''}.")
