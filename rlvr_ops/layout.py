"""One view of padded and packed batches: R rows in rollout order, the rollouts' boundaries, and which rows count."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """R rows of B rollouts. Padded: R = B T, all rollouts equally long. Packed: R = N, cut by cu_seqlens."""

    shape: tuple[int, ...]
    rollouts: int
    cu_seqlens: Tensor
    mask: Tensor | None

    @property
    def rows(self) -> int:
        """R."""
        return self.shape[0] if self.packed else self.shape[0] * self.shape[1]

    @property
    def packed(self) -> bool:
        """Whether the batch came as (N,) rows."""
        return len(self.shape) == 1

    def rollout(self) -> Tensor:
        """The rollout (R,) of each row."""
        if self.packed:
            return torch.repeat_interleave(self.cu_seqlens.diff(), output_size=self.rows)
        return torch.arange(self.rollouts, device=self.cu_seqlens.device).repeat_interleave(self.shape[1])

    def tokens(self) -> Tensor:
        """How many rows of each rollout count, (B,) int64."""
        if self.mask is None:
            return self.cu_seqlens.diff()
        return self.per_rollout(self.mask.long())

    def per_rollout(self, values: Tensor) -> Tensor:
        """Sums (B,) of row values (R,)."""
        if not self.packed:
            return values.view(self.shape).sum(1)
        return values.new_zeros(self.rollouts).index_add_(0, self.rollout(), values)

    def spread(self, values: Tensor) -> Tensor:
        """Row values (R,) from one per rollout (B,) or one per row, in the batch's shape; per rollout where N = B."""
        if self.packed and values.shape[0] == self.rollouts:
            return values[self.rollout()]
        if values.shape == self.shape:
            return values.reshape(-1)
        return values[:, None].expand(self.shape).reshape(-1)

    def longest(self) -> int:
        """The most rows that count in one rollout; a host sync if the batch is on an accelerator."""
        return int(self.tokens().max()) if self.rollouts else 0

    def zero_where_masked(self, values: Tensor) -> Tensor:
        """Row values (R,) in the batch's shape, 0 where masked."""
        return (values if self.mask is None else values.masked_fill(~self.mask, 0)).view(self.shape)
