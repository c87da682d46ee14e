"""How far to trust a mean over problems: percentile bootstrap intervals. O(resamples x problems), in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rlvr_kernels.checks import check_tensor
from torch import Tensor

CHUNK = 2**22  # values drawn at a time


def bootstrap_interval(
    values: Sequence[float] | Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) for the mean of `values` (problems,), resampling the problems.

    The same seed gives the same interval wherever torch has the same version. The interval says how much the choice of
    problems moves the mean. It knows nothing of the spread between training runs, which takes several of them. Both
    ends are floats, a constant to any gradient.

    Raises:
        ValueError: values empty or not finite, level outside of (0, 1), resamples below 1.

    >>> bootstrap_interval([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    v = _on_the_host("values", values)
    if v.ndim != 1 or len(v) == 0:
        raise ValueError(f"values must have shape (problems,) with at least one problem, got {tuple(v.shape)}")
    if not bool(torch.isfinite(v).all()):
        raise ValueError(f"values must be finite, got {v[~torch.isfinite(v)][0].item()}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}")
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.float64)
    for part in means.split(max(1, CHUNK // len(v))):
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
    """Percentile bootstrap interval (low, high) for mean(after - before), entry i of both the same problem.

    Pairing removes how hard each problem is, so this interval is narrower than the intervals of the two means suggest. The
    gain is significant at `level` when the low end is above 0. Both ends are floats, a constant to any
    gradient.

    Raises:
        ValueError: as for `bootstrap_interval`, or before and after of different shapes.

    >>> paired_bootstrap_interval([0.0, 0.5], [0.25, 0.75])
    (0.25, 0.25)
    """
    b, a = _on_the_host("before", before), _on_the_host("after", after)
    if b.shape != a.shape:
        raise ValueError(
            "before and after must have one value for each of the same problems,"
            f" got {tuple(b.shape)} and {tuple(a.shape)}"
        )
    return bootstrap_interval(a - b, level=level, resamples=resamples, seed=seed)


def _on_the_host(name: str, values: Sequence[float] | Tensor) -> Tensor:
    """The values as float64 constants on the CPU."""
    if isinstance(values, Tensor):
        check_tensor(name, values, floating=False)
        values = values.detach().cpu()
    return torch.as_tensor(values, dtype=torch.float64) + 0.0  # -0.0 + 0.0 is 0.0
