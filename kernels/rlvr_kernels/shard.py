"""Shard: where a slice of the vocabulary would talk to the others. There are two places, and no third.

A rank that holds rows first .. first + c of the lm_head scores every token against its own columns. The ranks combine what
they have seen of each row, a few numbers a row, and later add up the hidden states' gradient. Weight and bias stay local.
"""

from typing import Protocol

import torch

from rlvr_kernels.lse_fold import RowState


class Shard(Protocol):
    """A slice of the vocabulary; a process group would implement it."""

    first: int
    """The first token id of the slice."""

    def combine(self, state: RowState) -> RowState:
        """The rows' maximum, sum of exponentials and target logit over all slices."""

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of values over all slices: of targets' logits and sums of exponentials (n,), and of d_hidden (n, H)."""
