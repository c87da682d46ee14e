"""score: the log-probability and statistics of every row, from a bounded tile of logits. FLOPs: 2NVH.

The loop over slices of the vocabulary runs once for all rows, or once per piece of rows if the workspace cannot hold them all.
"""

from typing import NamedTuple

import torch

from rlvr_kernels.logits import LogitMap
from rlvr_kernels.lse_fold import RowState, lse_fold
from rlvr_kernels.shard import Shard
from rlvr_kernels.tile import Tile, bytes_per_logit, multiply, vocabulary_tile


class Scores(NamedTuple):
    """All (n,), float32 (float64 for float64): logp, lse, and the statistics asked for."""

    logp: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logit: torch.Tensor | None = None
    top1: torch.Tensor | None = None
    sum_p_squared: torch.Tensor | None = None


def score(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    logit_map: LogitMap,
    *,
    entropy: bool = False,
    mean: bool = False,
    top1: bool = False,
    squares: bool = False,
    workspace_bytes: int,
    kept: torch.Tensor | None = None,
    shard: Shard | None = None,
    backend: str = "auto",
) -> Scores:
    """Score ids (n,) under hidden (n, H) and weight (V, H), which have one dtype.

    kept (n, C) is filled with the raw logits of the first C columns, see `tile.Kept`. A shard's weight is its slice.
    """
    ids = ids if shard is None else ids - shard.first
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    state = RowState.empty(rows, hidden, entropy=entropy, mean=mean, squares=squares)

    def fold(logits: torch.Tensor, some: slice, part: slice) -> None:
        lse_fold(logits, ids[some], part.start, state[some], logit_map[some, part], backend)

    first = 0
    if kept is not None and kept.numel():
        first = kept.shape[1]
        multiply(hidden, weight[:first].T, out=kept)
        fold(kept, slice(0, rows), slice(0, first))
    if first == vocabulary:
        return finish(state, vocabulary, top1, shard)
    shape = vocabulary_tile(rows, vocabulary, bytes_per_logit(hidden.device, hidden.dtype), workspace_bytes)
    tile = Tile(shape, hidden.dtype, hidden.device)
    for row in range(0, rows, shape.rows):
        some = slice(row, min(row + shape.rows, rows))
        for col in range(first, vocabulary, shape.cols):
            part = slice(col, min(col + shape.cols, vocabulary))
            fold(tile.fill(hidden[some], weight[part]), some, part)
    return finish(state, vocabulary, top1, shard)


def finish(state: RowState, vocabulary: int, top1: bool, shard: Shard | None) -> Scores:
    """The scores of rows whose every column has been folded."""
    state = state if shard is None else shard.combine(state)
    mean = None if state.summed is None else state.summed / vocabulary
    top = state.top1() if top1 else None
    return Scores(state.logp(), state.lse(), state.entropy(), mean, top, state.sum_p_squared())
