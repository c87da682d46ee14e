"""linear_lse: log-probabilities and log-sum-exps of an lm_head in one matmul whose logits never leave the registers.

    z = h W^T through bias, scale, softcap and temperature,   lse_n = log sum_j exp z_nj,   logp_n = z_n,id(n) - lse_n

Tiling: a program owns `rows` rows and one split of the vocabulary, walks the split in tiles of `cols` columns,
accumulates each tile over H and folds it into a running maximum and sum. The programs of a group of row blocks run side
by side, so that a slice of the weight comes from memory once per group and from L2 for the rest of it. A second kernel
combines the splits. FLOPs: 2NVH. Bytes: the weight N / (rows * GROUP) times, the hidden states about once, and 8 bytes
of partial sums per row and split. How the vocabulary is split depends on V and never on N: a row's bits do not depend on
the rows beside it.
"""

from dataclasses import dataclass

import torch

from rlvr_kernels._triton import device_guard, interpreting, jit, tl, triton
from rlvr_kernels.backend import use_triton
from rlvr_kernels.logits import Head, accumulator_dtype
from rlvr_kernels.lse_fold import RowState, lse_fold

GROUP = 8  # row blocks that share what they read of the weight
ROWS_PER_LAUNCH = 16384  # bounds the partial sums, and the grid
WANTED_SPLITS = 256  # enough programs for one row block to fill a GPU
TILES_PER_SPLIT = 8  # and no more than this, so that a split stays short enough to balance the last wave
COMBINE_ROWS, COMBINE_SPLITS = 32, 64
TWIN_ROWS, TWIN_COLS = 512, 1024  # a float32 block of logits of 2 MiB


@dataclass(frozen=True)
class Tiling:
    """The constants of a launch: rows x cols logits at a time, accumulated over `inner` of H per step."""

    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int
    upcast: bool = False

    def splits(self, vocabulary: int) -> tuple[int, int]:
        """(tiles per split, number of splits) of a vocabulary."""
        tiles = -(-vocabulary // self.cols)
        per_split = min(TILES_PER_SPLIT, max(1, tiles // WANTED_SPLITS))
        return per_split, -(-tiles // per_split)


def tiling(hidden: torch.Tensor, weight: torch.Tensor) -> Tiling:
    """The launch's constants: a fixed table by dtype, layout and GPU, so that nothing is timed at run time.

    Predicted from registers and shared memory (see compile_table.py); no timing on a GPU has confirmed it yet.
    Operands of half precision go to the tensor cores as they are. Anything else is multiplied in exact float32, and so
    is everything under the interpreter, whose dot cannot multiply bfloat16.
    """
    if interpreting():
        return Tiling(16, 32, 16, 4, 1, upcast=True)
    wide = _loads_wide(hidden) and _loads_wide(weight)
    if hidden.dtype != weight.dtype:
        # Too few rows for Blackwell's tensor cores: there Triton 3.7 rounds a float32 operand to tf32 beside one that it
        # saw widened, in spite of input_precision="ieee" (triton-lang/triton#10176).
        return Tiling(32, 128, 16, 4, 3, upcast=True) if wide else Tiling(32, 64, 16, 4, 2, upcast=True)
    if hidden.dtype.itemsize > 2:
        return Tiling(64, 128, 16, 8, 3, upcast=True) if wide else Tiling(64, 64, 16, 8, 2, upcast=True)
    if not wide:
        return Tiling(64, 64, 32, 4, 2)  # an address for every element: a larger tile spills them
    target = triton.runtime.driver.active.get_current_target()
    by_target = {("cuda", 90): Tiling(128, 256, 64, 8, 3), ("cuda", 100): Tiling(128, 128, 64, 8, 4)}
    other = Tiling(128, 128, 32, 8, 4) if target.backend == "cuda" else Tiling(128, 128, 64, 8, 2)
    return by_target.get((target.backend, target.arch), other)


def _loads_wide(matrix: torch.Tensor) -> bool:
    """Whether a row of the matrix can be read 16 bytes at a time and ends where a tile does."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
    return matrix.stride(1) == 1 and matrix.shape[1] % 64 == 0 and aligned


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
    Nothing of size (N, V) exists; any strides will do. The same inputs give the same bits, and on Triton a row gives
    the same bits whatever rows lie beside it. An id outside [0, V) has logp -inf.

    Raises:
        ValueError: a shape, a dtype or a device does not fit, or backend="triton" cannot run here.
    """
    head = Head(logit_scale, softcap)
    _check(hidden, weight, ids, bias)
    inv_temperature = _inverse(temperature, hidden, accumulator_dtype(torch.promote_types(hidden.dtype, weight.dtype)))
    if use_triton(inv_temperature, backend):
        return _linear_lse_triton(hidden, weight, ids, bias, inv_temperature, head)
    return _linear_lse_torch(hidden, weight, ids, bias, inv_temperature, head)


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
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None,
    inv_temperature: torch.Tensor, head: Head,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The twin: blocks of TWIN_ROWS x TWIN_COLS logits, each folded and forgotten."""
    rows, dtype = hidden.shape[0], inv_temperature.dtype
    state = RowState.empty(rows, inv_temperature)
    for first_col in range(0, weight.shape[0], TWIN_COLS):
        slab = slice(first_col, first_col + TWIN_COLS)
        columns = weight[slab].to(dtype).T
        for start in range(0, rows, TWIN_ROWS):
            block = slice(start, start + TWIN_ROWS)
            lse_fold(
                hidden[block].to(dtype) @ columns, ids[block], first_col, state[block], inv_temperature[block],
                bias=None if bias is None else bias[slab], head=head, backend="torch",
            )  # fmt: skip
    return state.logp(), state.lse()


def _linear_lse_triton(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None,
    inv_temperature: torch.Tensor, head: Head,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch both kernels, at most ROWS_PER_LAUNCH rows at a time."""
    (rows, h), v = hidden.shape, weight.shape[0]
    logp = torch.full_like(inv_temperature, -float("inf"))
    lse = torch.empty_like(inv_temperature)
    with device_guard(hidden):
        tile = tiling(hidden, weight)
        per_split, splits = tile.splits(v)
        partials = (2, splits, min(rows, ROWS_PER_LAUNCH))
        maxima, totals = torch.empty(partials, dtype=torch.float32, device=hidden.device)
        for start in range(0, rows, ROWS_PER_LAUNCH):
            part = slice(start, start + ROWS_PER_LAUNCH)
            n = min(rows - start, ROWS_PER_LAUNCH)
            linear_lse_kernel[(triton.cdiv(n, tile.rows) * splits,)](
                hidden[part], weight, bias, ids[part], inv_temperature[part], logp[part], maxima, totals,
                n, v, h, per_split, splits, *hidden.stride(), *weight.stride(), ids.stride(0),
                0 if bias is None else bias.stride(0), maxima.stride(0),
                BLOCK_N=tile.rows, BLOCK_V=tile.cols, BLOCK_H=tile.inner, GROUP=GROUP, EVEN_H=h % tile.inner == 0,
                UPCAST=tile.upcast, HAS_BIAS=bias is not None, num_warps=tile.num_warps, num_stages=tile.num_stages,
                **head.kernel_arguments(),
            )  # fmt: skip
            combine_splits_kernel[(triton.cdiv(n, COMBINE_ROWS),)](
                maxima, totals, logp[part], lse[part], n, splits, maxima.stride(0),
                BLOCK_N=COMBINE_ROWS, BLOCK_S=COMBINE_SPLITS, num_warps=4,
            )  # fmt: skip
    return logp, lse


@jit
def linear_lse_kernel(
    hidden_ptr, weight_ptr, bias_ptr, ids_ptr, inv_temperature_ptr, target_ptr, maxima_ptr, totals_ptr,
    n_rows, n_cols, n_inner, tiles_per_split, n_splits,
    hidden_stride, hidden_inner_stride, weight_stride, weight_inner_stride, ids_stride, bias_stride, split_stride,
    logit_scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    EVEN_H: tl.constexpr, UPCAST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program reduces BLOCK_N rows over one split of the vocabulary, and writes the target's logit if it is there."""
    program = tl.program_id(0)
    first_block = program // (GROUP * n_splits) * GROUP
    group_size = tl.minimum(tl.cdiv(n_rows, BLOCK_N) - first_block, GROUP)
    within = program % (GROUP * n_splits)
    split = (within // group_size).to(tl.int64)
    rows = (first_block + within % group_size).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = rows < n_rows
    safe_rows = tl.minimum(rows, n_rows - 1)  # rows and columns past the end read the last one, and are dropped below
    inner = tl.arange(0, BLOCK_H).to(tl.int64)
    hidden_ptrs = hidden_ptr + safe_rows[:, None] * hidden_stride + inner[None, :] * hidden_inner_stride
    ids = tl.load(ids_ptr + safe_rows * ids_stride)
    ids = tl.where((ids >= 0) & (ids < n_cols), ids, -1).to(tl.int32)  # no id can equal a column past V
    inv_temperature = tl.load(inv_temperature_ptr + safe_rows)
    maximum = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    target = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    first_tile = (within // group_size) * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(n_cols, BLOCK_V))
    for tile in range(first_tile, last_tile):
        cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        safe_cols = tl.minimum(cols, n_cols - 1).to(tl.int64)
        a_ptrs = hidden_ptrs
        b_ptrs = weight_ptr + safe_cols[None, :] * weight_stride + inner[:, None] * weight_inner_stride
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in range(0, n_inner, BLOCK_H):
            if EVEN_H:
                a = tl.load(a_ptrs)
                b = tl.load(b_ptrs)
            else:
                a = tl.load(a_ptrs, mask=(inner < n_inner - start)[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=(inner < n_inner - start)[:, None], other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            z = tl.dot(a, b, z, input_precision="ieee")
            a_ptrs += BLOCK_H * hidden_inner_stride
            b_ptrs += BLOCK_H * weight_inner_stride
        if HAS_BIAS:
            z += tl.load(bias_ptr + safe_cols * bias_stride).to(tl.float32)[None, :]
        if HAS_SOFTCAP:
            z = softcap - 2.0 * softcap / (
                1.0 + tl.exp(z * (2.0 * logit_scale / softcap))
            )  # tanh; exp = inf gives softcap
            z *= inv_temperature[:, None]
        else:
            z *= (inv_temperature * logit_scale)[:, None]
        z = tl.where((cols < n_cols)[None, :], z, -float("inf"))
        target = tl.maximum(target, tl.max(tl.where(cols[None, :] == ids[:, None], z, -float("inf")), 1))
        peak = tl.maximum(maximum, tl.max(z, 1))
        anchor = tl.where(peak == -float("inf"), 0.0, peak)  # nothing but masked columns so far
        total = total * tl.exp(maximum - anchor) + tl.sum(tl.exp(z - anchor[:, None]), 1)
        maximum = peak
    tl.store(maxima_ptr + split * split_stride + rows, maximum, mask=present)
    tl.store(totals_ptr + split * split_stride + rows, total, mask=present)
    met = (ids >= first_tile * BLOCK_V) & (ids < last_tile * BLOCK_V)  # by one split alone
    tl.store(target_ptr + rows, target, mask=present & met)


@jit
def combine_splits_kernel(
    maxima_ptr, totals_ptr, logp_ptr, lse_ptr, n_rows, n_splits, split_stride,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program combines BLOCK_N rows' splits; logp holds the target's logit before, the log-probability after."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = rows < n_rows
    maximum = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_splits, BLOCK_S):
        splits = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = (splits < n_splits)[:, None] & present[None, :]
        at = splits[:, None] * split_stride + rows[None, :]
        maxima = tl.load(maxima_ptr + at, mask=inside, other=-float("inf"))
        totals = tl.load(totals_ptr + at, mask=inside, other=0.0)
        peak = tl.maximum(maximum, tl.max(maxima, 0))
        anchor = tl.where(peak == -float("inf"), 0.0, peak)
        total = total * tl.exp(maximum - anchor) + tl.sum(totals * tl.exp(maxima - anchor[None, :]), 0)
        maximum = peak
    log_total = tl.log(tl.where(total == 0, 1.0, total))  # a row of masked columns alone: its maximum, -inf, is its lse
    target = tl.load(logp_ptr + rows, mask=present, other=0.0)
    tl.store(lse_ptr + rows, maximum + log_total, mask=present)
    tl.store(logp_ptr + rows, (target - maximum) - log_total, mask=present)  # a row that is one-hot gives exactly 0
