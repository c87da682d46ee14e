"""pass_at_k, without the bias of plugging a pass rate into 1 - (1 - rate)^k. O(k) per problem."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from rlvr_kernels.checks import check_tensor
from torch import Tensor


def pass_at_k(n: Any, c: Any, k: int) -> Any:
    """Probability that at least one of k answers is correct, given that c of n sampled answers are (arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k): the chance that k of the n, drawn without replacement, include one of the c. Computed as a sum
    of k logarithms, accurate for n of a million.

    `n` and `c` are whole numbers, and the result a float; or tensors, arrays or lists with one entry per problem, which
    broadcast, and the result is a float64 tensor. Average over the problems yourself. A constant to any gradient.

    Raises:
        ValueError: k below 1 or above n, c below 0 or above n, numbers that are not whole.

    >>> round(pass_at_k(4, 1, 2), 9)
    0.5
    """
    scalar = isinstance(n, Integral) and isinstance(c, Integral)
    device = next((x.device for x in (n, c) if isinstance(x, Tensor)), None)
    n_all, c_all = torch.broadcast_tensors(_whole("n", n, device), _whole("c", c, device))
    if k < 1 or int(k) != k:
        raise ValueError(f"k must be a whole number of at least 1, got {k}")
    k = int(k)
    _refuse(n_all < k, n_all, f"n must be at least k = {k} (draw more answers per problem)")
    _refuse(c_all < 0, c_all, "c must not be negative")
    _refuse(c_all > n_all, c_all, "c must not be above n (no more correct answers than answers)")
    # A miss has probability prod_{j<k} (n - c - j) / (n - j). With fewer wrong answers than k a factor is 0.
    log_miss = torch.zeros_like(n_all)
    wrong = n_all - c_all
    for j in range(k):
        log_miss += torch.log1p(-c_all / (n_all - j)).where(wrong > j, -torch.inf)
    result = 0 - torch.expm1(log_miss)  # -expm1 would be -0.0 where c is 0
    return result.item() if scalar else result


def _whole(name: str, values: Any, device: torch.device | None) -> Tensor:
    """The whole numbers as float64 constants; numbers and lists become tensors on the device."""
    given = values if isinstance(values, Tensor) else torch.as_tensor(values, device=device)
    check_tensor(name, given, floating=False)
    exact = given.detach().to(torch.float64)
    if given.dtype == torch.bool or not bool((exact == exact.round()).all()):
        raise ValueError(f"{name} must hold whole numbers, got {values}")
    return exact


def _refuse(bad: Tensor, values: Tensor, message: str) -> None:
    """Raise at the first bad value, naming its problem."""
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{message}, got {int(values[bad][0])}{f' for problem {at[0]}' if at else ''}")
