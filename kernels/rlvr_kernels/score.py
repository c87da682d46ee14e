"""score: the log-probability and statistics of every row. FLOPs: 2NVH.

16-bit operands on an accelerator go to linear_lse, whose logits never leave the registers. Others are folded from a bounded
tile: the loop over slices of the vocabulary runs once for all rows, or once per piece of rows if the tile cannot hold them all.
"""

import torch

from rlvr_kernels.backend import use_triton
from rlvr_kernels.linear_lse import linear_scores
from rlvr_kernels.logits import LogitMap
from rlvr_kernels.lse_fold import RowState, Scores, lse_fold, state_of
from rlvr_kernels.shard import Shard
from rlvr_kernels.tile import Tile, bytes_per_logit, column_slices, vocabulary_tile

IN_REGISTERS = {torch.bfloat16, torch.float16}  # dtypes that Triton scores without a tile


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
    shard: Shard | None = None,
    backend: str = "auto",
) -> Scores:
    """Score ids (n,) under hidden (n, H) and weight (V, H), which have one dtype. A shard's weight is its slice."""
    ids = ids if shard is None else ids - shard.first
    if hidden.dtype in IN_REGISTERS and use_triton(logit_map.inv_temperature, backend):
        scores = linear_scores(hidden, weight, ids, logit_map, entropy=entropy, mean=mean, top1=top1, squares=squares)
        return scores if shard is None else finish(state_of(scores, weight.shape[0]), weight.shape[0], False, shard)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    state = RowState.empty(rows, hidden, entropy=entropy, mean=mean, squares=squares)
    shape = vocabulary_tile(rows, vocabulary, bytes_per_logit(hidden.device, hidden.dtype, backend), workspace_bytes)
    tile = Tile(shape, hidden.dtype, hidden.device, backend)
    for row in range(0, rows, shape.rows):
        some = slice(row, min(row + shape.rows, rows))
        for part in column_slices(vocabulary, shape.cols):
            logits = tile.fill(hidden[some], weight[part])
            lse_fold(logits, ids[some], part.start, state[some], logit_map[some, part], backend)
    return finish(state, vocabulary, top1, shard)


def finish(state: RowState, vocabulary: int, top1: bool, shard: Shard | None) -> Scores:
    """The scores of rows whose every column has been folded."""
    state = state if shard is None else shard.combine(state)
    mean = None if state.summed is None else state.summed / vocabulary
    top = state.top1() if top1 else None
    return Scores(state.logp(), state.lse(), state.entropy(), mean, top, state.sum_p_squared())
