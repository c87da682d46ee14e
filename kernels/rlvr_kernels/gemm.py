"""The matrix product h W^T that linear_lse and linear_exp share: its walk over tiles of logits, its reads, its tile sizes.

A program takes one tile after another: it accumulates the tile over H and hands it, in registers, to the kernel's epilogue.
Programs walk the tiles of GROUP row blocks side by side, so a slice of the weight comes from memory once per group, and from
L2 after that. Which tiles there are depends on V and never on N: a row's bits do not depend on the rows beside it.

The sizes come from registers, shared memory and counted cycles (docs/kernels.md). No timing on a GPU has confirmed them
yet; FOLD_CANDIDATES and LEAVE_CANDIDATES list what such a timing should compare.
"""

from dataclasses import dataclass
from typing import Any

import torch

from rlvr_kernels._triton import interpreting, jit, tl, triton

GROUP = 8  # row blocks that share each read of the weight
PROCESSORS = 4  # assumed if there is no GPU to ask
PARTIAL_BYTES = (
    40 << 20
)  # what the epilogues write per row and tile, at a time: two numbers for 8704 rows of 151936 columns


@dataclass(frozen=True)
class Tiling:
    """The constants of a launch: a tile of rows x cols logits, accumulated over `inner` elements of H per step.

    described: load the operands through tensor descriptors (TMA), in `per_processor` programs on each multiprocessor that
        walk over all tiles. A program loads its next tile while it finishes the last one.
    specialized: one warp loads, one multiplies and the others finish tiles, all at the same time.
    parts: the epilogue takes the tile's columns in 1, 2 or 4 parts in turn, because all together would not fit the registers.
    upcast: widen the operands to float32 before multiplying.
    """

    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int
    upcast: bool = False
    described: bool = False
    specialized: bool = False
    parts: int = 1
    per_processor: int = 1

    def constants(self, inner: int, flagged: bool = False) -> dict[str, Any]:
        """The kernels' constants for operands of H = `inner`. A launch that looks for `flagged` rows skips tiles."""
        return {
            "BLOCK_N": self.rows, "BLOCK_V": self.cols, "BLOCK_H": self.inner, "GROUP": GROUP, "PARTS": self.parts,
            "EVEN_H": inner % self.inner == 0, "UPCAST": self.upcast, "DESCRIBED": self.described,
            "FLATTENED": self.described and not flagged, "SPECIALIZED": self.specialized and not flagged,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip

    def rows_at_once(self, vocabulary: int, numbers: int) -> int:
        """How many rows' partial results fit PARTIAL_BYTES, at `numbers` float32 per row and tile."""
        return max(1, PARTIAL_BYTES // (4 * numbers * triton.cdiv(vocabulary, self.cols) * self.rows)) * self.rows

    def programs(self, rows: int, vocabulary: int, device: torch.device, flagged: bool = False) -> int:
        """How many programs to launch: one per tile or, with descriptors or for flagged rows, as many as the GPU holds."""
        items = triton.cdiv(rows, self.rows) * triton.cdiv(vocabulary, self.cols)
        if not (self.described or flagged):
            return items
        cuda = device.type == "cuda"
        processors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else PROCESSORS
        return min(items, processors * self.per_processor)

    def operand(self, matrix: torch.Tensor, rows: int, cols: int = 0) -> Any:
        """The matrix as a kernel takes it: a tensor descriptor of blocks (rows, cols or `inner`), or the tensor itself."""
        if not self.described:
            return matrix
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(matrix, [rows, cols or self.inner])


HOPPER, BLACKWELL = ("cuda", 90), ("cuda", 100)
FOLD = {  # linear_lse
    HOPPER: Tiling(128, 256, 64, 8, 4, described=True, parts=2),
    BLACKWELL: Tiling(128, 256, 64, 8, 4, described=True, specialized=True),
}
LEAVE = {  # linear_exp, whose epilogue also stages what it stores in shared memory
    HOPPER: Tiling(128, 256, 64, 8, 3, described=True, parts=4),
    BLACKWELL: Tiling(128, 128, 64, 8, 5, described=True, parts=2),
}
LEAVE_TWO_SUMS = {  # the same with the sums of an entropy
    HOPPER: LEAVE[HOPPER],
    BLACKWELL: Tiling(128, 64, 64, 4, 3, described=True, parts=2, per_processor=2),
}
FOLD_CANDIDATES = {  # all compile without spills under Triton 3.7.1, with a bias and a softcap too
    HOPPER: (
        FOLD[HOPPER],
        Tiling(128, 256, 64, 8, 3, described=True, parts=2),
        Tiling(128, 256, 128, 8, 2, described=True),
        Tiling(256, 128, 64, 8, 4, described=True),
        Tiling(128, 128, 64, 8, 6, described=True),
        Tiling(128, 128, 64, 4, 3, described=True, per_processor=2),
    ),
    BLACKWELL: (
        FOLD[BLACKWELL],
        Tiling(128, 256, 64, 8, 3, described=True, specialized=True),
        Tiling(128, 256, 64, 8, 4, described=True, parts=2),
        Tiling(128, 128, 64, 8, 6, described=True),
    ),
}
LEAVE_CANDIDATES = {
    HOPPER: (
        LEAVE[HOPPER],
        Tiling(128, 256, 64, 8, 4, described=True, parts=4),
        Tiling(128, 256, 64, 8, 3, described=True, parts=2),
        Tiling(256, 128, 64, 8, 3, described=True, parts=2),
        Tiling(128, 128, 64, 8, 5, described=True, parts=2),
        Tiling(128, 128, 64, 4, 3, described=True, parts=2, per_processor=2),
    ),
    BLACKWELL: (LEAVE[BLACKWELL], Tiling(128, 256, 64, 8, 3, described=True, parts=4)),
}


def tiling(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None, sums: int = 1) -> Tiling:
    """The launch constants for these operands on the current GPU, whatever the number of rows.

    out (n, c) is what the epilogue stores, if it stores a matrix, along with `sums` numbers per row and tile. 16-bit
    operands go to the tensor cores as they are. Other dtypes are multiplied in exact float32. So is everything under the
    interpreter, whose dot does not take bfloat16.
    """
    described = all(_describable(matrix) for matrix in (hidden, weight, out) if matrix is not None)
    if interpreting():
        return Tiling(16, 32, 16, 4, 1, upcast=True, described=described)
    wide = _loads_wide(hidden) and _loads_wide(weight)
    if hidden.dtype != weight.dtype:
        # 32 rows keep this product off Blackwell's tensor cores. On them Triton 3.7 rounds a float32 operand to tf32 if the
        # other was widened, despite input_precision="ieee" (triton-lang/triton#10176).
        return Tiling(32, 128, 16, 4, 3, upcast=True) if wide else Tiling(32, 64, 16, 4, 2, upcast=True)
    if hidden.dtype.itemsize > 2:
        return Tiling(64, 128, 16, 8, 2, upcast=True) if wide else Tiling(64, 64, 16, 8, 2, upcast=True)
    target = triton.runtime.driver.active.get_current_target()
    table = FOLD if out is None else LEAVE if sums < 2 else LEAVE_TWO_SUMS
    family = (target.backend, target.arch // 10 * 10) if target.backend == "cuda" else ("", 0)  # 103 is a 100
    if described and family in table:
        return table[family]
    if not wide:
        return Tiling(64, 64, 32, 4, 2)  # one address per element: a larger tile would spill
    if target.backend != "cuda":
        return Tiling(128, 128, 64, 8, 2)
    return Tiling(128, 128, 32, 8, 4, parts=1 if out is None else 2)


def _aligned(matrix: torch.Tensor) -> bool:
    """Whether every row of the matrix is dense and starts at a multiple of 16 bytes."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0


def _loads_wide(matrix: torch.Tensor) -> bool:
    """Whether rows of the matrix load 16 bytes at a time and end where a step over H ends."""
    return _aligned(matrix) and matrix.shape[1] % 64 == 0


def _describable(matrix: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe the matrix. It reads zeros past the end, so H may be anything."""
    return _aligned(matrix) and matrix.stride(0) >= matrix.shape[1] > 0


@jit
def locate(item, row_blocks, tiles, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """The (first row, first column, number) of a tile: the tiles of GROUP row blocks follow each other."""
    first_block = item // (GROUP * tiles) * GROUP
    group_size = tl.minimum(row_blocks - first_block, GROUP)
    within = item % (GROUP * tiles)
    tile = within // group_size
    return (first_block + within % group_size) * BLOCK_N, tile * BLOCK_V, tile


@jit
def product(
    hidden, weight, first_row, first_col, n_rows, n_cols, n_inner, hidden_stride, hidden_inner_stride, weight_stride,
    weight_inner_stride, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One tile of h W^T, (BLOCK_N, BLOCK_V) in float32. What lies past an edge is anything."""
    if not DESCRIBED:  # past the end, load the last row or column again
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
    return z


@jit
def halves(z):
    """The left and the right half of the columns of z (n, c)."""
    return z.reshape(z.shape[0], 2, z.shape[1] // 2).permute(0, 2, 1).split()


@jit
def any_flagged(flags_ptr, first_row, n_rows, BLOCK_N: tl.constexpr):
    """Whether one of a block's rows is flagged."""
    rows = first_row + tl.arange(0, BLOCK_N)
    return tl.max(tl.load(flags_ptr + rows, mask=rows < n_rows, other=0), 0) > 0
