"""Which groups are worth training on: verdicts (B,) to one bool per group. O(B)."""

from __future__ import annotations

from torch import Tensor

from rlvr_ops.advantages.groups import Groups, make_groups
from rlvr_ops.checks import check_verdicts


def informative_groups(correct: Tensor, group_size: int | None = None, *, group_ids: Tensor | None = None) -> Tensor:
    """Whether some but not all rollouts of each group are correct: (B,) bool or 0/1 to (groups,) bool.

    The other groups have advantage 0 throughout; DAPO's dynamic sampling replaces them (arXiv 2503.14476, section 3.2).
    With `group_ids` the groups come in ascending order of their ids. A constant to any gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> informative_groups(torch.tensor([1, 0, 1, 1]), 2)
    tensor([ True, False])
    """
    groups = _check(correct, group_size, group_ids)
    return groups.told_apart_each((correct != 0).long())


def easy_but_brittle(
    correct: Tensor, group_size: int | None = None, *, group_ids: Tensor | None = None, c: float
) -> Tensor:
    """Whether each group has 1 to c failures, a pass rate in [1 - c / G, 1 - 1 / G]: (B,) bool or 0/1 to (groups,) bool.

    arXiv 2602.03452 pairs these prompts with hard ones for estimator `paired`. Its c is not verified, so there is no
    default. Groups come in the order of `informative_groups`. A constant to any gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> easy_but_brittle(torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1]), 4, c=2)
    tensor([ True, False, False])
    """
    groups = _check(correct, group_size, group_ids)
    if not c >= 1:
        raise ValueError(f"c must be at least 1, the failures a group may have, got {c!r}")
    failures = groups.sum_each((correct == 0).long())
    return (failures >= 1) & (failures <= c)


def _check(correct: Tensor, group_size: int | None, group_ids: Tensor | None) -> Groups:
    groups = make_groups("correct", correct, group_size, group_ids)
    check_verdicts("correct", correct)
    return groups
