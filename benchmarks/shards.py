"""A head whose vocabulary lies on several ranks, simulated in one process with the kernels that a rank would run.

Each rank scores its slice of the weight; two numbers a row, gathered from all, give every rank the row's log-sum-exp and
log-probability. With them each pulls its own slice back: its d_weight is exact and final, its d_hidden a part of a sum.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from rlvr_kernels.pull_back import Gradients, Needs, pull_back
from rlvr_kernels.score import score
from torch import Tensor


class Shard(NamedTuple):
    """Rows first .. first + c of the weight, as weight (c, H)."""

    first: int
    weight: Tensor


class Seen(NamedTuple):
    """What one rank tells the others of each row, (n,): its slice's log-sum-exp, and the target's logit or -inf."""

    lse: Tensor
    target: Tensor


def split(weight: Tensor, ranks: int) -> list[Shard]:
    """The weight (V, H) in slices that differ by at most one row."""
    ends = [weight.shape[0] * rank // ranks for rank in range(ranks + 1)]
    return [Shard(first, weight[first:stop]) for first, stop in pairwise(ends)]


def look(hidden: Tensor, shard: Shard, ids: Tensor, *, workspace_bytes: int) -> Seen:
    """Score rows of hidden (n, H) against one slice; ids (n,) are positions in the whole vocabulary."""
    found = score(hidden, shard.weight, ids - shard.first, _ones(hidden), workspace_bytes=workspace_bytes)
    return Seen(found.lse, found.logp + found.lse)


def combine(seen: list[Seen]) -> tuple[Tensor, Tensor]:
    """(logp, lse) of the whole rows."""
    lse = torch.logsumexp(torch.stack([part.lse for part in seen]), 0)
    return torch.stack([part.target for part in seen]).amax(0) - lse, lse


def pull(hidden: Tensor, shard: Shard, ids: Tensor, lse: Tensor, coef: Tensor, *, workspace_bytes: int) -> Gradients:
    """This rank's d_weight (c, H), and its part of d_hidden (n, H), from the whole rows' lse and dL/dlogp (n,)."""
    return pull_back(
        hidden, shard.weight, ids - shard.first, _ones(hidden), lse, coef, needs=Needs(True, True, False),
        weight_dtype=shard.weight.dtype, workspace_bytes=workspace_bytes,
    )  # fmt: skip


def _ones(hidden: Tensor) -> Tensor:
    return torch.ones(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
