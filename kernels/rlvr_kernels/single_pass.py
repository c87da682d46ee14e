"""single_pass: the loss and its gradients, computed while each chunk's tile exists. FLOPs: 6NVH; nothing is computed twice.

A chunk is as many rows as fit the workspace with the whole vocabulary. It is scored, weighed and pulled back before the next one.
Chunks hold whole rollouts if a token's coefficient depends on its rollout, and are cut anywhere otherwise. Rows with
coefficient 0 leave a chunk before its last two products where that pays.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from rlvr_kernels.backend import capturing
from rlvr_kernels.cost import moving_pays, rates_of
from rlvr_kernels.dlogits import dlogits
from rlvr_kernels.linear_exp import linear_exp
from rlvr_kernels.logits import LogitMap, accumulator_dtype, sum_dtype
from rlvr_kernels.lse_fold import RowState, lse_fold
from rlvr_kernels.pull_back import Gradients, Needs
from rlvr_kernels.shard import Shard
from rlvr_kernels.tile import (
    CPU_ROWS,
    Tile,
    TileShape,
    accumulate,
    compact_,
    empty,
    multiply_scaled,
    sum_of_rows,
)
from rlvr_kernels.weigh import SUMS, Rows, Weighed

Weigher = Callable[[torch.Tensor, Rows], Weighed]
"""From log-probabilities (n,) and their rows to `Weighed`: `weigh` with an objective, or a user's function."""


class SinglePass(NamedTuple):
    """logp and entropy (n,), sums (B, 8) whose first column adds up to the loss, and the gradients.

    active (0-d) counts the rows whose coefficient is not 0. d_hidden is that of all hidden states.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None
    sums: torch.Tensor
    active: torch.Tensor
    gradients: Gradients


def single_pass(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    logit_map: LogitMap,
    rows: Rows,
    weigher: Weigher,
    *,
    index: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
    drops: bool = True,
    token_local: bool,
    needs: Needs,
    weight_dtype: torch.dtype,
    with_entropy: bool = False,
    entropy_coef: float = 0.0,
    chunk_rows: int,
    shard: Shard | None = None,
    backend: str = "auto",
) -> SinglePass:
    """Score, weigh and pull back n rows: those of hidden (R, H) at `index` (n,), or all if it is None.

    A chunk has at most `chunk_rows` rows, cast to the dtype of weight (V, H). The weigher sees whole rollouts unless the loss is
    `token_local`; their `lengths` (B,) are read from the rows if they are not given and chunks must end with them. The gradients
    include that of -entropy_coef * H, aggregated like the loss; `sums` do not.

    Rows with coefficient 0 leave a chunk if `drops`, on an accelerator only where there is one chunk: to know them is a host sync.
    """
    ids = ids if shard is None else ids - shard.first
    enough = min(chunk_rows, CPU_ROWS) if weight.device.type == "cpu" else chunk_rows
    plan = _plan(rows, chunk_rows, enough, token_local, lengths)
    drops = drops and not (entropy_coef or capturing()) and (len(plan) == 1 or weight.device.type == "cpu")
    largest = max([part.stop - part.start for part in plan], default=0)
    tile = Tile(TileShape(largest, weight.shape[0]), weight.dtype, weight.device, backend)
    scorer = _Exponentials if tile.holds_exponentials else _Logits
    logp = torch.empty_like(logit_map.inv_temperature)
    entropy = torch.empty_like(logp) if with_entropy else None
    sums: Any = 0  # a tensor from the first chunk on
    active: Any = 0
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
    d_weight = _weight_accumulator(weight, weight_dtype, len(plan)) if needs.weight else None
    d_bias = logp.new_zeros(weight.shape[0]) if needs.bias else None
    for i, part in enumerate(plan):
        where = part if index is None else index[part]
        states = hidden[where].to(weight.dtype)
        chunk_map, raw = logit_map[part, slice(None)], entropy_coef > 0
        scored = scorer(tile, states, weight, ids[part], chunk_map, with_entropy, raw, shard, backend)
        mine = rows[part]
        weighed = weigher(scored.logp, mine)
        logp[part] = scored.logp
        sums, active = weighed.sums.to(sum_dtype(logp.device)) + sums, (weighed.coef != 0).sum() + active
        if entropy is not None:
            entropy[part] = scored.entropy  # type: ignore[assignment]
        entropy_coefs = -entropy_coef * mine.row_weights() if entropy_coef else None
        gradient, scale = scored.gradient(weighed.coef, entropy_coefs)
        found = _rows_to_keep(weighed.coef, weight, needs.hidden + needs.weight) if drops else None
        if found is not None:
            gradient, keep = compact_(gradient, *found)
            states, scale = states[keep], None if scale is None else scale[keep]
            where = keep + part.start if index is None else index[part][keep]
        if d_bias is not None:
            d_bias += sum_of_rows(gradient, scale, d_bias.dtype)
        # Gathered states are a copy, whose memory is free after the last read; others lie where d_hidden has its own.
        gathered = isinstance(where, torch.Tensor)
        room = states if gathered else None if d_hidden is None else d_hidden[where]
        if d_weight is not None:
            if scale is not None:
                fits = room is not None and room.dtype == states.dtype
                states = torch.mul(states, scale[:, None], out=room if fits else torch.empty_like(states))
            accumulate(d_weight, gradient.T, states, first=i == 0)
        if d_hidden is not None:
            fits = room is not None and room.dtype == d_hidden.dtype
            out: Any = room if fits else torch.empty_like(states, dtype=d_hidden.dtype)
            multiply_scaled(gradient, weight, scale, out=out)
            if gathered:
                d_hidden[where] = out
    if d_hidden is not None and shard is not None:
        d_hidden = shard.total(d_hidden)
    if not plan:
        sums, active = logp.new_zeros(rows.weights.shape[0], len(SUMS)), logp.new_zeros(())
        if d_weight is not None:
            d_weight.zero_()
    gradients = Gradients(d_hidden, None if d_weight is None else d_weight.to(weight_dtype), d_bias)
    return SinglePass(logp, entropy, sums.to(logp.dtype), active.to(logp.dtype), gradients)


class _Exponentials:
    """A scored chunk whose tile holds exponentials: the gradient but for a factor of each row, or, `raw`, exp(z - anchor)."""

    def __init__(
        self, tile: Tile, states: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logit_map: LogitMap,
        with_entropy: bool, raw: bool, shard: Shard | None, backend: str,
    ):  # fmt: skip
        self.ids, self.logit_map, self.backend = ids, logit_map, backend
        self.tile = tile.part(states.shape[0], weight.shape[0])
        options: Any = {"entropy": with_entropy, "raw": raw, "shard": shard, "backend": backend}
        self.logp, self.total, self.anchor, self.entropy = linear_exp(
            states, weight, ids, logit_map, self.tile, **options
        )

    def gradient(
        self, coef: torch.Tensor, entropy_coef: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dL/d(h W^T) of the chunk (n, V), and the factor (n,) still missing from each row; None if none is."""
        if entropy_coef is None:
            return self.tile, -coef * self.logit_map.inv_temperature * self.logit_map.logit_scale / self.total
        gradient = dlogits(
            self.tile, self.ids, 0, self.anchor + self.total.log(), coef, self.logit_map, entropy=self.entropy,
            entropy_coef=entropy_coef, anchor=self.anchor, backend=self.backend,
        )  # fmt: skip
        return gradient, None


class _Logits:
    """A scored chunk whose tile holds raw products, which `dlogits` overwrites."""

    def __init__(
        self, tile: Tile, states: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logit_map: LogitMap,
        with_entropy: bool, raw: bool, shard: Shard | None, backend: str,
    ):  # fmt: skip
        self.ids, self.logit_map, self.backend = ids, logit_map, backend
        self.products = tile.fill(states, weight)
        self.out = tile.gradient(*self.products.shape)
        state = RowState.empty(ids.shape[0], self.products, entropy=with_entropy)
        lse_fold(self.products, ids, 0, state, logit_map, backend)
        state = state if shard is None else shard.combine(state)
        self.logp, self.lse, self.entropy = state.logp(), state.lse(), state.entropy()

    def gradient(
        self, coef: torch.Tensor, entropy_coef: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dL/d(h W^T) of the chunk (n, V), and None: no factor is missing."""
        gradient = dlogits(
            self.products, self.ids, 0, self.lse, coef, self.logit_map,
            entropy=None if entropy_coef is None else self.entropy, entropy_coef=entropy_coef, out=self.out, backend=self.backend,
        )  # fmt: skip
        return gradient, None


def _plan(rows: Rows, limit: int, enough: int, token_local: bool, lengths: Sequence[int] | None) -> list[slice]:
    """The chunks: cut anywhere, or one for all rows, or, if rollouts must stay whole, cut at their ends."""
    if token_local or len(rows) <= enough:
        return equal_chunks(len(rows), enough)
    if capturing() and len(rows) > limit:
        raise ValueError(
            f"workspace_bytes holds {limit} of {len(rows)} rows, and where rollouts end can not be asked while "
            "a CUDA graph is captured: give a workspace for all rows, or schedule='two_pass'"
        )
    return list(rollout_chunks(rows.cu_seqlens.diff().tolist() if lengths is None else lengths, limit, enough))


def rollout_chunks(lengths: Sequence[int], limit: int, enough: int) -> Iterator[slice]:
    """Cut rollouts of these lengths into chunks of whole rollouts, about equal in size.

    They have `enough` rows at most, and up to `limit` rows if one rollout alone has more.
    """
    rows = sum(lengths)
    even = -(-rows // -(-rows // max(enough, 1))) if rows else 0
    start = stop = 0
    for length in lengths:
        if stop > start and (stop - start >= even or stop + length - start > min(limit, enough)):
            yield slice(start, stop)
            start = stop
        stop += length
    if stop > start:
        yield slice(start, stop)


def equal_chunks(rows: int, limit: int) -> list[slice]:
    """Cut rows anywhere, into as few chunks of at most `limit` as possible, equal in size."""
    count = -(-rows // max(limit, 1))
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def _weight_accumulator(weight: torch.Tensor, weight_dtype: torch.dtype, chunks: int) -> torch.Tensor:
    """Memory for d_weight: in the gradient's dtype for a single chunk, in the accumulator's for several."""
    dtype = weight_dtype if chunks <= 1 else accumulator_dtype(weight.dtype)
    return empty(weight.shape, dtype, weight.device)


def _rows_to_keep(coef: torch.Tensor, weight: torch.Tensor, products: int) -> tuple[torch.Tensor, int] | None:
    """The rows (k,), ascending, whose coefficient is not 0, and how many of them are not among the first k.

    None means all, if dropping the others would not pay. `products` is the number of matrix products that a dropped row is
    spared. One host sync.
    """
    active = coef != 0
    count = active.sum()
    after = active & (torch.arange(coef.shape[0], device=coef.device) >= count)
    kept, moved = torch.stack([count, after.sum()]).tolist()
    if kept == coef.shape[0]:
        return None
    rates = rates_of(weight.device, weight.dtype)
    if not moving_pays(kept, coef.shape[0] - kept, weight.shape[1], weight.element_size(), products, rates):
        return None
    return active.to(torch.uint8).argsort(descending=True, stable=True)[:kept], moved
