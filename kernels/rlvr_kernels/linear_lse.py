"""linear_lse: log-probabilities and log-sum-exps of an lm_head in one matmul whose logits never leave the registers.

    z = h W^T through bias, scale, softcap and temperature,   lse_n = log sum_j exp z_nj,   logp_n = z_n,id(n) - lse_n

The product is that of gemm.py. Its epilogue folds each tile to a maximum, a sum and what the statistics asked for need per
row, and writes those. A second kernel combines each row's tiles.
FLOPs: 2NVH. Bytes: the weight N / (rows * GROUP) times, the hidden states about once, and 8 per row and tile.
"""

from typing import NamedTuple

import torch

from rlvr_kernels._triton import dense, device_guard, jit, tl, triton
from rlvr_kernels.backend import use_triton
from rlvr_kernels.checks import check_logits
from rlvr_kernels.gemm import any_flagged, halves, locate, product, tiling
from rlvr_kernels.logits import LogitMap, accumulator_dtype, log2_logits
from rlvr_kernels.lse_fold import RowState, Scores, lse_fold

COMBINE_ROWS, COMBINE_TILES = 32, 64
TWIN_ROWS, TWIN_COLS = 512, 1024  # 2 MiB of float32 logits


@torch.no_grad()
def linear_lse(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (logp, lse), both (N,), of hidden (N, H) under an lm_head weight (V, H) and bias (V,). Has no gradient.

    Equal to `z = logit_scale * (hidden @ weight.T + bias)`, `z = softcap * tanh(z / softcap)` if there is a softcap,
    `z = z / temperature`, `lse = z.logsumexp(1)`, `logp = z[arange(N), ids] - lse`, accumulated in float32 (float64 for
    float64 tensors, by the twin). `temperature` is a number or one per row, (N,). A bias of -inf masks a token.
    Allocates nothing of size (N, V), and takes any strides. The same inputs give the same bits, and on Triton a row's bits do
    not depend on the rows beside it. An id outside [0, V) has logp -inf.

    Raises:
        ValueError: a shape, a dtype or a device does not fit, or backend="triton" cannot run here.
    """
    check_logits(logit_scale, softcap)
    _check(hidden, weight, ids, bias)
    inv_temperature = _inverse(temperature, hidden, accumulator_dtype(torch.promote_types(hidden.dtype, weight.dtype)))
    logit_map = LogitMap(inv_temperature, bias, logit_scale, softcap)
    if use_triton(inv_temperature, backend):
        return linear_scores(hidden, weight, ids, logit_map)[:2]
    return _linear_lse_torch(hidden, weight, ids, logit_map)


def _check(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Refuse tensors that do not fit together."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape (N, H), got {tuple(hidden.shape)}: flatten the rollouts first.")
    n, h = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != h or not weight.shape[0]:
        raise ValueError(f"weight must have shape (V, H) = (V, {h}) like hidden (N, H), got {tuple(weight.shape)}.")
    for name, tensor, length in (("ids", ids, n), ("bias", bias, weight.shape[0])):
        if tensor is not None and tensor.shape != (length,):
            raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}.")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be int64 or int32, got {ids.dtype}.")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}.")
    for name, tensor in (("weight", weight), ("ids", ids), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden, got {tensor.device}.")


def _inverse(temperature: float | torch.Tensor, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 / temperature for every row, (N,)."""
    rows = hidden.shape[0]
    if not isinstance(temperature, torch.Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}.")
        return torch.full((rows,), 1 / temperature, dtype=dtype, device=hidden.device)
    if temperature.shape not in ((), (rows,)):
        raise ValueError(
            f"temperature must be a number or have shape (N,) = ({rows},), got {tuple(temperature.shape)}."
        )
    return temperature.to(hidden.device, dtype).expand(rows).reciprocal()


def _linear_lse_torch(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logit_map: LogitMap
) -> tuple[torch.Tensor, torch.Tensor]:
    """The PyTorch twin: fold one block of TWIN_ROWS x TWIN_COLS logits at a time."""
    rows, dtype = hidden.shape[0], logit_map.inv_temperature.dtype
    state = RowState.empty(rows, logit_map.inv_temperature)
    for first_col in range(0, weight.shape[0], TWIN_COLS):
        slab = slice(first_col, first_col + TWIN_COLS)
        columns = weight[slab].to(dtype).T
        for start in range(0, rows, TWIN_ROWS):
            block = slice(start, start + TWIN_ROWS)
            products = hidden[block].to(dtype) @ columns
            lse_fold(products, ids[block], first_col, state[block], logit_map[block, slab], "torch")
    return state.logp(), state.lse()


class Flags(NamedTuple):
    """rows (n,) int32: not 0 where a row is to be computed, any (1,) int32: whether there is one. On the device."""

    rows: torch.Tensor
    any: torch.Tensor

    def part(self, rows: slice) -> "Flags":
        """The flags of some of the rows."""
        return Flags(self.rows[rows], self.any)


def linear_scores(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logit_map: LogitMap, *, entropy: bool = False,
    mean: bool = False, top1: bool = False, squares: bool = False,
) -> Scores:  # fmt: skip
    """`linear_lse` with the statistics asked for, by the kernels."""
    row = logit_map.inv_temperature
    kinds = ((entropy, row.dtype), (mean, row.dtype), (top1, torch.bool), (squares, row.dtype))
    asked = [torch.empty_like(row, dtype=dtype) if wanted else None for wanted, dtype in kinds]
    scores = Scores(torch.full_like(row, -float("inf")), torch.empty_like(row), *asked)
    fold_rows(hidden, weight, ids, logit_map, scores)
    return scores


def fold_rows(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logit_map: LogitMap, scores: Scores,
    flags: Flags | None = None,
) -> None:  # fmt: skip
    """Write scores, whose logp is -inf on entry: of all rows, or of those flagged.

    Launches both kernels on as many rows at a time as PARTIAL_BYTES allows.
    """
    (rows, h), v = hidden.shape, weight.shape[0]
    bias = logit_map.bias
    with device_guard(hidden):
        tile = tiling(hidden, weight)
        wanted = {"ENTROPY": scores.entropy is not None, "MEAN": scores.mean_logit is not None}
        wanted |= {"SQUARES": scores.sum_p_squared is not None, "FLAGGED": flags is not None}
        count = 2 + sum([wanted["ENTROPY"], wanted["MEAN"], wanted["SQUARES"]])
        tiles, at_once = triton.cdiv(v, tile.cols), tile.rows_at_once(v, count)
        partials = torch.empty((count, tiles, min(rows, at_once)), dtype=torch.float32, device=hidden.device)
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            n, mine = min(rows - start, at_once), scores.part(part)
            (inv_temperature,), states = dense(logit_map.inv_temperature[part]), hidden[part]
            flag_rows, flag_any = (None, None) if flags is None else flags.part(part)
            linear_lse_kernel[(tile.programs(n, v, hidden.device, flags is not None),)](
                tile.operand(states, tile.rows), tile.operand(weight, tile.cols), bias, ids[part], inv_temperature,
                mine.logp, flag_rows, flag_any, partials, n, v, h, *hidden.stride(), *weight.stride(), ids.stride(0),
                0 if bias is None else bias.stride(0), partials.stride(1), partials.stride(0), HAS_BIAS=bias is not None,
                **tile.constants(h, flags is not None), **logit_map.kernel_numbers(), **wanted,
            )  # fmt: skip
            combine_tiles_kernel[(triton.cdiv(n, COMBINE_ROWS),)](
                partials, *mine, flag_rows, flag_any, n, tiles, v, partials.stride(1), partials.stride(0),
                TOP1=mine.top1 is not None, BLOCK_N=COMBINE_ROWS, BLOCK_S=COMBINE_TILES, num_warps=4, **wanted,
            )  # fmt: skip


@jit
def linear_lse_kernel(
    hidden, weight, bias_ptr, ids_ptr, inv_temperature_ptr, target_ptr, flags_ptr, any_ptr, partials_ptr, n_rows, n_cols,
    n_inner, hidden_stride, hidden_inner_stride, weight_stride, weight_inner_stride, ids_stride, bias_stride, tile_stride,
    partial_stride, logit_scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    EVEN_H: tl.constexpr, UPCAST: tl.constexpr, DESCRIBED: tl.constexpr, FLATTENED: tl.constexpr, SPECIALIZED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, MEAN: tl.constexpr, SQUARES: tl.constexpr,
    FLAGGED: tl.constexpr,
):  # fmt: skip
    """One program folds every num_programs-th tile of BLOCK_N x BLOCK_V logits to a few numbers per row, base 2."""
    if DESCRIBED:
        tl.assume(n_inner > 0)
    row_blocks = tl.cdiv(n_rows, BLOCK_N)
    tiles = tl.cdiv(n_cols, BLOCK_V)
    items = row_blocks * tiles
    if FLAGGED:
        items = tl.where(tl.load(any_ptr) != 0, items, 0)
    # Flattened, all tiles' steps over H are one loop, whose loads run ahead across the end of a tile.
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
            inv_temperature = tl.load(inv_temperature_ptr + rows, mask=present, other=0.0)
            ids = tl.load(ids_ptr + rows.to(tl.int64) * ids_stride, mask=present, other=-1)
            ids = tl.where((ids >= 0) & (ids < n_cols), ids, -1).to(tl.int32)  # no id can equal a column past V
            if FLAGGED:  # the others keep their logp
                ids = tl.where(tl.load(flags_ptr + rows, mask=present, other=0) != 0, ids, -1)
            maximum, total, weighted, summed, squared = _fold_tile(
                z, first_col, ids, target_ptr + rows, bias_ptr, bias_stride, inv_temperature, n_cols, logit_scale, softcap,
                HAS_BIAS, HAS_SOFTCAP, ENTROPY, MEAN, SQUARES, PARTS,
            )  # fmt: skip
            out = partials_ptr + tile.to(tl.int64) * tile_stride
            tl.store(out + rows, maximum, mask=present)
            tl.store(out + partial_stride + rows, total, mask=present)
            if ENTROPY:
                tl.store(out + 2 * partial_stride + rows, weighted, mask=present)
            if MEAN:
                tl.store(out + (2 + ENTROPY) * partial_stride + rows, summed, mask=present)
            if SQUARES:
                tl.store(out + (2 + ENTROPY + MEAN) * partial_stride + rows, squared, mask=present)


@jit
def _fold_tile(
    z, first_col, ids, target_ptrs, bias_ptr, bias_stride, inv_temperature, n_cols, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, MEAN: tl.constexpr, SQUARES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Store the targets found in raw z (n, c) and fold it, part after part: (n,) numbers of each row, in log2 units.

    Maximum m, sum of e = exp2(z - m), and where asked for sums of e (z - m), of z and of e^2.
    """
    if PARTS > 1:
        left, right = halves(z)
        m0, t0, w0, s0, q0 = _fold_tile(
            left, first_col, ids, target_ptrs, bias_ptr, bias_stride, inv_temperature, n_cols, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, ENTROPY, MEAN, SQUARES, PARTS // 2,
        )  # fmt: skip
        m1, t1, w1, s1, q1 = _fold_tile(
            right, first_col + z.shape[1] // 2, ids, target_ptrs, bias_ptr, bias_stride, inv_temperature, n_cols,
            logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, ENTROPY, MEAN, SQUARES, PARTS // 2,
        )  # fmt: skip
        maximum = tl.maximum(m0, m1)
        anchor = tl.where(maximum == -float("inf"), 0.0, maximum)
        t0, w0, q0 = _lower(m0, anchor, t0, w0, q0, ENTROPY, SQUARES)
        t1, w1, q1 = _lower(m1, anchor, t1, w1, q1, ENTROPY, SQUARES)
        total, weighted, summed, squared = t0 + t1, w0 + w1, s0 + s1, q0 + q1
    else:
        cols = first_col + tl.arange(0, z.shape[1])
        z, _ = log2_logits(
            z, cols, bias_ptr, bias_stride, inv_temperature, n_cols, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP
        )
        summed, weighted, squared = 0.0, 0.0, 0.0
        if MEAN:
            summed = tl.sum(tl.where((cols < n_cols)[None, :], z, 0.0), 1)
        if first_col + z.shape[1] > n_cols:
            z = tl.where((cols < n_cols)[None, :], z, -float("inf"))
        held = (ids >= first_col) & (ids < first_col + z.shape[1])  # true in one tile at most
        if tl.max(held.to(tl.int32), 0) > 0:  # most tiles hold no row's target
            tl.store(target_ptrs, tl.max(tl.where(cols[None, :] == ids[:, None], z, -float("inf")), 1), mask=held)
        maximum = tl.max(z, 1)
        anchor = tl.where(maximum == -float("inf"), 0.0, maximum)  # every column may be masked
        below = z - anchor[:, None]
        e = tl.exp2(below)
        total = tl.sum(e, 1)
        if ENTROPY:
            weighted = tl.sum(e * tl.maximum(below, -1e30), 1)  # 0 * -inf would be NaN
        if SQUARES:
            squared = tl.sum(e * e, 1)
    return maximum, total, weighted, summed, squared


@jit
def _lower(maximum, anchor, total, weighted, squared, ENTROPY: tl.constexpr, SQUARES: tl.constexpr):
    """The sums that were taken below `maximum`, below `anchor`, which is no smaller."""
    moved = tl.where(total > 0, maximum - anchor, 0.0)  # NaN stays
    factor = tl.exp2(moved)
    if ENTROPY:
        weighted = (weighted + total * moved) * factor
    if SQUARES:
        squared *= factor * factor
    return total * factor, weighted, squared


@jit
def combine_tiles_kernel(
    partials_ptr, logp_ptr, lse_ptr, entropy_ptr, mean_ptr, top1_ptr, squares_ptr, flags_ptr, any_ptr, n_rows, n_tiles,
    n_cols, tile_stride, partial_stride,
    ENTROPY: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr, SQUARES: tl.constexpr, FLAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program combines the tiles of BLOCK_N rows; logp holds the target's logit on entry, its log-probability on exit."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = rows < n_rows
    last = n_tiles
    if FLAGGED:
        last = tl.where(tl.load(any_ptr) != 0, n_tiles, 0)
        present = present & (tl.load(flags_ptr + rows, mask=present, other=0) != 0)
    maximum = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = total
    summed = total
    squared = total
    for start in range(0, last, BLOCK_S):
        tiles = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = (tiles < n_tiles)[:, None] & present[None, :]
        at = partials_ptr + tiles[:, None] * tile_stride + rows[None, :]
        maxima = tl.load(at, mask=inside, other=-float("inf"))
        totals = tl.load(at + partial_stride, mask=inside, other=0.0)
        more = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
        squares = more
        if ENTROPY:
            more = tl.load(at + 2 * partial_stride, mask=inside, other=0.0)
        if MEAN:
            summed += tl.sum(tl.load(at + (2 + ENTROPY) * partial_stride, mask=inside, other=0.0), 0)
        if SQUARES:
            squares = tl.load(at + (2 + ENTROPY + MEAN) * partial_stride, mask=inside, other=0.0)
        peak = tl.maximum(maximum, tl.max(maxima, 0))
        anchor = tl.where(peak == -float("inf"), 0.0, peak)
        total, weighted, squared = _lower(maximum, anchor, total, weighted, squared, ENTROPY, SQUARES)
        totals, more, squares = _lower(maxima, anchor[None, :], totals, more, squares, ENTROPY, SQUARES)
        total += tl.sum(totals, 0)
        if ENTROPY:
            weighted += tl.sum(more, 0)
        if SQUARES:
            squared += tl.sum(squares, 0)
        maximum = peak
    log_total = tl.log2(tl.where(total == 0, 1.0, total))  # a fully masked row's lse is its maximum, -inf
    target = tl.load(logp_ptr + rows, mask=present, other=0.0)
    ln_2 = 0.6931471805599453
    tl.store(lse_ptr + rows, (maximum + log_total) * ln_2, mask=present)
    # In this order of operations a one-hot row gives exactly 0.
    tl.store(logp_ptr + rows, ((target - maximum) - log_total) * ln_2, mask=present)
    if ENTROPY:
        tl.store(entropy_ptr + rows, (log_total - weighted / total) * ln_2, mask=present)
    if MEAN:
        tl.store(mean_ptr + rows, summed * (ln_2 / n_cols), mask=present)
    if TOP1:
        tl.store(top1_ptr + rows, target == maximum, mask=present)
    if SQUARES:
        tl.store(squares_ptr + rows, squared / (total * total), mask=present)
