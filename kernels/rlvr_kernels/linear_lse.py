"""linear_lse: log-probabilities and log-sum-exps of an lm_head in one matmul whose logits never leave the registers.

    z = h W^T through bias, scale, softcap and temperature,   lse_n = log sum_j exp z_nj,   logp_n = z_n,id(n) - lse_n

Tiling: a program owns `rows` rows and a split of the vocabulary, walks the split in tiles of `cols` columns, accumulates
each tile over H and folds it into a running maximum and sum. Programs of one group of row blocks run side by side, so
that a slice of the weight is read from memory once per group and from L2 by the rest of it. A second kernel combines
the splits. FLOPs: 2NVH. Bytes: the weight N / (rows * GROUP) times, the hidden states about once, 4 N SPLITS of partial sums.
How the vocabulary is split depends on V alone, never on N: a row's numbers do not depend on the rows beside it.
"""

from dataclasses import dataclass

import torch

from rlvr_kernels._triton import device_guard, interpreting, jit, tl, triton
from rlvr_kernels.backend import use_triton
from rlvr_kernels.logits import Head, accumulator_dtype

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


def tiling(hidden: torch.dtype, weight: torch.dtype) -> Tiling:
    """The launch's constants: a fixed table by dtype and GPU, predicted from registers and shared memory, not yet tuned by timing.

    Operands of half precision go to the tensor cores as they are. Anything else is multiplied in exact float32, and so is
    everything under the interpreter, whose dot cannot multiply bfloat16.
    """
    if interpreting():
        return Tiling(16, 32, 16, 4, 1, upcast=True)
    target = triton.runtime.driver.active.get_current_target()
    if hidden != weight or hidden.itemsize > 2:
        return Tiling(64, 64, 16, 8, 2, upcast=True)
    if target.backend == "cuda" and target.arch in (90, 100, 103):
        return Tiling(128, 256, 64, 8, 3)
    return Tiling(128, 128, 64, 8, 3 if target.backend == "cuda" else 2)


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
    """Compute (logp, lse), both (N,), of hidden (N, H) under an lm_head weight (V, H) and bias (V,): forward only, no gradient.

    Equal to `z = logit_scale * (hidden @ weight.T + bias)`, `z = softcap * tanh(z / softcap)` if there is a softcap,
    `z = z / temperature`, `lse = z.logsumexp(1)`, `logp = z[arange(N), ids] - lse`, accumulated in float32 (float64 for
    float64 tensors, by the twin). `temperature` is a number or one per row, (N,). A bias of -inf masks a token.
    Nothing of size (N, V) exists; any strides will do. The same inputs give the same bits, and on Triton a row gives the
    same bits whatever rows come with it. An id outside [0, V) gives NaN in logp.

    Raises:
        ValueError: a shape, a dtype or a device does not fit, or backend="triton" cannot run here.
    """
    head = Head(logit_scale, softcap)
    _check(hidden, weight, ids, bias)
    dtype = accumulator_dtype(torch.promote_types(hidden.dtype, weight.dtype))
    inv_temperature = _inverse(temperature, hidden, dtype)
    run = _triton if use_triton(hidden if hidden.dtype == torch.float64 else weight, backend) else _torch
    target = torch.full_like(inv_temperature, float("nan"))
    lse = torch.empty_like(inv_temperature)
    for start in range(0, hidden.shape[0], ROWS_PER_LAUNCH):
        rows = slice(start, start + ROWS_PER_LAUNCH)
        run(hidden[rows], weight, ids[rows], bias, inv_temperature[rows], head, target[rows], lse[rows])
    return target.sub_(lse), lse
