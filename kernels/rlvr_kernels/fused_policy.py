"""fused_policy: score, weigh and pull back in one launch, over a tile that holds the whole rows.

Each program reads its row of logits twice (the second time from cache where the row fits) and writes the gradient
once, in place: log-sum-exp, log-probability, ratio, clip, confidence weight, loss, coefficient and dL/d(h W^T) without
leaving it. For losses whose coefficient needs no other row: the rollout's confidence shift is given. With
`deferred=True` the coefficient is left out (1), for a rollout that must be scored before it can be weighed: the
gradient is linear in it. Bytes: 2 reads and 1 write of n * V. FLOPs: about 8 n V, so it is bound by memory.
"""

from typing import NamedTuple

import torch

from rlvr_kernels._triton import dense, device_guard, jit, tl
from rlvr_kernels.backend import use_triton
from rlvr_kernels.dlogits import dlogits, is_overlaid, is_tile
from rlvr_kernels.logits import Head, chain, load_logits, row_blocks
from rlvr_kernels.lse_fold import RowState, lse_fold
from rlvr_kernels.spec import PolicySpec
from rlvr_kernels.token_terms import (
    asymmetric_weight,
    asymmetric_weight_kernel,
    kernel_arguments,
    token_terms,
    token_terms_kernel,
)

BLOCK = 4096
NUM_WARPS = 8


class PolicyRows(NamedTuple):
    """What one row of the loss reads besides its logits, all (n,): scale is the aggregation's weight, shift the rollout's c."""

    advantage: torch.Tensor
    scale: torch.Tensor
    old: torch.Tensor | None = None
    ref: torch.Tensor | None = None
    shift: torch.Tensor | None = None


class FusedRows(NamedTuple):
    """logp, lse, loss, coef = dL/dlogp of each row, all (n,); deferred rows have loss 0 and coef 1.

    scale (n,) is what the tile's rows must still be multiplied by to be the gradient; None: they are it.
    """

    logp: torch.Tensor
    lse: torch.Tensor
    loss: torch.Tensor
    coef: torch.Tensor
    scale: torch.Tensor | None


def fused_policy(
    tile: torch.Tensor,
    ids: torch.Tensor,
    rows: PolicyRows,
    inv_temperature: torch.Tensor,
    spec: PolicySpec,
    *,
    bias: torch.Tensor | None = None,
    head: Head = Head(),
    out: torch.Tensor | None = None,
    deferred: bool = False,
    backend: str = "auto",
) -> FusedRows:
    """Overwrite tile (n, V) of raw h W^T (or fill `out`) by the loss's gradient, and return each row's scores and loss."""
    out = tile if out is None else out
    if use_triton(tile, backend):
        return _fused_triton(tile, ids, rows, inv_temperature, spec, bias, head, out, deferred)
    if is_tile(out, tile) and tile.dtype == inv_temperature.dtype and head.softcap is None:
        return _exponentials_in_place(tile, ids, rows, inv_temperature, spec, bias, head, deferred)
    state = RowState.empty(tile.shape[0], tile)
    lse_fold(tile, ids, 0, state, inv_temperature, bias=bias, head=head, backend="torch")
    logp, lse = state.logp(), state.lse()
    loss, coef = _weigh_rows(logp, rows, spec, deferred)
    dlogits(tile, ids, 0, lse, coef, inv_temperature, bias=bias, head=head, out=out, backend="torch")
    return FusedRows(logp, lse, loss, coef, None)


def _exponentials_in_place(
    tile: torch.Tensor, ids: torch.Tensor, rows: PolicyRows, inv_temperature: torch.Tensor, spec: PolicySpec,
    bias: torch.Tensor | None, head: Head, deferred: bool,
) -> FusedRows:  # fmt: skip
    """Leave exp(z - max) - sum 1[j = y] in the tile, which times -coef / sum is the gradient: no pass for that product."""
    maximum, target, total = (torch.empty_like(inv_temperature) for _ in range(3))
    for block in row_blocks(*tile.shape):
        z = head.logits(tile[block], bias, inv_temperature[block], overwrite=True)
        torch.gather(z, 1, ids[block, None], out=target[block, None])
        torch.amax(z, 1, out=maximum[block])
        # A row of -inf alone has no maximum to take off: NaN, as in log_softmax.
        torch.sum(z.sub_(maximum[block, None]).exp_(), 1, out=total[block])
    # In lse_fold's own order of operations, so that a policy and its reference scored there agree to the last bit.
    logp, lse = (target - maximum) - total.log(), maximum + total.log()
    loss, coef = _weigh_rows(logp, rows, spec, deferred)
    tile.scatter_add_(1, ids[:, None], -total[:, None])
    return FusedRows(logp, lse, loss, coef, -coef * inv_temperature * head.logit_scale / total)


def _weigh_rows(
    logp: torch.Tensor, rows: PolicyRows, spec: PolicySpec, deferred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if deferred:
        return torch.zeros_like(logp), torch.ones_like(logp)
    weight = None if rows.shift is None else asymmetric_weight(rows.shift, spec)
    x = None if rows.old is None else logp - rows.old
    terms = token_terms(logp, x, x, rows.ref, rows.advantage, weight, spec)
    counts = rows.scale != 0  # a row that does not may have an infinite divergence
    return torch.where(counts, terms.loss * rows.scale, 0), torch.where(
        counts, (terms.slope + terms.direct) * rows.scale, 0
    )


def _fused_triton(
    tile: torch.Tensor, ids: torch.Tensor, rows: PolicyRows, inv_temperature: torch.Tensor, spec: PolicySpec,
    bias: torch.Tensor | None, head: Head, out: torch.Tensor, deferred: bool,
) -> FusedRows:  # fmt: skip
    logp, lse, loss, coef = (torch.empty_like(inv_temperature) for _ in range(4))
    result = FusedRows(logp, lse, loss, coef, None)
    if not tile.shape[0]:
        return result
    ids, inv_temperature, bias, *vectors = dense(ids, inv_temperature, bias, *rows)  # type: ignore[assignment]
    rows = PolicyRows(*vectors)  # type: ignore[arg-type]
    with device_guard(tile):
        fused_policy_kernel[(tile.shape[0],)](
            tile, out, bias, ids, inv_temperature, rows.advantage, rows.scale, rows.old, rows.ref, rows.shift, *result[:4],
            tile.shape[1], tile.stride(0), out.stride(0), HAS_BIAS=bias is not None, HAS_OLD=rows.old is not None,
            HAS_REF=rows.ref is not None, HAS_SHIFT=rows.shift is not None, DEFERRED=deferred,
            OVERLAID=is_overlaid(tile, out), BLOCK=BLOCK, num_warps=NUM_WARPS, **head.kernel_arguments(), **kernel_arguments(spec),
        )  # fmt: skip
    return result


@jit
def fused_policy_kernel(
    tile_ptr, out_ptr, bias_ptr, ids_ptr, inv_temperature_ptr, advantage_ptr, scale_ptr, old_ptr, ref_ptr, shift_ptr,
    logp_ptr, lse_ptr, loss_ptr, coef_ptr, n_cols, row_stride, out_stride, logit_scale, softcap,
    positive_a, positive_b, negative_a, negative_b, beta, alpha,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_SHIFT: tl.constexpr,
    DEFERRED: tl.constexpr, OVERLAID: tl.constexpr, FORM: tl.constexpr, SHAPE: tl.constexpr, KL: tl.constexpr,
    CORRECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program scores, weighs and pulls back one row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * row_stride
    inv_temperature = tl.load(inv_temperature_ptr + row)
    target_id = tl.load(ids_ptr + row)

    maximum = -float("inf")
    total = 0.0
    target = -float("inf")
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < n_cols
        z = load_logits(row_ptr, bias_ptr, cols, inside, logit_scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
        target = tl.maximum(target, tl.max(tl.where(inside & (cols == target_id), z, -float("inf")), 0))
        peak = tl.maximum(maximum, tl.max(z, 0))
        anchor = tl.where(peak == -float("inf"), 0.0, peak)  # a row of -inf alone so far
        moved = tl.where(total > 0, maximum - anchor, 0.0)
        total = total * tl.exp(moved) + tl.sum(tl.exp(z - anchor), 0)
        maximum = peak
    lse = maximum + tl.log(total)
    logp = (target - maximum) - tl.log(total)

    loss = 0.0
    coef = 1.0
    if not DEFERRED:
        advantage = tl.load(advantage_ptr + row)
        scale = tl.load(scale_ptr + row)
        log_ratio = tl.zeros_like(logp)
        ref = logp
        weight = 1.0
        if HAS_OLD:
            log_ratio = logp - tl.load(old_ptr + row)
        if HAS_REF:
            ref = tl.load(ref_ptr + row)
        if HAS_SHIFT:
            weight = asymmetric_weight_kernel(tl.load(shift_ptr + row), alpha, SHAPE)
        loss, slope, direct, _kl, _low, _high = token_terms_kernel(
            logp, log_ratio, log_ratio, ref, advantage, weight, positive_a, positive_b, negative_a, negative_b, beta,
            FORM, HAS_REF, KL, CORRECTED,
        )  # fmt: skip
        loss = tl.where(scale == 0, 0.0, loss * scale)  # a row that does not count may have an infinite divergence
        coef = tl.where(scale == 0, 0.0, (slope + direct) * scale)
    tl.store(logp_ptr + row, logp)
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, loss)
    tl.store(coef_ptr + row, coef)

    tl.debug_barrier()  # out may be the tile: every read above is done before a write below
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < n_cols
        z = load_logits(row_ptr, bias_ptr, cols, inside, logit_scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
        gradient = tl.where(cols == target_id, coef, 0.0) - coef * tl.exp(z - lse)
        gradient = chain(gradient, z, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
        if OVERLAID:
            tl.debug_barrier()  # a narrower row lies over its own logits: all have read this block before any writes
        tl.store(out_ptr + row * out_stride + cols, gradient.to(out_ptr.dtype.element_ty), mask=inside)
