"""The tile sizes of linear_lse by dtype, layout and GPU: a fixed table, with no tuning at run time.

The sizes come from registers, shared memory and counted cycles (docs/kernels.md). No timing on a GPU has confirmed them
yet; CANDIDATES lists what such a timing should compare.
"""

from dataclasses import dataclass

import torch

from rlvr_kernels._triton import interpreting, triton


@dataclass(frozen=True)
class Tiling:
    """The constants of a launch: a tile of rows x cols logits, accumulated over `inner` elements of H per step.

    described: load the operands through tensor descriptors (TMA), in `per_processor` programs on each multiprocessor that
        walk over all tiles. A program loads its next tile while it folds the last one.
    specialized: one warp loads, one multiplies and the others fold, all at the same time.
    halved: fold the left and the right half of a tile in turn, because both together would not fit the registers.
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
    halved: bool = False
    per_processor: int = 1


DESCRIBED = {
    ("cuda", 90): Tiling(128, 256, 64, 8, 4, described=True, halved=True),
    ("cuda", 100): Tiling(128, 256, 64, 8, 4, described=True, specialized=True),
}
CANDIDATES = {  # all compile without spills under Triton 3.7.1, with a bias and a softcap too
    ("cuda", 90): (
        DESCRIBED["cuda", 90],
        Tiling(128, 256, 64, 8, 3, described=True, halved=True),
        Tiling(128, 256, 128, 8, 2, described=True),
        Tiling(256, 128, 64, 8, 4, described=True),
        Tiling(128, 128, 64, 8, 6, described=True),
        Tiling(128, 128, 64, 4, 3, described=True, per_processor=2),
    ),
    ("cuda", 100): (
        DESCRIBED["cuda", 100],
        Tiling(128, 256, 64, 8, 3, described=True, specialized=True),
        Tiling(128, 256, 64, 8, 4, described=True, halved=True),
        Tiling(128, 128, 64, 8, 6, described=True),
    ),
}


def tiling(hidden: torch.Tensor, weight: torch.Tensor) -> Tiling:
    """The launch constants for these operands on the current GPU, whatever the number of rows.

    16-bit operands go to the tensor cores as they are. Other dtypes are multiplied in exact float32. So is everything under
    the interpreter, whose dot does not take bfloat16.
    """
    described = _describable(hidden) and _describable(weight)
    if interpreting():
        return Tiling(16, 32, 16, 4, 1, upcast=True, described=described)
    wide = _loads_wide(hidden) and _loads_wide(weight)
    if hidden.dtype != weight.dtype:
        # 32 rows keep this product off Blackwell's tensor cores. On them Triton 3.7 rounds a float32 operand to tf32 if the
        # other was widened, despite input_precision="ieee" (triton-lang/triton#10176).
        return Tiling(32, 128, 16, 4, 3, upcast=True) if wide else Tiling(32, 64, 16, 4, 2, upcast=True)
    if hidden.dtype.itemsize > 2:
        return Tiling(64, 128, 16, 8, 3, upcast=True) if wide else Tiling(64, 64, 16, 8, 2, upcast=True)
    target = triton.runtime.driver.active.get_current_target()
    if described and (target.backend, target.arch) in DESCRIBED:
        return DESCRIBED[target.backend, target.arch]
    if not wide:
        return Tiling(64, 64, 32, 4, 2)  # one address per element: a larger tile would spill
    return Tiling(128, 128, 32, 8, 4) if target.backend == "cuda" else Tiling(128, 128, 64, 8, 2)


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
