"""pull_back: from dL/dlogp (and dL/dH) to the gradients of hidden states, weight and bias.

FLOPs: 6NVH, a third of them to compute the tile again.

The vocabulary is the outer loop. The matmul's own float32 accumulator writes each slice of d_weight once, so no float32 copy
of all of it exists. d_hidden accumulates in float32 over the slices.
"""

from typing import NamedTuple

import torch

from rlvr_kernels.dlogits import dlogits
from rlvr_kernels.linear_exp import linear_probabilities
from rlvr_kernels.logits import LogitMap, accumulator_dtype
from rlvr_kernels.shard import Shard
from rlvr_kernels.tile import (
    Tile,
    accumulate,
    accumulator,
    bytes_per_logit,
    column_slices,
    empty,
    multiply,
    vocabulary_tile,
)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """d_hidden (n, H) and d_bias (V,) in the accumulator's dtype, d_weight (V, H) in the parameter's; None if not wanted."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def pull_back(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    logit_map: LogitMap,
    lse: torch.Tensor,
    coef: torch.Tensor,
    *,
    entropy: torch.Tensor | None = None,
    entropy_coef: torch.Tensor | None = None,
    needs: Needs,
    weight_dtype: torch.dtype,
    workspace_bytes: int,
    shard: Shard | None = None,
    backend: str = "auto",
) -> Gradients:
    """Pull coef = dL/dlogp (n,) and entropy_coef = dL/dH (n,) back through the head.

    hidden (n, H) and weight (V, H) have one dtype; d_weight gets `weight_dtype`.
    """
    ids = ids if shard is None else ids - shard.first
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    d_hidden = accumulator((rows, hidden.shape[1]), hidden) if needs.hidden else None
    d_weight = empty(weight.shape, weight_dtype, weight.device) if needs.weight else None
    if d_weight is not None and not rows:  # without rows no product overwrites it
        d_weight.zero_()
    d_bias = (
        torch.zeros(vocabulary, dtype=accumulator_dtype(hidden.dtype), device=weight.device) if needs.bias else None
    )
    shape = vocabulary_tile(rows, vocabulary, bytes_per_logit(hidden.device, hidden.dtype, backend), workspace_bytes)
    tile = Tile(shape, hidden.dtype, hidden.device, backend)
    factor = None
    if tile.holds_exponentials and entropy_coef is None:
        factor = -coef * logit_map.inv_temperature * logit_map.logit_scale

    def gradient_of(some: slice, part: slice) -> torch.Tensor:
        """dL/d(h W^T) of some rows and columns."""
        states, columns, local_map, anchor = hidden[some], weight[part], logit_map[some, part], None
        if tile.holds_exponentials:
            out = logits = tile.part(states.shape[0], columns.shape[0])
            anchor, mine = lse[some], None if factor is None else factor[some]
            linear_probabilities(states, columns, ids[some], part.start, local_map, out, anchor, mine, backend=backend)
            if mine is not None:
                return out
        else:
            logits = tile.fill(states, columns)
            out = tile.gradient(*logits.shape)
        return dlogits(
            logits, ids[some], part.start, lse[some], coef[some], local_map,
            entropy=None if entropy is None else entropy[some],
            entropy_coef=None if entropy_coef is None else entropy_coef[some], anchor=anchor, out=out, backend=backend,
        )  # fmt: skip

    for part in column_slices(vocabulary, shape.cols):
        slice_total = None  # float32 accumulator of this slice, if its rows come in several pieces
        for row in range(0, rows, shape.rows):
            some = slice(row, min(row + shape.rows, rows))
            gradient = gradient_of(some, part)
            if d_hidden is not None:
                accumulate(d_hidden[some], gradient, weight[part], first=part.start == 0)
            if d_weight is not None and shape.rows >= rows:
                multiply(gradient.T, hidden[some], out=d_weight[part])
            elif d_weight is not None:
                slice_total = (
                    accumulator((part.stop - part.start, hidden.shape[1]), hidden) if row == 0 else slice_total
                )
                accumulate(slice_total, gradient.T, hidden[some], first=row == 0)  # type: ignore[arg-type]
            if d_bias is not None:
                d_bias[part] += gradient.sum(0, dtype=d_bias.dtype)
        if slice_total is not None and d_weight is not None:
            d_weight[part] = slice_total
    if d_hidden is not None and shard is not None:
        d_hidden = shard.total(d_hidden)
    return Gradients(d_hidden, d_weight, d_bias)
