"""linear_exp: the lm_head's product, whose epilogue leaves what the backward pass needs of the logits instead of the logits.

    a_n = z[n, y_n]                  the anchor: one dot product a row
    E_nv = exp(z_nv - a_n)           what the tile holds, in the operands' dtype
    S'_n = sum of E_nv over v != y_n,   S_n = 1 + S'_n,   logp_n = -log1p(S'_n)
    E[n, y_n] := -S'_n               so that  dL/dz_n = (-coef_n / S_n) E_n

The anchor and the product add up the same H numbers, but not alike: tensor cores may truncate where a dot product rounds. So
the tile that holds the target says how far its logit lies from the anchor, d_n, and exp(d_n) takes the place of the 1 above.

The tile is the gradient but for a factor of each row, which goes on H elements of the row's hidden state rather than on V of
the tile. Nothing cancels where p is near 1. A bf16 E is a relative rounding of 2^-9, whatever the logit's size. The target's
entry is as large as all others together, so `total` is S times what rounding did to that entry: -coef / total times it is exact.
A row whose target is so unlikely that S' >= 2^60 (-logp > 41) is flagged on the device and computed again with its log-sum-exp
as anchor, by launches that return at once where nothing is flagged. Beyond, coef h / S would underflow in bf16.
Where the log-sum-exp is known, it is the anchor of all rows, E are probabilities, and the factor is known, too.
FLOPs: 2NVH. Bytes: those of linear_lse, and the tile once.
"""

from typing import NamedTuple

import torch

from rlvr_kernels._triton import dense, device_guard, expm1, jit, log1p, tl, triton
from rlvr_kernels.backend import use_triton
from rlvr_kernels.gemm import any_flagged, halves, locate, product, tiling
from rlvr_kernels.linear_lse import COMBINE_ROWS, COMBINE_TILES, Flags, fold_rows
from rlvr_kernels.logits import LogitMap, log2_logits, logit_of, row_blocks, subtract_at
from rlvr_kernels.lse_fold import RowState, Scores, state_of
from rlvr_kernels.shard import Shard
from rlvr_kernels.tile import multiply

LIMIT = 2.0**60
ANCHOR_BLOCK = 1024


class Exponentials(NamedTuple):
    """Of a tile's rows, all (n,): logp; total, the S of the factor -coef / S; anchor; entropy in nats, if asked for.

    total is the sum of exp(z - anchor), but for the target's rounding unless the tile is `raw`.
    """

    logp: torch.Tensor
    total: torch.Tensor
    anchor: torch.Tensor
    entropy: torch.Tensor | None


def linear_exp(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    logit_map: LogitMap,
    out: torch.Tensor,
    *,
    entropy: bool = False,
    raw: bool = False,
    shard: Shard | None = None,
    backend: str = "auto",
) -> Exponentials:
    """Leave E in `out` (n, V) for hidden (n, H) and weight (V, H). An id (n,) outside [0, V) is another shard's.

    The derivative of a softcap multiplies what is stored, not what is summed. `raw` stores exp(z - a) itself, at the target too.
    """
    run = _linear_exp_triton if use_triton(logit_map.inv_temperature, backend) else _linear_exp_torch
    return run(hidden, weight, ids, logit_map, out, entropy, raw, shard)


def linear_probabilities(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, first_col: int, logit_map: LogitMap, out: torch.Tensor,
    lse: torch.Tensor, factor: torch.Tensor | None = None, *, backend: str = "auto",
) -> None:  # fmt: skip
    """Leave factor (p - 1[v = y]), or p without a factor (n,), of rows whose log-sum-exp (n,) is known.

    The derivative of a softcap belongs to the former. weight (c, H), logit_map and out (n, c) are of the slice of the vocabulary
    that begins at `first_col`.
    """
    if use_triton(logit_map.inv_temperature, backend):
        _launch(hidden, weight, ids, first_col, logit_map, out, lse, given=factor, raw=factor is None)
        return
    multiply(hidden, weight.T, out=out)
    for rows in row_blocks(*out.shape):
        mine = None if factor is None else factor[rows]
        _leave_known(out[rows], ids[rows] - first_col, logit_map[rows, :], lse[rows], mine)


def _linear_exp_torch(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logit_map: LogitMap, out: torch.Tensor, entropy: bool,
    raw: bool, shard: Shard | None,
) -> Exponentials:  # fmt: skip
    """The PyTorch twin. It has the products in memory, so its anchor can be the row's maximum, which always holds."""
    multiply(hidden, weight.T, out=out)
    like = logit_map.inv_temperature
    anchor, total, target = torch.empty_like(like), torch.empty_like(like), torch.empty_like(like)
    weighted = torch.empty_like(like) if entropy else None
    inside = ids.clamp(0, out.shape[1] - 1)[:, None]
    for rows in row_blocks(*out.shape):
        local_map = logit_map[rows, :]
        z = local_map.logits(out[rows], overwrite=True)
        slope = None if raw or logit_map.softcap is None else local_map.softcap_slope(z)
        torch.gather(z, 1, inside[rows], out=target[rows, None])
        torch.amax(z, 1, out=anchor[rows])
        e = z.sub_(anchor[rows, None])  # a row of only -inf becomes NaN here, as in log_softmax
        below = None if weighted is None else e.clamp(min=-1e30)  # the clamp makes 0 * -inf 0
        torch.sum(e.exp_(), 1, out=total[rows])
        if below is not None and weighted is not None:
            torch.sum(below.mul_(e), 1, out=weighted[rows])
        _store(e, slope, out[rows])
    factor, log_total = total, total.log()
    found = Exponentials(
        (target - anchor) - log_total, total, anchor, None if weighted is None else log_total - weighted / total
    )
    if shard is not None:
        target = target.where(inside[:, 0] == ids, -float("inf"))
        state = shard.combine(RowState(anchor, total, target, weighted))
        factor = state.total * (state.maximum - anchor).exp()
        found = Exponentials(state.logp(), factor, anchor, state.entropy())
    if not raw:
        entry = (target - anchor).exp() - factor
        if logit_map.softcap is not None:
            entry *= logit_map.softcap_slope(target[:, None])[:, 0]
        found = found._replace(total=found.total * _enter(entry, out, ids))
    return found


def _enter(entry: torch.Tensor, out: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Write the targets' entries (n,); return what rounding multiplies them with, 1 where a target is another shard's."""
    inside = ids.clamp(0, out.shape[1] - 1)
    stored, here = entry.to(out.dtype), inside == ids
    out.scatter_(1, inside[:, None], stored.where(here, out.gather(1, inside[:, None])[:, 0])[:, None])
    return (stored / entry).where(here & (stored != 0), 1)


def _leave_known(
    block: torch.Tensor, local_ids: torch.Tensor, logit_map: LogitMap, lse: torch.Tensor, factor: torch.Tensor | None
) -> None:
    """Overwrite raw products (r, c) with factor (p - 1[v = y]), or with p."""
    z = logit_map.logits(block, overwrite=True)
    slope = None if factor is None or logit_map.softcap is None else logit_map.softcap_slope(z)
    p = torch.sub(z, lse[:, None], out=z).exp_()
    if factor is not None:
        subtract_at(p, local_ids, torch.ones_like(lse))
        p.mul_(factor[:, None])
    _store(p, slope, block)


def _store(e: torch.Tensor, slope: torch.Tensor | None, block: torch.Tensor) -> None:
    """Write e (r, c) times the slope to the block, whose memory it may be."""
    if slope is not None:
        e.mul_(slope)
    if e.data_ptr() != block.data_ptr():
        block.copy_(e)


def _linear_exp_triton(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logit_map: LogitMap, out: torch.Tensor, entropy: bool,
    raw: bool, shard: Shard | None,
) -> Exponentials:  # fmt: skip
    rows, like = hidden.shape[0], logit_map.inv_temperature
    logp, total, anchor, shift = (torch.empty_like(like) for _ in range(4))
    found = Exponentials(logp, total, anchor, torch.empty_like(like) if entropy else None)
    flags = Flags(torch.empty_like(ids, dtype=torch.int32), torch.zeros(1, dtype=torch.int32, device=ids.device))
    at_once = tiling(hidden, weight, out, 1 + entropy).rows_at_once(weight.shape[0], 1 + entropy)
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        mine = Exponentials(*(None if x is None else x[part] for x in found))  # type: ignore[arg-type]
        local = logit_map[part, :]
        _leave_part(hidden[part], weight, ids[part], local, out[part], mine, shift[part], flags.part(part), raw, shard)
    return found


def _leave_part(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logit_map: LogitMap, out: torch.Tensor,
    found: Exponentials, shift: torch.Tensor, flags: Flags, raw: bool, shard: Shard | None,
) -> None:  # fmt: skip
    """Write `found` and `out` of as many rows as have room for their partial sums. shift (n,) is d in log2 units."""
    (ids,) = dense(ids)  # type: ignore[assignment]
    numbers, entropy = logit_map.kernel_arguments(), found.entropy
    with device_guard(out):
        anchor_kernel[(hidden.shape[0],)](
            hidden, weight, ids, found.anchor, shift, weight.shape[0], hidden.shape[1], *hidden.stride(), *weight.stride(),
            SHARD=shard is not None, BLOCK=ANCHOR_BLOCK, num_warps=4, **numbers,
        )  # fmt: skip
        if shard is not None:
            found.anchor.copy_(shard.total(found.anchor))
        partials = _launch(
            hidden, weight, ids, 0, logit_map, out, found.anchor, shift, raw=raw, sums=1 + (entropy is not None)
        )
        if shard is not None:
            both = shard.total(torch.cat([partials.sum(1), shift[None]]))
            partials, shift = both[:-1, None], both[-1]
        combine_exp_kernel[(triton.cdiv(hidden.shape[0], COMBINE_ROWS),)](
            partials, out, ids, *found, shift, *flags, *out.shape, partials.shape[1], out.stride(0), partials.stride(0),
            LIMIT=LIMIT, RAW=raw, ENTROPY=entropy is not None, BLOCK_N=COMBINE_ROWS, BLOCK_S=COMBINE_TILES, num_warps=4,
            **numbers,
        )  # fmt: skip
        _fold_flagged(hidden, weight, ids, logit_map, found, flags, shard)
        _launch(hidden, weight, ids, 0, logit_map, out, found.anchor, shift, found.logp, flags, raw=raw)


def _fold_flagged(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logit_map: LogitMap, found: Exponentials, flags: Flags,
    shard: Shard | None,
) -> None:  # fmt: skip
    """Write logp, the log-sum-exp as anchor, and the entropy of the flagged rows. No host sync."""
    if shard is None:
        fold_rows(hidden, weight, ids, logit_map, Scores(found.logp, found.anchor, found.entropy), flags)
        return
    mine = Scores(*(None if x is None else x.clone() for x in (found.logp, found.anchor, found.entropy)))  # type: ignore[arg-type]
    fold_rows(hidden, weight, ids, logit_map, mine, flags)
    state = shard.combine(state_of(mine, weight.shape[0]))
    whole = (state.logp(), state.lse(), state.entropy())
    for old, new in zip((found.logp, found.anchor, found.entropy), whole, strict=True):
        if old is not None and new is not None:
            old.copy_(new.where(flags.rows != 0, old))


def _launch(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, first_col: int, logit_map: LogitMap, out: torch.Tensor,
    anchor: torch.Tensor, shift: torch.Tensor | None = None, given: torch.Tensor | None = None, flags: Flags | None = None, *,
    raw: bool, sums: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Launch the product; return its partial sums (sums, tiles, n), and write shift. Without sums, the anchor is the log-sum-exp.

    With flags, it is that of the flagged rows alone, and the entry at each target is made of the logp given, and shift. Without
    sums and flags, the factor is given.
    """
    (n, h), v, tile = hidden.shape, weight.shape[0], tiling(hidden, weight, out, sums)
    partials = torch.empty((sums, triton.cdiv(v, tile.cols), n), dtype=torch.float32, device=out.device)
    ids, inv_temperature, anchor, bias, given = dense(ids, logit_map.inv_temperature, anchor, logit_map.bias, given)  # type: ignore[assignment]
    flag_rows, flag_any = (None, None) if flags is None else flags
    if n:
        with device_guard(out):
            linear_exp_kernel[(tile.programs(n, v, out.device, flags is not None),)](
                tile.operand(hidden, tile.rows), tile.operand(weight, tile.cols),
                tile.operand(out, tile.rows, tile.cols // tile.parts), bias, ids, inv_temperature, anchor, shift, given,
                flag_rows, flag_any, partials, n, v, h, first_col, *hidden.stride(), *weight.stride(), out.stride(0),
                partials.stride(0), HAS_BIAS=bias is not None, SUMS=sums > 0, ENTROPY=sums > 1, KNOWN=not sums and flags is None,
                FLAGGED=flags is not None, RAW=raw, **tile.constants(h, flags is not None), **logit_map.kernel_numbers(),
            )  # fmt: skip
    return partials


@jit
def anchor_kernel(
    hidden_ptr, weight_ptr, ids_ptr, anchor_ptr, shift_ptr, n_cols, n_inner, hidden_stride, hidden_inner_stride, weight_stride,
    weight_inner_stride, bias_ptr, inv_temperature_ptr, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SHARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes one target's logit. An id outside the columns has -inf, or 0 if it is another shard's."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.load(ids_ptr + row).to(tl.int64)
    held = (col >= 0) & (col < n_cols)
    total = tl.zeros((BLOCK,), tl.float32)
    end = tl.where(held, n_inner, 0)  # in the place of a mask with held, which Triton 3.9's interpreter refuses
    for start in range(0, n_inner, BLOCK):
        inner = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = inner < end
        state = tl.load(hidden_ptr + row * hidden_stride + inner * hidden_inner_stride, mask=inside, other=0.0)
        column = tl.load(weight_ptr + col * weight_stride + inner * weight_inner_stride, mask=inside, other=0.0)
        total += state.to(tl.float32) * column.to(tl.float32)
    z = tl.sum(total, 0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + col, mask=held, other=0.0).to(tl.float32)
    z = logit_of(z, tl.load(inv_temperature_ptr + row), logit_scale, softcap, HAS_SOFTCAP)
    tl.store(anchor_ptr + row, tl.where(held, z, 0.0 if SHARD else -float("inf")))
    tl.store(shift_ptr + row, 0.0)  # the tile that holds the target says how far its logit lies from this


@jit
def linear_exp_kernel(
    hidden, weight, out, bias_ptr, ids_ptr, inv_temperature_ptr, anchor_ptr, shift_ptr, given_ptr, flags_ptr, any_ptr, partials_ptr,
    n_rows, n_cols, n_inner, first_col_id, hidden_stride, hidden_inner_stride, weight_stride, weight_inner_stride, out_stride,
    partial_stride, logit_scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    EVEN_H: tl.constexpr, UPCAST: tl.constexpr, DESCRIBED: tl.constexpr, FLATTENED: tl.constexpr, SPECIALIZED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SUMS: tl.constexpr, ENTROPY: tl.constexpr, KNOWN: tl.constexpr,
    FLAGGED: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """One program leaves every num_programs-th tile of BLOCK_N x BLOCK_V exponentials, and its rows' sums."""
    if DESCRIBED:
        tl.assume(n_inner > 0)
    row_blocks = tl.cdiv(n_rows, BLOCK_N)
    tiles = tl.cdiv(n_cols, BLOCK_V)
    items = row_blocks * tiles
    if FLAGGED:
        items = tl.where(tl.load(any_ptr) != 0, items, 0)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTENED, warp_specialize=SPECIALIZED):
        first_row, first_col, tile = locate(item, row_blocks, tiles, GROUP, BLOCK_N, BLOCK_V)
        wanted = True
        if FLAGGED:
            wanted = any_flagged(flags_ptr, first_row, n_rows, BLOCK_N)
        if wanted:
            z = product(
                hidden, weight, first_row, first_col, n_rows, n_cols, n_inner, hidden_stride, hidden_inner_stride,
                weight_stride, weight_inner_stride, BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, UPCAST, DESCRIBED,
            )  # fmt: skip
            rows = first_row + tl.arange(0, BLOCK_N)  # not before the product, where they would occupy registers
            present = rows < n_rows
            ids = tl.load(ids_ptr + rows, mask=present, other=-1) - first_col_id
            ids = tl.where((ids >= 0) & (ids < n_cols), ids, -1).to(tl.int32)  # no id can equal a column past the last
            inv_temperature = tl.load(inv_temperature_ptr + rows, mask=present, other=0.0)
            anchor = tl.load(anchor_ptr + rows, mask=present, other=0.0)
            entry = tl.zeros((BLOCK_N,), tl.float32)
            if KNOWN and not RAW:
                entry = tl.load(given_ptr + rows, mask=present, other=0.0)
            if FLAGGED:
                flagged = tl.load(flags_ptr + rows, mask=present, other=0) != 0
                logp = tl.load(given_ptr + rows, mask=present, other=0.0)
                shift = tl.load(shift_ptr + rows, mask=present, other=0.0)
                entry = target_entry(logp, anchor, shift, flagged, inv_temperature, softcap, HAS_SOFTCAP, RAW)
            anchor *= 1.4426950408889634
            total, weighted = _leave_tile(
                z, first_row, first_col, out, out_stride, rows, present, ids, inv_temperature, anchor, entry, shift_ptr,
                bias_ptr, n_cols, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, SUMS, ENTROPY, KNOWN, RAW, DESCRIBED, PARTS,
            )  # fmt: skip
            if SUMS:
                at = partials_ptr + tile.to(tl.int64) * n_rows
                tl.store(at + rows, total, mask=present)
                if ENTROPY:
                    tl.store(at + partial_stride + rows, weighted, mask=present)


@jit
def _leave_tile(
    z, first_row, first_col, out, out_stride, rows, present, ids, inv_temperature, anchor, entry, shift_ptr, bias_ptr, n_cols,
    logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SUMS: tl.constexpr, ENTROPY: tl.constexpr,
    KNOWN: tl.constexpr, RAW: tl.constexpr, DESCRIBED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store raw z (n, c) as exponentials, part after part; sums (n,) of e and e (z - a) without the target, in log2 units.

    entry (n,) is that of the target, or, where the log-sum-exp is known, the factor.
    """
    if PARTS > 1:
        left, right = halves(z)
        t0, w0 = _leave_tile(
            left, first_row, first_col, out, out_stride, rows, present, ids, inv_temperature, anchor, entry, shift_ptr,
            bias_ptr, n_cols, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, SUMS, ENTROPY, KNOWN, RAW, DESCRIBED, PARTS // 2,
        )  # fmt: skip
        t1, w1 = _leave_tile(
            right, first_row, first_col + z.shape[1] // 2, out, out_stride, rows, present, ids, inv_temperature, anchor,
            entry, shift_ptr, bias_ptr, n_cols, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, SUMS, ENTROPY, KNOWN, RAW,
            DESCRIBED, PARTS // 2,
        )  # fmt: skip
        total, weighted = t0 + t1, w0 + w1
    else:
        cols = first_col + tl.arange(0, z.shape[1])
        z, slope = log2_logits(
            z, cols, bias_ptr, 1, inv_temperature, n_cols, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP
        )
        below = z - anchor[:, None]
        e = tl.exp2(below)
        if first_col + z.shape[1] > n_cols:
            e = tl.where((cols < n_cols)[None, :], e, 0.0)
        target = cols[None, :] == ids[:, None]
        if SUMS:
            held = (ids >= first_col) & (ids < first_col + z.shape[1])  # true in one tile at most
            if tl.max(held.to(tl.int32), 0) > 0:  # most tiles hold no row's target
                tl.store(shift_ptr + rows, tl.max(tl.where(target, below, -float("inf")), 1), mask=held)
        if not KNOWN:
            e = tl.where(target, 0.0, e)
        elif not RAW:
            e = tl.where(target, e - 1.0, e)
        weighted = 0.0
        if ENTROPY:
            total, weighted = tl.reduce((e, e * tl.maximum(below, -1e30)), 1, add_both)  # 0 * -inf would be NaN
        else:
            total = tl.sum(e, 1)
        if HAS_SOFTCAP and not RAW:
            e *= slope
        if KNOWN and not RAW:
            e *= entry[:, None]
        if not KNOWN:
            e = tl.where(target, entry[:, None], e)
        if DESCRIBED:
            out.store([first_row, first_col], e.to(out.dtype))
        else:
            at = out + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
            tl.store(at, e.to(out.dtype.element_ty), mask=present[:, None] & (cols < n_cols)[None, :])
    return total, weighted


@jit
def add_both(a, b, c, d):
    """Two sums in one reduction."""
    return a + c, b + d


@jit
def target_entry(logp, anchor, shift, known, inv_temperature, softcap, HAS_SOFTCAP: tl.constexpr, RAW: tl.constexpr):
    """E (n,) at the target from logp, with shift in log2 units; `known`: the anchor is the log-sum-exp."""
    if RAW:
        entry = tl.where(known, tl.exp(logp), tl.exp2(shift))
    else:
        entry = tl.where(known, expm1(logp), -tl.exp2(shift) * expm1(-logp))
        if HAS_SOFTCAP:
            capped = (anchor + tl.where(known, logp, shift * 0.6931471805599453)) / (inv_temperature * softcap)
            entry *= 1.0 - capped * capped
    return entry


@jit
def combine_exp_kernel(
    partials_ptr, out_ptr, ids_ptr, logp_ptr, total_ptr, anchor_ptr, entropy_ptr, shift_ptr, flags_ptr, any_ptr, n_rows,
    n_cols, n_tiles, out_stride, partial_stride, bias_ptr, inv_temperature_ptr, logit_scale, softcap,
    LIMIT: tl.constexpr, RAW: tl.constexpr, ENTROPY: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program adds up the tiles of BLOCK_N rows, writes the targets' entries and flags rows whose anchor does not hold.

    A flagged row's logp is -inf, as `fold_rows` takes it.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = rows < n_rows
    rest = tl.zeros((BLOCK_N,), tl.float32)
    weighted = rest
    for start in range(0, n_tiles, BLOCK_S):
        tiles = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = (tiles < n_tiles)[:, None] & present[None, :]
        at = partials_ptr + tiles[:, None] * n_rows + rows[None, :]
        rest += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        if ENTROPY:
            weighted += tl.sum(tl.load(at + partial_stride, mask=inside, other=0.0), 0)
    holds = rest < LIMIT
    shift = tl.load(shift_ptr + rows, mask=present, other=0.0)
    own = tl.exp2(shift)
    total = own + rest
    logp = -log1p(rest / own)
    tl.store(logp_ptr + rows, tl.where(holds, logp, -float("inf")), mask=present)
    if ENTROPY:
        spread = 0.6931471805599453 * (shift - (weighted + own * shift) / total) - logp
        tl.store(entropy_ptr + rows, spread, mask=present)
    tl.store(flags_ptr + rows, (~holds).to(tl.int32), mask=present)
    if tl.max((present & ~holds).to(tl.int32), 0) > 0:
        tl.store(any_ptr, 1)  # by any number of programs, all the same
    anchor = tl.load(anchor_ptr + rows, mask=present, other=0.0)
    inv_temperature = tl.load(inv_temperature_ptr + rows, mask=present, other=1.0)
    entry = target_entry(logp, anchor, shift, rows < 0, inv_temperature, softcap, HAS_SOFTCAP, RAW)
    stored = entry.to(out_ptr.dtype.element_ty)
    cols = tl.load(ids_ptr + rows, mask=present, other=-1).to(tl.int64)
    held = present & (cols >= 0) & (cols < n_cols)
    if not RAW:  # a slice without the target has nothing to make up for
        rounded = stored.to(tl.float32)
        total *= tl.where(held & (rounded != 0.0), rounded / entry, 1.0)
    tl.store(total_ptr + rows, tl.where(holds, total, 1.0), mask=present)
    tl.store(out_ptr + rows.to(tl.int64) * out_stride + cols, stored, mask=held)
