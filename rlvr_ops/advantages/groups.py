"""Which rollouts share a prompt, and statistics over them. Groups may be ragged, their rollouts in any order.

Groups are sorted and reduced as segments, never by atomic additions: the same inputs give the same bits. O(B log B) each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rlvr_kernels.checks import check_tensor
from rlvr_kernels.logits import sum_dtype
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Groups:
    """The group of every rollout: `index` (B,), from 0 to count - 1. No group is empty where its maximum or minimum is asked for.

    Methods ending in `each` return one value per group, (count,). The others return every rollout its group's, (B,). Sums,
    extremes and weighted means also take (B, n), column by column. Sums are taken in float64 (float32 on MPS) and rounded
    once, to the dtype of the values.
    """

    index: Tensor
    count: int

    def batch(self) -> Groups:
        """All rollouts as one group."""
        return Groups(torch.zeros_like(self.index), min(self.count, 1))

    def sum_each(self, values: Tensor) -> Tensor:
        """The sum of each group's values."""
        return self._reduce(values, "sum")

    def max_each(self, values: Tensor) -> Tensor:
        """The largest of each group's values."""
        return self._reduce(values, "max")

    def min_each(self, values: Tensor) -> Tensor:
        """The smallest of each group's values."""
        return self._reduce(values, "min")

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        order, wide = self.index.argsort(stable=True), values.to(sum_dtype(values.device))
        bounds = torch.searchsorted(self.index[order], torch.arange(self.count + 1, device=self.index.device))
        return torch.segment_reduce(wide[order], how, offsets=bounds).to(values.dtype)

    def size_each(self) -> Tensor:
        """How many rollouts each group has."""
        return self.sum_each(torch.ones_like(self.index))

    def mean_each(self, values: Tensor) -> Tensor:
        """The mean of each group's values."""
        return self.sum_each(values) / self.size_each()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over a rollout's group."""
        return self.sum_each(values)[self.index]

    def max(self, values: Tensor) -> Tensor:
        """The largest value in a rollout's group."""
        return self.max_each(values)[self.index]

    def min(self, values: Tensor) -> Tensor:
        """The smallest value in a rollout's group."""
        return self.min_each(values)[self.index]

    def size(self) -> Tensor:
        """How many rollouts a rollout's group has, itself included."""
        return self.size_each()[self.index]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over a rollout's group."""
        return self.mean_each(values)[self.index]

    def std(self, values: Tensor) -> Tensor:
        """The sample standard deviation over a rollout's group; 0 in a group of one."""
        centred = values - self.mean(values)
        largest = self.max(centred.abs())
        unit = torch.where(largest > 0, largest, 1.0)  # squares of tiny values would be 0, of huge ones inf
        return unit * (self.sum((centred / unit).square()) / (self.size() - 1).clamp(min=1)).sqrt()

    def weighted_mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """sum w v / sum w over a rollout's group; the plain mean where all its weights are 0."""
        weights = torch.where(self.sum(weights) == 0, 1.0, weights)
        return self.sum(weights * values) / self.sum(weights)

    def told_apart_each(self, values: Tensor) -> Tensor:
        """Whether each group's values differ: exact, unlike a standard deviation."""
        return self.max_each(values) != self.min_each(values)

    def told_apart(self, values: Tensor) -> Tensor:
        """Whether the values in a rollout's group differ."""
        return self.told_apart_each(values)[self.index]


def make_groups(like_name: str, like: Tensor, group_size: int | None, group_ids: Tensor | None) -> Groups:
    """The groups of `like` (B,), of one size and next to each other, or as each rollout's id says.

    Ids become indices in ascending order. torch.unique does that, with a host sync on an accelerator.
    """
    if (group_size is None) == (group_ids is None):
        came = "neither" if group_size is None else "both"
        raise ValueError(
            f"group_size (rollouts of a prompt next to each other) or group_ids (one per rollout) is needed, got {came}"
        )
    check_tensor(like_name, like, floating=False)
    if like.ndim != 1:
        raise ValueError(f"{like_name} must have shape (B,), one per rollout, got {tuple(like.shape)}")
    if group_ids is not None:
        distinct, index = torch.unique(check_ids("group_ids", group_ids, like_name, like), return_inverse=True)
        return Groups(index, distinct.shape[0])
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"group_size must be a whole number, got {group_size!r}")
    if group_size < 1:
        raise ValueError(f"group_size must be 1 or more, got {group_size}")
    if len(like) % group_size:
        raise ValueError(
            f"{like_name} must have a multiple of group_size = {group_size} entries, one per rollout, got {len(like)}"
        )
    return Groups(torch.arange(len(like), device=like.device) // group_size, len(like) // group_size)


def check_ids(name: str, ids: Tensor, like_name: str, like: Tensor) -> Tensor:
    """The ids (B,), checked to be whole numbers, one per rollout, on the rollouts' device."""
    check_like(name, ids, like_name, like)
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{name} must have a whole-number dtype, got {ids.dtype}")
    return ids


def check_like(name: str, values: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless there is one value per rollout, on the rollouts' device."""
    if isinstance(values, Tensor) and values.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {values.device}")
    check_tensor(name, values, floating=False)
    if values.shape != like.shape:
        raise ValueError(
            f"{name} must have shape (B,) = {tuple(like.shape)} like {like_name}, got {tuple(values.shape)}"
        )
