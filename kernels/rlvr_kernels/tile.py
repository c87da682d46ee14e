"""A bounded tile of exponentials or of logits, and the matrix products around it.

Exponentials have the operands' dtype. Logits (float16, and float32 on an accelerator) are what the vendor's matmul writes: in
float32 where it can widen 16-bit operands (CUDA), in the operands' dtype elsewhere. Their gradient has the operands' dtype
and overwrites them. Where it is narrower, each of its rows takes the first half of its own logits' memory. Gradients
accumulate in float32 (float64 for float64).
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from rlvr_kernels.backend import explain_backend
from rlvr_kernels.logits import accumulator_dtype

NARROWEST = 4096  # columns; a tile loses rows before it gets narrower than this
ALIGNED_COLUMNS = 128  # slices of the vocabulary start at multiples of this, where wide loads can
ALIGNED_ROW = 64  # 128 bytes in bfloat16: rows of a tile start at multiples of this on an accelerator
MOVED_BYTES = 16 << 20  # rows move inside a tile in pieces of this size
CACHED_BYTES = 1 << 20  # the same on a CPU: a piece fits a core's cache
HUGE_BYTES = 8 << 20  # CPU buffers of at least this size ask for huge pages
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" and _ADVICE is not None else None
BY_TRITON = {torch.bfloat16}  # dtypes whose tiles Triton fills with exponentials
CPU_ROWS = 1024  # a chunk on a CPU has no more: it would multiply no faster, and its tile would leave the cache
SCALED_BYTES = 32 << 20  # d_hidden is multiplied and scaled in pieces of this size
PRODUCT_ROWS = 8192  # rows per step of a matmul that cannot write the accumulator's dtype


def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a matmul of `dtype` operands on `device` can write float32."""
    return device.type == "cuda" and torch.version.hip is None and dtype in (torch.bfloat16, torch.float16)


def leaves_exponentials(device: torch.device, dtype: torch.dtype, backend: str) -> bool:
    """Whether a tile of products of this dtype holds exponentials, as linear_exp leaves them, and no logits.

    So it does for bfloat16 by Triton, and on a CPU for all but float16, which has no room for them. An accelerator
    multiplies float32 faster by the vendor's product.
    """
    if device.type == "cpu" and backend != "triton":
        return dtype != torch.float16
    return dtype in BY_TRITON and explain_backend(device, backend, dtype)[0] == "triton"


def bytes_per_logit(device: torch.device, dtype: torch.dtype, backend: str) -> int:
    """Bytes of one element of a tile. Its gradient takes the same memory."""
    return (dtype if leaves_exponentials(device, dtype, backend) else logit_dtype(device, dtype)).itemsize


def default_workspace_bytes(device: torch.device, *, whole_rows: bool = True) -> int:
    """The workspace if the caller names none: 300 MiB on a CPU, 2.5 GiB or 256 MiB on an accelerator.

    On a CPU 300 MiB hold 512 rows of 151936 logits in float32, and CPU_ROWS rows of a smaller vocabulary are enough. Fewer rows
    multiply more slowly, on AMD more so than on Intel; more save no time (docs/performance-log.md). The accelerator's sizes are
    predicted. A single pass, whose tile holds whole rows, adds to d_weight once per tile: it gets 2.5 GiB, enough for 8192 rows
    of 151936 bfloat16 exponentials. Slices of the vocabulary get 256 MiB, enough for 8192 rows by 16384 columns.
    """
    if device.type == "cpu":
        return 300 << 20
    return 5 << 29 if whole_rows else 256 << 20


def logit_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a product of `dtype` operands writes logits."""
    return torch.float32 if widens(device, dtype) else dtype


def row_pitch(cols: int, device: torch.device) -> int:
    """Elements from the start of one row of a tile to the next. An accelerator rounds up to ALIGNED_ROW.

    Wide loads, tensor descriptors and the matmul's bulk copies need aligned rows, and a vocabulary may be odd (50257). The
    padding comes on top of the workspace.
    """
    return cols if device.type == "cpu" else -(-cols // ALIGNED_ROW) * ALIGNED_ROW


class TileShape(NamedTuple):
    """How many rows and columns of logits exist at once."""

    rows: int
    cols: int


def vocabulary_tile(rows: int, vocabulary: int, logit_bytes: int, workspace_bytes: int) -> TileShape:
    """The widest tile of all rows that fits; of fewer rows if it would be too narrow for a fast matmul.

    Raises:
        ValueError: the workspace does not hold one logit.
    """
    if workspace_bytes < logit_bytes:
        raise ValueError(f"workspace_bytes must be at least {logit_bytes}, one logit, got {workspace_bytes}")
    logits = workspace_bytes // logit_bytes
    cols = min(vocabulary, max(logits // max(rows, 1), min(NARROWEST, logits)))
    if ALIGNED_COLUMNS <= cols < vocabulary:
        cols -= cols % ALIGNED_COLUMNS
    return TileShape(max(1, min(rows, logits // cols)), cols)


def whole_row_tile(vocabulary: int, logit_bytes: int, workspace_bytes: int) -> int:
    """How many whole rows fit the workspace; 0 if none does."""
    return workspace_bytes // (vocabulary * logit_bytes)


def column_slices(vocabulary: int, cols: int) -> Iterator[slice]:
    """Yield slices of at most `cols` columns."""
    for col in range(0, vocabulary, cols):
        yield slice(col, min(col + cols, vocabulary))


class Tile:
    """The workspace: `shape` exponentials, or logits and then their gradient. Every piece of rows and vocabulary reuses it."""

    def __init__(self, shape: TileShape, dtype: torch.dtype, device: torch.device, backend: str = "auto"):
        self.holds_exponentials = leaves_exponentials(device, dtype, backend)
        held = dtype if self.holds_exponentials else logit_dtype(device, dtype)
        self._all = empty((shape.rows * row_pitch(shape.cols, device),), held, device)
        self._gradient = self._all.view(dtype)

    def part(self, rows: int, cols: int) -> torch.Tensor:
        """The memory (n, c) for that many rows and columns."""
        pitch = row_pitch(cols, self._all.device)
        return self._all[: rows * pitch].view(rows, pitch)[:, :cols]

    def fill(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute the raw logits (n, c) of hidden (n, H) and weight (c, H)."""
        logits = self.part(hidden.shape[0], weight.shape[0])
        multiply(hidden, weight.T, out=logits)
        return logits

    def gradient(self, rows: int, cols: int) -> torch.Tensor:
        """The memory (n, c) for the tile's gradient: the tile itself, or the first half of each of its rows."""
        pitch = row_pitch(cols, self._all.device) * self._all.element_size() // self._gradient.element_size()
        return self._gradient[: rows * pitch].view(rows, pitch)[:, :cols]


def multiply(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
    """Write a @ b to `out`, whose dtype may be wider or narrower than the operands'."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.dtype == torch.float32 and widens(a.device, a.dtype):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        for start in range(0, out.shape[0], PRODUCT_ROWS):
            out[start : start + PRODUCT_ROWS] = torch.mm(a[start : start + PRODUCT_ROWS], b)


def accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """Add a @ b to `total` in the accumulator's dtype. `first` overwrites, so `total` need not be cleared."""
    if first:
        multiply(a, b, out=total)
    elif total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif widens(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        for start in range(0, total.shape[0], PRODUCT_ROWS):
            total[start : start + PRODUCT_ROWS] += torch.mm(a[start : start + PRODUCT_ROWS], b)


def multiply_scaled(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | None, *, out: torch.Tensor) -> None:
    """Write (a @ b) * scale[:, None], rounded once, to `out`; scale=None means 1. Holds SCALED_BYTES of the product at a time."""
    step = max(1, SCALED_BYTES // (b.shape[1] * accumulator_dtype(a.dtype).itemsize))
    products = accumulator((min(step, a.shape[0]), b.shape[1]), a)
    for start in range(0, a.shape[0], step):
        rows = slice(start, min(start + step, a.shape[0]))
        product = products[: rows.stop - start]
        multiply(a[rows], b, out=product)
        out[rows] = product if scale is None else product.mul_(scale[rows, None])


def sum_of_rows(gradient: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sum (V,) of gradient (k, V) over its rows, each times its scale, in `dtype`.

    A scale wider than the gradient is multiplied as two numbers of the gradient's dtype.
    """
    if scale is None:
        return gradient.sum(0, dtype=dtype)
    if gradient.dtype == scale.dtype:
        return torch.mv(gradient.T, scale)
    high = scale.to(gradient.dtype)
    both = torch.stack([high, (scale - high).to(gradient.dtype)], 1)
    total = torch.empty(gradient.shape[1], 2, dtype=dtype, device=gradient.device)
    multiply(gradient.T, both, out=total)
    return total.sum(1)


def accumulator(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """An uninitialised accumulator for products of tensors like `like`."""
    return empty(shape, accumulator_dtype(like.dtype), like.device)


def compact_(tile: torch.Tensor, keep: torch.Tensor, moved: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compact the kept rows (k,) into the first k slots in place; return that view and each slot's source row (k,).

    keep ascends. A kept row that lies in the first k slots stays where it is; the last `moved` of them do not.
    """
    count = keep.shape[0]
    below = keep[count - moved :]
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


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty, asking Linux for 2 MiB huge pages if the tensor is large and on a CPU.

    Without them, the first product that writes a weight gradient of 545 MB takes 133,000 page faults.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if _LIBC is not None and device.type == "cpu" and tensor.nbytes >= HUGE_BYTES and type(tensor) is torch.Tensor:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _ADVICE)
    return tensor
