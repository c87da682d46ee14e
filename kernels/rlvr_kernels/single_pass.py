"""single_pass: the loss's gradients while each chunk's logits exist, 6NVH FLOPs; nothing is recomputed.

Rows come in chunks that fit the workspace with all their logits. Chunks end at rollout boundaries if the coefficient
of a row depends on its whole rollout, anywhere otherwise. In a chunk, `fused_policy` does everything in one launch
where it applies; else lse_fold, weigh and dlogits follow each other. Rows with coefficient 0 are taken out before the
last two products where that pays, unless their entropy has a weight in the loss.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from rlvr_kernels import huge_pages
from rlvr_kernels.capture import capturing
from rlvr_kernels.cost import moving_pays, rates_of
from rlvr_kernels.dlogits import dlogits
from rlvr_kernels.fused_policy import PolicyRows, fused_policy
from rlvr_kernels.logits import Head, accumulator_dtype
from rlvr_kernels.lse_fold import RowState, lse_fold
from rlvr_kernels.pull_back import Gradients, Needs
from rlvr_kernels.spec import PolicySpec
from rlvr_kernels.tile import Tile, TileShape, accumulate, accumulator, bytes_per_logit, multiply, whole_row_tile
from rlvr_kernels.token_terms import asymmetric_weight
from rlvr_kernels.weigh import STATISTICS, Weighed, rollout_of_row, weigh

Weigher = Callable[..., Weighed]
"""`rlvr_kernels.weigh.weigh`, or something with its signature."""

MOVED_BYTES = 16 << 20  # rows move in pieces of this size,
CACHED_BYTES = 1 << 20  # on a CPU of this, which a core's cache holds


class Rows(NamedTuple):
    """The n rows to do, in rollout order: `where` (n,) says which of the hidden states, None all of them.

    ids, inv_temperature, advantages, old, ref, behaviour (n,); cu_seqlens (B + 1,) over the n rows, `lengths` the same
    on the host, None where it may not be asked; rollout_weight (B,); mask (n,) says which rows count, None all of them.
    """

    where: torch.Tensor | None
    ids: torch.Tensor
    inv_temperature: torch.Tensor
    advantages: torch.Tensor
    old: torch.Tensor | None
    ref: torch.Tensor | None
    behaviour: torch.Tensor | None
    cu_seqlens: torch.Tensor
    lengths: list[int] | None
    rollout_weight: torch.Tensor
    mask: torch.Tensor | None = None


class Chunk(NamedTuple):
    """Rows start .. stop, which are rollouts first .. last where chunks respect them."""

    start: int
    stop: int
    first: int
    last: int


class SinglePass(NamedTuple):
    """logp and entropy (n,), and the gradients (d_hidden for all hidden states).

    coef (n,) is what each chunk's weigher said, if it was not `weigh`.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None
    gradients: Gradients
    coef: torch.Tensor | None


def chunks(lengths: list[int], limit: int, token_local: bool) -> Iterator[Chunk]:
    """Cut sum(lengths) rows into chunks of at most `limit`, of equal size where any boundary will do."""
    if token_local:
        yield from equal_chunks(sum(lengths), len(lengths), limit)
        return
    start = stop = first = 0
    for i, length in enumerate(lengths):
        if stop > start and stop + length - start > limit:
            yield Chunk(start, stop, first, i)
            start, first = stop, i
        stop += length
    if stop > start:
        yield Chunk(start, stop, first, len(lengths))


def equal_chunks(rows: int, rollouts: int, limit: int) -> Iterator[Chunk]:
    """Cut so many rows into as few chunks of at most `limit` as will do, anywhere."""
    count = -(-rows // max(limit, 1))
    for i in range(count):
        yield Chunk(rows * i // count, rows * (i + 1) // count, 0, rollouts)


def single_pass(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rows: Rows,
    spec: PolicySpec,
    *,
    bias: torch.Tensor | None = None,
    head: Head = Head(),
    needs: Needs,
    weight_dtype: torch.dtype,
    with_entropy: bool = False,
    entropy_coef: float = 0.0,
    workspace_bytes: int,
    backend: str = "auto",
    weigher: Weigher = weigh,
) -> SinglePass:
    """Score, weigh and pull back `rows` of hidden (R, H), which is cast to the dtype of weight (V, H) chunk by chunk.

    A `weigher` other than `weigh` sees whole rollouts. entropy_coef times the entropy, aggregated like the loss, is
    taken off the loss.
    """
    vocabulary = weight.shape[0]
    token_local = weigher is weigh and spec.is_token_local(rows.old is not None)
    limit = whole_row_tile(vocabulary, bytes_per_logit(weight.device, weight.dtype), workspace_bytes)
    if rows.lengths is None:
        if not token_local and rows.ids.shape[0] > limit:
            raise ValueError(
                f"workspace_bytes={workspace_bytes} holds {limit} of {rows.ids.shape[0]} rows, and where rollouts end "
                "can not be asked while a CUDA graph is captured: give a workspace for all rows, or schedule='two_pass'"
            )
        plan = list(equal_chunks(rows.ids.shape[0], rows.rollout_weight.shape[0], limit))
    else:
        plan = list(chunks(rows.lengths, limit, token_local))
    largest = max((chunk.stop - chunk.start for chunk in plan), default=0)
    tile = Tile(TileShape(largest, vocabulary), weight.dtype, weight.device)
    # A coefficient that comes later goes into the hidden states, which rounds them once more where they are narrow.
    deferrable = weight.dtype == accumulator_dtype(weight.dtype) or (rows.old is None and not needs.bias)
    fusable = not with_entropy and (token_local or deferrable)
    step = _Step(
        weight, bias, head, spec, backend, tile, weigher,
        fused=fusable, deferred=not token_local, with_entropy=with_entropy, entropy_coef=entropy_coef,
        products=needs.hidden + needs.weight,
    )  # fmt: skip
    shift = _known_shift(rows, spec, backend) if token_local and spec.alpha > 0 else None
    if (
        shift is not None and with_entropy
    ):  # the three kernels see pieces of rollouts: the weight goes into the advantages
        rows, step.spec = _weighted_advantages(rows, shift, spec), replace(spec, alpha=0.0)

    logp = torch.empty_like(rows.inv_temperature)
    entropy = torch.empty_like(logp) if with_entropy else None
    coef = None if weigher is weigh else torch.empty_like(logp)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
    d_weight = _weight_accumulator(weight, weight_dtype, len(plan)) if needs.weight else None
    d_bias = (
        torch.zeros(vocabulary, dtype=accumulator_dtype(weight.dtype), device=weight.device) if needs.bias else None
    )
    for i, chunk in enumerate(plan):
        part = slice(chunk.start, chunk.stop)
        index = part if rows.where is None else rows.where[part]
        states = hidden[index].to(weight.dtype)
        out = step.run(states, rows, chunk, None if shift is None else shift[part])
        logp[part] = out.logp
        if coef is not None:
            coef[part] = out.coef
        if entropy is not None and out.entropy is not None:
            entropy[part] = out.entropy
        if out.keep is not None:
            states = states[out.keep]
            index = out.keep + chunk.start if rows.where is None else rows.where[part][out.keep]
        if d_hidden is not None:
            product = accumulator(states.shape, states)
            multiply(out.gradient, weight, out=product)
            d_hidden[index] = (product if out.scale is None else product.mul_(out.scale[:, None])).to(d_hidden.dtype)
        if out.scale is not None:
            states = (states * out.scale[:, None]).to(weight.dtype)
        if d_weight is not None:
            accumulate(d_weight, out.gradient.T, states, first=i == 0)
        if d_bias is not None:
            d_bias += _sum_of_rows(out.gradient, out.scale, d_bias.dtype)
    if d_weight is not None and not plan:
        d_weight.zero_()
    gradients = Gradients(d_hidden, None if d_weight is None else d_weight.to(weight_dtype), d_bias)
    return SinglePass(logp, entropy, gradients, coef)


def _weight_accumulator(weight: torch.Tensor, weight_dtype: torch.dtype, count: int) -> torch.Tensor:
    """One chunk can be written straight to the gradient's dtype; several need an accumulator."""
    if count <= 1:
        return huge_pages.empty(weight.shape, weight_dtype, weight.device)
    return accumulator(weight.shape, weight)


def _sum_of_rows(gradient: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sum (V,) of gradient (k, V) over its rows, each times its scale."""
    return gradient.sum(0, dtype=dtype) if scale is None else torch.mv(gradient.T.to(dtype), scale)


def _known_shift(rows: Rows, spec: PolicySpec, backend: str) -> torch.Tensor:
    """Each row's rollout's confidence shift (n,), from the old log-probabilities."""
    old, ref, advantages = rows.old, rows.ref, rows.advantages
    assert old is not None
    statistics = weigh(
        old, old, ref, advantages, rows.mask, rows.cu_seqlens, rows.rollout_weight, spec, backend
    ).statistics
    return statistics[:, STATISTICS.index("shift")][rollout_of_row(rows.cu_seqlens, rows.ids.shape[0])]


def _weighted_advantages(rows: Rows, shift: torch.Tensor, spec: PolicySpec) -> Rows:
    """The rows with every wrong one's advantage multiplied by its rollout's weight."""
    weighted = rows.advantages * asymmetric_weight(shift, spec)
    return rows._replace(advantages=torch.where(rows.advantages < 0, weighted, rows.advantages))


class _Pulled(NamedTuple):
    """A chunk after its step: gradient (k, V) of the rows `keep` (k,) (None: all), to be multiplied by scale (k,) (None: 1)."""

    logp: torch.Tensor
    entropy: torch.Tensor | None
    coef: torch.Tensor
    keep: torch.Tensor | None
    gradient: torch.Tensor
    scale: torch.Tensor | None


class _Step:
    """From a chunk's hidden states to its logits' gradient in the tile.

    `fused` if the coefficient is known row by row, or (`deferred`) may be multiplied in afterwards.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, head: Head, spec: PolicySpec, backend: str, tile: Tile,
        weigher: Weigher, *, fused: bool, deferred: bool, with_entropy: bool, entropy_coef: float, products: int,
    ):  # fmt: skip
        self.weight, self.bias, self.head, self.spec, self.backend, self.tile = weight, bias, head, spec, backend, tile
        self.weigher, self.fused, self.deferred = weigher, fused, deferred
        self.with_entropy, self.entropy_coef, self.products = with_entropy, entropy_coef, products

    def run(self, states: torch.Tensor, rows: Rows, chunk: Chunk, shift: torch.Tensor | None) -> _Pulled:
        """Score, weigh and differentiate one chunk of hidden states (n, H)."""
        logits = self.tile.fill(states, self.weight)
        return self._fused(logits, rows, chunk, shift) if self.fused else self._separate(logits, rows, chunk)

    def _fused(self, logits: torch.Tensor, rows: Rows, chunk: Chunk, shift: torch.Tensor | None) -> _Pulled:
        part = slice(chunk.start, chunk.stop)
        policy = PolicyRows(
            rows.advantages[part], _scale(rows, part), _cut(rows.old, part), _cut(rows.ref, part), shift
        )
        gradient = self.tile.gradient(*logits.shape)
        fused = fused_policy(
            logits, rows.ids[part], policy, rows.inv_temperature[part], self.spec,
            bias=self.bias, head=self.head, out=gradient, deferred=self.deferred, backend=self.backend,
        )  # fmt: skip
        coef, scale = fused.coef, fused.scale
        if self.deferred:
            coef = self._coef(fused.logp, rows, chunk)
            scale = coef if scale is None else coef * scale
        keep = _rows_to_keep(coef, self.weight, self.products)
        if keep is not None:
            gradient, keep = _fill_up(gradient, keep)
            scale = None if scale is None else scale[keep]
        return _Pulled(fused.logp, None, coef, keep, gradient, scale)

    def _separate(self, logits: torch.Tensor, rows: Rows, chunk: Chunk) -> _Pulled:
        part = slice(chunk.start, chunk.stop)
        ids, inv_temperature = rows.ids[part], rows.inv_temperature[part]
        state = RowState.empty(logits.shape[0], logits, entropy=self.with_entropy)
        lse_fold(logits, ids, 0, state, inv_temperature, bias=self.bias, head=self.head, backend=self.backend)
        logp, lse, entropy = state.logp(), state.lse(), state.entropy()
        coef = self._coef(logp, rows, chunk)
        options = (
            {"entropy": entropy, "entropy_coef": -self.entropy_coef * _scale(rows, part)} if self.entropy_coef else {}
        )
        gradient = dlogits(
            logits, ids, 0, lse, coef, inv_temperature, bias=self.bias, head=self.head,
            out=self.tile.gradient(*logits.shape), backend=self.backend, **options,
        )  # fmt: skip
        keep = None if self.entropy_coef else _rows_to_keep(coef, self.weight, self.products)
        if keep is not None:
            gradient, keep = _fill_up(gradient, keep)
        return _Pulled(logp, entropy, coef, keep, gradient, None)

    def _coef(self, logp: torch.Tensor, rows: Rows, chunk: Chunk) -> torch.Tensor:
        """dL/dlogp of a chunk, which either is whole rollouts or needs none of them whole."""
        part = slice(chunk.start, chunk.stop)
        # A weigher of the user's own is told of all rollouts, empty ones too, so that their numbers are the batch's.
        first, last = (chunk.first, chunk.last) if self.weigher is weigh else (0, rows.rollout_weight.shape[0])
        some = slice(first, last)
        bounds = rows.cu_seqlens[first : last + 1].clamp(chunk.start, chunk.stop) - chunk.start
        old, ref, behaviour = (_cut(x, part) for x in (rows.old, rows.ref, rows.behaviour))
        return self.weigher(
            logp, old, ref, rows.advantages[part], _cut(rows.mask, part), bounds, rows.rollout_weight[some], self.spec,
            self.backend, behaviour=behaviour,
        ).coef  # fmt: skip


def _scale(rows: Rows, part: slice) -> torch.Tensor:
    """The aggregation's weight (n,) of each row of a chunk."""
    scale = rows.rollout_weight[rollout_of_row(rows.cu_seqlens, rows.ids.shape[0])[part]]
    return scale if rows.mask is None else scale.masked_fill(~rows.mask[part], 0)


def _cut(values: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if values is None else values[part]


def _rows_to_keep(coef: torch.Tensor, weight: torch.Tensor, products: int) -> torch.Tensor | None:
    """The rows (k,) whose coefficient is not 0, ascending, or None for all of them, if bringing them together costs more than the
    others' products, of which a row takes so many.

    One host sync, but none in a capture.
    """
    if capturing():
        return None
    keep = coef.nonzero()[:, 0]
    kept, dropped = keep.shape[0], coef.shape[0] - keep.shape[0]
    rates = rates_of(weight.device, weight.dtype)
    return keep if moving_pays(kept, dropped, weight.shape[1], weight.element_size(), products, rates) else None


def _fill_up(tile: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The top k rows of the tile, in which those of `keep` (k,), ascending, that lie below have taken the places of others; and
    the row (k,) that is in each place. No row moves that need not; one host sync."""
    count = keep.shape[0]
    below = keep[keep >= count]
    taken = torch.zeros(count, dtype=torch.uint8, device=keep.device)
    taken[keep[: count - below.shape[0]]] = 1
    free = taken.argsort(stable=True)[: below.shape[0]]
    piece_bytes = CACHED_BYTES if tile.device.type == "cpu" else MOVED_BYTES
    step = max(1, piece_bytes // (tile.shape[1] * tile.element_size()))
    for start in range(0, below.shape[0], step):
        piece = slice(start, start + step)
        tile[free[piece]] = tile[below[piece]]
    order = torch.arange(count, device=keep.device)
    order[free] = below
    return tile[:count], order
