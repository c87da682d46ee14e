"""linear_lse: log-probabilities and log-sum-exps of an lm_head in one matmul whose logits never leave the registers.

    z = h W^T through bias, scale, softcap and temperature,   lse_n = log sum_j exp z_nj,   logp_n = z_n,id(n) - lse_n

A program takes one tile of logits after another: it accumulates the tile over H, folds it to a maximum and a sum per row,
and writes those. A second kernel combines each row's tiles. Programs walk the tiles of GROUP row blocks side by side, so a
slice of the weight comes from memory once per group, and from L2 after that.
FLOPs: 2NVH. Bytes: the weight N / (rows * GROUP) times, the hidden states about once, and 8 per row and tile.
The tiles depend on V and never on N, and their order does not matter: a row's bits do not depend on the rows beside it.
"""

from typing import Any

import torch

from rlvr_kernels._triton import device_guard, jit, tl, triton
from rlvr_kernels.backend import use_triton
from rlvr_kernels.checks import check_logits
from rlvr_kernels.linear_lse_tiling import Tiling, tiling
from rlvr_kernels.logits import LogitMap, accumulator_dtype
from rlvr_kernels.lse_fold import RowState, lse_fold

GROUP = 8  # row blocks that share each read of the weight
PARTIAL_BYTES = 40 << 20  # maxima and sums held at a time: 8704 rows of 151936 columns in tiles of 256
PROCESSORS = 4  # assumed if there is no GPU to ask
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
    run = _linear_lse_triton if use_triton(inv_temperature, backend) else _linear_lse_torch
    return run(hidden, weight, ids, logit_map)


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


def _linear_lse_triton(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logit_map: LogitMap
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch both kernels on as many rows at a time as PARTIAL_BYTES allows."""
    (rows, h), v = hidden.shape, weight.shape[0]
    inv_temperature, bias = logit_map.inv_temperature, logit_map.bias
    logp = torch.full_like(inv_temperature, -float("inf"))
    lse = torch.empty_like(inv_temperature)
    with device_guard(hidden):
        tile = tiling(hidden, weight)
        tiles = triton.cdiv(v, tile.cols)
        at_once = max(1, PARTIAL_BYTES // (8 * tiles * tile.rows)) * tile.rows
        maxima, totals = torch.empty((2, tiles, min(rows, at_once)), dtype=torch.float32, device=hidden.device)
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            n = min(rows - start, at_once)
            items = triton.cdiv(n, tile.rows) * tiles
            linear_lse_kernel[(_programs(items, tile, hidden.device),)](
                _operand(hidden[part], tile.rows, tile), _operand(weight, tile.cols, tile), bias, ids[part],
                inv_temperature[part], logp[part], maxima, totals, n, v, h, *hidden.stride(), *weight.stride(),
                ids.stride(0), 0 if bias is None else bias.stride(0), maxima.stride(0),
                BLOCK_N=tile.rows, BLOCK_V=tile.cols, BLOCK_H=tile.inner, GROUP=GROUP, EVEN_H=h % tile.inner == 0,
                UPCAST=tile.upcast, DESCRIBED=tile.described, SPECIALIZED=tile.specialized, HALVED=tile.halved,
                HAS_BIAS=bias is not None, num_warps=tile.num_warps, num_stages=tile.num_stages, **logit_map.kernel_numbers(),
            )  # fmt: skip
            combine_tiles_kernel[(triton.cdiv(n, COMBINE_ROWS),)](
                maxima, totals, logp[part], lse[part], n, tiles, maxima.stride(0),
                BLOCK_N=COMBINE_ROWS, BLOCK_S=COMBINE_TILES, num_warps=4,
            )  # fmt: skip
    return logp, lse


def _operand(matrix: torch.Tensor, block: int, tile: Tiling) -> Any:
    """The matrix as the kernel takes it: a tensor descriptor of blocks (block, inner), or the tensor itself."""
    if not tile.described:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [block, tile.inner])


def _programs(items: int, tile: Tiling, device: torch.device) -> int:
    """How many programs to launch: one per tile, or, with descriptors, as many as the GPU holds at a time."""
    if not tile.described:
        return items
    cuda = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else PROCESSORS
    return min(items, processors * tile.per_processor)


@jit
def linear_lse_kernel(
    hidden, weight, bias_ptr, ids_ptr, inv_temperature_ptr, target_ptr, maxima_ptr, totals_ptr, n_rows, n_cols, n_inner,
    hidden_stride, hidden_inner_stride, weight_stride, weight_inner_stride, ids_stride, bias_stride, tile_stride,
    logit_scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr, DESCRIBED: tl.constexpr, SPECIALIZED: tl.constexpr, HALVED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program folds every num_programs-th tile of BLOCK_N x BLOCK_V logits to maxima and sums (BLOCK_N,), base 2."""
    if DESCRIBED:
        tl.assume(n_inner > 0)
    row_blocks = tl.cdiv(n_rows, BLOCK_N)
    tiles = tl.cdiv(n_cols, BLOCK_V)
    # Flattened, all tiles' steps over H are one loop, whose loads run ahead across the end of a tile.
    for item in tl.range(
        tl.program_id(0), row_blocks * tiles, tl.num_programs(0), flatten=DESCRIBED, warp_specialize=SPECIALIZED
    ):
        first_block = item // (GROUP * tiles) * GROUP
        group_size = tl.minimum(row_blocks - first_block, GROUP)
        within = item % (GROUP * tiles)
        tile = within // group_size
        first_row = (first_block + within % group_size) * BLOCK_N
        first_col = tile * BLOCK_V
        if not DESCRIBED:  # past the end, load the last row or column again; its result is dropped below
            safe_rows = tl.minimum(first_row + tl.arange(0, BLOCK_N), n_rows - 1).to(tl.int64)
            safe_cols = tl.minimum(first_col + tl.arange(0, BLOCK_V), n_cols - 1).to(tl.int64)
            inner = tl.arange(0, BLOCK_H).to(tl.int64)
            a_ptrs = hidden + safe_rows[:, None] * hidden_stride + inner[None, :] * hidden_inner_stride
            b_ptrs = weight + safe_cols[None, :] * weight_stride + inner[:, None] * weight_inner_stride
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in range(0, n_inner, BLOCK_H):
            if DESCRIBED:
                a = hidden.load([first_row, start])
                b = weight.load([first_col, start]).T
            elif EVEN_H:
                a = tl.load(a_ptrs)
                b = tl.load(b_ptrs)
            else:
                a = tl.load(a_ptrs, mask=(inner < n_inner - start)[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=(inner < n_inner - start)[:, None], other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            z = tl.dot(a, b, z, input_precision="ieee")
            if not DESCRIBED:
                a_ptrs += BLOCK_H * hidden_inner_stride
                b_ptrs += BLOCK_H * weight_inner_stride
        rows = first_row + tl.arange(0, BLOCK_N)  # not before the loop above, where they would occupy registers
        present = rows < n_rows
        inv_temperature = tl.load(inv_temperature_ptr + rows, mask=present, other=0.0)
        ids = tl.load(ids_ptr + rows.to(tl.int64) * ids_stride, mask=present, other=-1)
        ids = tl.where((ids >= 0) & (ids < n_cols), ids, -1).to(tl.int32)  # no id can equal a column past V
        target_ptrs = target_ptr + rows
        if HALVED:
            left, right = z.reshape(BLOCK_N, 2, BLOCK_V // 2).permute(0, 2, 1).split()
            left_maximum, left_total = _fold_tile(
                left, first_col, ids, target_ptrs, bias_ptr, bias_stride, inv_temperature, n_cols, logit_scale, softcap,
                HAS_BIAS, HAS_SOFTCAP,
            )  # fmt: skip
            right_maximum, right_total = _fold_tile(
                right, first_col + BLOCK_V // 2, ids, target_ptrs, bias_ptr, bias_stride, inv_temperature, n_cols,
                logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP,
            )  # fmt: skip
            maximum = tl.maximum(left_maximum, right_maximum)
            anchor = tl.where(maximum == -float("inf"), 0.0, maximum)
            total = left_total * tl.exp2(left_maximum - anchor) + right_total * tl.exp2(right_maximum - anchor)
        else:
            maximum, total = _fold_tile(
                z, first_col, ids, target_ptrs, bias_ptr, bias_stride, inv_temperature, n_cols, logit_scale, softcap,
                HAS_BIAS, HAS_SOFTCAP,
            )  # fmt: skip
        at = tile.to(tl.int64) * tile_stride + rows
        tl.store(maxima_ptr + at, maximum, mask=present)
        tl.store(totals_ptr + at, total, mask=present)


@jit
def _fold_tile(
    z, first_col, ids, target_ptrs, bias_ptr, bias_stride, inv_temperature, n_cols, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Store the targets found in raw z (n, c); return each row's (maximum, sum of exp2(z - maximum)), (n,), in log2 units."""
    cols = first_col + tl.arange(0, z.shape[1])
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols.to(tl.int64) * bias_stride, mask=cols < n_cols, other=0.0)
        z += bias.to(tl.float32)[None, :]
    log2_e = 1.4426950408889634  # exp(z) = exp2(z * log2_e), and the temperature needs a multiplication anyway
    if HAS_SOFTCAP:
        z = softcap - 2.0 * softcap / (1.0 + tl.exp2(z * (2.0 * log2_e * logit_scale / softcap)))  # tanh; inf: softcap
        z *= (inv_temperature * log2_e)[:, None]
    else:
        z *= (inv_temperature * (log2_e * logit_scale))[:, None]
    if first_col + z.shape[1] > n_cols:
        z = tl.where((cols < n_cols)[None, :], z, -float("inf"))
    held = (ids >= first_col) & (ids < first_col + z.shape[1])  # true in one tile at most
    if tl.max(held.to(tl.int32), 0) > 0:  # most tiles hold no row's target
        tl.store(target_ptrs, tl.max(tl.where(cols[None, :] == ids[:, None], z, -float("inf")), 1), mask=held)
    maximum = tl.max(z, 1)
    anchor = tl.where(maximum == -float("inf"), 0.0, maximum)  # every column may be masked
    return maximum, tl.sum(tl.exp2(z - anchor[:, None]), 1)


@jit
def combine_tiles_kernel(
    maxima_ptr, totals_ptr, logp_ptr, lse_ptr, n_rows, n_tiles, tile_stride,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program combines the tiles of BLOCK_N rows; logp holds the target's logit on entry, its log-probability on exit."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = rows < n_rows
    maximum = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_tiles, BLOCK_S):
        tiles = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = (tiles < n_tiles)[:, None] & present[None, :]
        at = tiles[:, None] * tile_stride + rows[None, :]
        maxima = tl.load(maxima_ptr + at, mask=inside, other=-float("inf"))
        totals = tl.load(totals_ptr + at, mask=inside, other=0.0)
        peak = tl.maximum(maximum, tl.max(maxima, 0))
        anchor = tl.where(peak == -float("inf"), 0.0, peak)
        total = total * tl.exp2(maximum - anchor) + tl.sum(totals * tl.exp2(maxima - anchor[None, :]), 0)
        maximum = peak
    log_total = tl.log2(tl.where(total == 0, 1.0, total))  # a fully masked row's lse is its maximum, -inf
    target = tl.load(logp_ptr + rows, mask=present, other=0.0)
    ln_2 = 0.6931471805599453
    tl.store(lse_ptr + rows, (maximum + log_total) * ln_2, mask=present)
    # In this order of operations a one-hot row gives exactly 0.
    tl.store(logp_ptr + rows, ((target - maximum) - log_total) * ln_2, mask=present)
