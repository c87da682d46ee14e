"""Which rollouts belong to one prompt, and the sums over them: groups of one size or ragged, their rollouts in any order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Groups:
    """`index` (B,) holds the group of every rollout as a number from 0 to count - 1; no group is empty.

    Methods that end in `each` give one value per group (count,); the others give every rollout its group's value (B,).
    """

    index: Tensor
    count: int

    def sum_each(self, values: Tensor) -> Tensor:
        """The sum of each group's values."""
        return values.new_zeros(self.count).index_add_(0, self.index, values)

    def max_each(self, values: Tensor) -> Tensor:
        """The largest of each group's values."""
        return values.new_zeros(self.count).scatter_reduce_(0, self.index, values, "amax", include_self=False)

    def min_each(self, values: Tensor) -> Tensor:
        """The smallest of each group's values."""
        return values.new_zeros(self.count).scatter_reduce_(0, self.index, values, "amin", include_self=False)

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

    def size(self) -> Tensor:
        """How many rollouts a rollout's group has, itself included."""
        return self.size_each()[self.index]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over a rollout's group."""
        return self.mean_each(values)[self.index]

    def std(self, values: Tensor) -> Tensor:
        """The sample standard deviation over a rollout's group; 0 in a group of one."""
        squares = self.sum((values - self.mean(values)).square())
        return (squares / (self.size() - 1).clamp(min=1)).sqrt()

    def weighted_mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """sum w v / sum w over a rollout's group; the plain mean where all its weights are 0."""
        weights = torch.where(self.sum(weights) == 0, 1.0, weights)
        return self.sum(weights * values) / self.sum(weights)

    def told_apart_each(self, values: Tensor) -> Tensor:
        """Whether each group's values differ; exact, where a standard deviation would be rounded."""
        return self.max_each(values) != self.min_each(values)

    def told_apart(self, values: Tensor) -> Tensor:
        """Whether the values in a rollout's group differ."""
        return self.told_apart_each(values)[self.index]


def make_groups(like_name: str, like: Tensor, group_size: int | None, group_ids: Tensor | None) -> Groups:
    """The groups of B rollouts from the size all of them have, or from the group each rollout names.

    `group_ids` become indices in ascending order of the ids, for which torch.unique waits for an accelerator.
    """
    if (group_size is None) == (group_ids is None):
        came = "neither" if group_size is None else "both"
        raise ValueError(
            f"group_size (rollouts of a prompt next to each other) or group_ids (one per rollout) is needed, got {came}."
        )
    if like.ndim != 1:
        raise ValueError(f"{like_name} must have shape (B,), one per rollout, got {tuple(like.shape)}.")
    if group_ids is not None:
        distinct, index = torch.unique(check_ids("group_ids", group_ids, like_name, like), return_inverse=True)
        return Groups(index, distinct.shape[0])
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"group_size must be a whole number, got {group_size!r}.")
    if group_size < 1:
        raise ValueError(f"group_size must be 1 or more, got {group_size}.")
    if len(like) % group_size:
        raise ValueError(
            f"{like_name} must have a multiple of group_size = {group_size} entries, one per rollout, got {len(like)}."
        )
    return Groups(torch.arange(len(like), device=like.device) // group_size, len(like) // group_size)


def check_ids(name: str, ids: Tensor, like_name: str, like: Tensor) -> Tensor:
    """The ids (B,) if they are whole numbers, one per rollout, where the rollouts are."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}.")
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{name} must have a whole-number dtype, got {ids.dtype}.")
    check_like(name, ids, like_name, like)
    return ids


def check_like(name: str, values: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless there is one value per rollout, on the rollouts' device."""
    if values.shape != like.shape:
        raise ValueError(
            f"{name} must have shape (B,) = {tuple(like.shape)} like {like_name}, got {tuple(values.shape)}."
        )
    if values.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {values.device}.")


def check_finite(name: str, values: Tensor, group_size: int | None = None, group_ids: Tensor | None = None) -> None:
    """Raise if one of the values (B,) is NaN or infinite, naming its rollout and, where known, its group."""
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    worst = int((~finite).nonzero()[0])
    where = f"rollout {worst}"
    if group_size is not None:
        where += f" (group {worst // group_size})"
    elif group_ids is not None:
        where += f" (group {int(group_ids[worst])})"
    hint = ": did its verifier fail, or could a confidence not be read?" if name == "rewards" else "."
    raise ValueError(f"{name} must be finite, got {values[worst].item()} for {where}{hint}")
