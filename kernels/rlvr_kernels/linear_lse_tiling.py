"""How linear_lse is cut: the sizes of a tile of logits, by dtype, layout and GPU, from a table that nothing changes at run time.

The table is chosen from registers, shared memory and counted cycles (docs/kernels.md); no timing on a GPU has confirmed
it yet. CANDIDATES are what such a timing should compare.
"""

from dataclasses import dataclass

import torch

from rlvr_kernels._triton import interpreting, triton


@dataclass(frozen=True)
class Tiling:
    """The constants of a launch: rows x cols logits at a time, accumulated over `inner` of H per step.

    described: the operands are read through tensor descriptors (TMA), and as many programs as the GPU can hold,
    `per_processor` on each multiprocessor, walk over all tiles, each reading its next tile during the fold of the last.
    specialized: one warp reads, one multiplies and the others fold, all at the same time.
    halved: the left and the right half of a tile are folded one after the other, where both would not fit the registers.
    upcast: the operands are widened to float32 before they are multiplied.
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
CANDIDATES = {  # all of them compile without spills under Triton 3.7.1, with a bias and a softcap too
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
    """The constants for these operands on the current GPU; never a matter of how many rows there are.

    Operands of half precision go to the tensor cores as they are. Anything else is multiplied in exact float32, and so
    is everything under the interpreter, whose dot cannot multiply bfloat16.
    """
    described = _describable(hidden) and _describable(weight)
    if interpreting():
        return Tiling(16, 32, 16, 4, 1, upcast=True, described=described)
    wide = _loads_wide(hidden) and _loads_wide(weight)
    if hidden.dtype != weight.dtype:
        # Too few rows for Blackwell's tensor cores: there Triton 3.7 rounds a float32 operand to tf32 beside one that it
        # saw widened, in spite of input_precision="ieee" (triton-lang/triton#10176).
        return Tiling(32, 128, 16, 4, 3, upcast=True) if wide else Tiling(32, 64, 16, 4, 2, upcast=True)
    if hidden.dtype.itemsize > 2:
        return Tiling(64, 128, 16, 8, 3, upcast=True) if wide else Tiling(64, 64, 16, 8, 2, upcast=True)
    target = triton.runtime.driver.active.get_current_target()
    if described and (target.backend, target.arch) in DESCRIBED:
        return DESCRIBED[target.backend, target.arch]
    if not wide:
        return Tiling(64, 64, 32, 4, 2)  # an address for every element: a larger tile spills them
    return Tiling(128, 128, 32, 8, 4) if target.backend == "cuda" else Tiling(128, 128, 64, 8, 2)


def _aligned(matrix: torch.Tensor) -> bool:
    """Whether every row of the matrix is dense and begins at a multiple of 16 bytes."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0


def _loads_wide(matrix: torch.Tensor) -> bool:
    """Whether a row of the matrix can be read 16 bytes at a time and ends where a step does."""
    return _aligned(matrix) and matrix.shape[1] % 64 == 0


def _describable(matrix: torch.Tensor) -> bool:
    """Whether a tensor descriptor can stand for the matrix. What lies past its end is read as zero: H may be anything."""
    return _aligned(matrix) and matrix.stride(0) >= matrix.shape[1] > 0
