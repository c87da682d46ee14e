"""Predict what a schedule of the head costs, from counts alone: FLOPs, bytes moved, memory and seconds.

A step is a list of phases. A matrix product takes max(FLOPs / rate, bytes / bandwidth) where loads overlap arithmetic
(GPUs), and the sum of the two where the library repacks its operands first (CPUs). A product of this library's own kernels
reaches a share of that rate, the smaller the fewer steps over H a tile's epilogue follows. Every other phase, including adding
to an accumulator, takes bytes / bandwidth.

The model leaves out exponentials, first touches of fresh pages, vectors (n,), cache hits, device syncs and the bias.
docs/scaling.md compares it with measurements.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from rlvr_kernels.tile import CPU_ROWS, SCALED_BYTES, vocabulary_tile, whole_row_tile


class Rates(NamedTuple):
    """A machine: sustained FLOP/s of a large product, bytes/s read plus written, seconds per launch.

    overlapped: whether a product's traffic hides behind its arithmetic. Our own kernels multiply at own_share of matmul_flops,
    and a tile's epilogue takes as long as own_tail more elements of H.
    """

    matmul_flops: float
    bytes_per_second: float
    overhead_seconds: float = 0.0
    overlapped: bool = True
    own_share: float = 1.0
    own_tail: float = 0.0

    def own_flops(self, hidden: int) -> float:
        """The FLOP/s of our own kernels, for products over H = `hidden`."""
        return self.matmul_flops * self.own_share * hidden / (hidden + self.own_tail)


ACCUMULATOR = 4  # bytes per element of a float32 accumulator
MOVES = 4  # memory passes of a row that moves in the tile: gathered and copied back, two reads and two writes
MARGIN = 1.05  # two passes must be this much faster: the model is no more accurate, and they launch more kernels
OWN_ROWS = 1024  # rows that share a read of the weight in our own kernels
# H100: published, 700 to 798 TFLOP/s for an 8192^3 bf16 product, copies at 3.0 TB/s. H200: 770 to 800 TFLOP/s and 4.3 TB/s were
# seen. Assumed: 5 us per launch; of our kernels 0.935, the middle of what other persistent Triton products reach of the
# vendor's, and 3400 cycles of a tile's epilogue at 16 H cycles a tile (docs/kernels.md). No kernel of ours was timed on a GPU.
H100_BF16 = Rates(720e12, 3.0e12, 5e-6, own_share=0.935, own_tail=3400 / 16)
H200_BF16 = H100_BF16._replace(matmul_flops=785e12, bytes_per_second=4.3e12)
H100_FP32 = H100_BF16._replace(matmul_flops=50e12)  # assumed: three quarters of the published 67 TFLOP/s, without TF32


def cpu_fp32(threads: int) -> Rates:
    """The rates of a CPU in float32.

    docs/performance-log.md measures 836 GFLOP in 4.9 s on two threads, traffic included, and assumes 10 GB/s for one or two
    threads. The 5 GB/s per further thread are our assumption.
    """
    return Rates(90e9 * threads, max(10e9, 5e9 * threads), overlapped=False)


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates used to choose between schedules on `device`, for products of `dtype`."""
    if device.type == "cpu":
        return cpu_fp32(torch.get_num_threads())
    return H100_BF16 if dtype.itemsize <= 2 else H100_FP32


def rows_moved(kept: int, dropped: int) -> float:
    """How many rows `tile.compact_` is expected to move, with the dropped rows anywhere in the tile."""
    return kept * dropped / max(kept + dropped, 1)


def moving_pays(kept: int, dropped: int, hidden: int, itemsize: int, products: int, rates: Rates) -> bool:
    """Whether compacting the tile takes less time than `products` products of the dropped rows. Counted per logit."""
    saved = dropped * products * 2 * hidden / rates.matmul_flops
    return saved > rows_moved(kept, dropped) * MOVES * itemsize / rates.bytes_per_second


@dataclass(frozen=True)
class Problem:
    """The sizes of a step: hidden states (rows, H) and weight (V, H); `scored` rows are scored, `active` have a gradient.

    A logit of the tile takes logit_bytes (`tile.bytes_per_logit`). Its gradient takes operand_bytes of the same memory. `fused`:
    our own kernels fill the tile with exponentials, and nothing passes over it but the products. `drops`: a single pass leaves out
    the rows without a gradient before its last two products. The defaults describe bf16 on CUDA.
    """

    rows: int
    hidden: int
    vocabulary: int
    scored: int
    active: int
    operand_bytes: int = 2
    logit_bytes: int = 2
    weight_grad_bytes: int = 2
    fused: bool = True
    drops: bool = True
    needs_hidden: bool = True
    needs_weight: bool = True


class Cost(NamedTuple):
    """FLOPs, bytes moved and seconds; workspace_bytes of the tile; peak_bytes of all but the inputs."""

    schedule: str
    flops: float
    bytes: float
    seconds: float
    workspace_bytes: int
    peak_bytes: int
    chunk_rows: int = 0


def accumulation_bytes(elements: int, products: int, itemsize: int) -> int:
    """Traffic of an accumulator: the first product writes it, each later one reads and writes it."""
    return (2 * products - 1) * elements * itemsize


class _Phases:
    """Adds up the phases of a step."""

    def __init__(self, problem: Problem, rates: Rates):
        self.p, self.rates = problem, rates
        self.flops = self.bytes = self.seconds = 0.0

    def add(self, moved: float, *, flops: float = 0.0, launches: float = 1, own: bool = False) -> None:
        rate = self.rates.own_flops(self.p.hidden) if own else self.rates.matmul_flops
        arithmetic, traffic = flops / rate, moved / self.rates.bytes_per_second
        together = max(arithmetic, traffic) if self.rates.overlapped else arithmetic + traffic
        self.seconds += together + launches * self.rates.overhead_seconds
        self.flops, self.bytes = self.flops + flops, self.bytes + moved

    def take(self, rows: int, out_of: int) -> int:
        """Gather rows of hidden states, unless it is all of them; return the bytes of the copy."""
        size = rows * self.p.hidden * self.p.operand_bytes if rows < out_of else 0
        if size:
            self.add(2 * size)
        return size

    def logits(self, rows: int, pieces: int, slices: int, *, stored: bool = True) -> None:
        """Multiply: each piece of rows reads the weight, each slice of the vocabulary reads the hidden states."""
        p = self.p
        pieces_read = max(pieces, -(-rows // OWN_ROWS)) if p.fused else pieces
        read = (pieces_read * p.vocabulary + slices * rows) * p.hidden * p.operand_bytes
        written, flops = rows * p.vocabulary * p.logit_bytes * stored, 2.0 * rows * p.vocabulary * p.hidden
        self.add(read + written, flops=flops, launches=pieces * slices, own=p.fused)

    def score(self, tile_bytes: int) -> int:
        """Write the logits and fold them, or fold them in the registers; return the bytes of the tile."""
        p = self.p
        if p.fused:
            self.logits(p.scored, 1, 1, stored=False)
            return 0
        rows, cols = vocabulary_tile(p.scored, p.vocabulary, p.logit_bytes, tile_bytes)
        pieces, slices = -(-p.scored // rows), -(-p.vocabulary // cols)
        self.logits(p.scored, pieces, slices)
        self.add(p.scored * p.vocabulary * p.logit_bytes, launches=pieces * slices)
        return rows * cols * p.logit_bytes

    def pull_back(self, pieces: int, slices: int) -> None:
        """Differentiate the logits, multiply twice, and accumulate: d_hidden per slice, d_weight per piece."""
        p, launches = self.p, pieces * slices
        logits, d_hidden, d_weight = p.active * p.vocabulary, p.active * p.hidden, p.vocabulary * p.hidden
        if not p.fused:
            self.add(logits * (p.logit_bytes + p.operand_bytes), launches=launches)
        product: dict[str, Any] = {"flops": 2.0 * logits * p.hidden, "launches": launches}
        if p.needs_hidden:
            self.add((logits + pieces * d_weight) * p.operand_bytes, **product)
            self.add(accumulation_bytes(d_hidden, slices, ACCUMULATOR))
            self.add(d_hidden * (ACCUMULATOR + p.operand_bytes))
        if p.needs_weight:
            self.add((logits + slices * d_hidden) * p.operand_bytes, **product)
            direct = pieces <= 1
            self.add(accumulation_bytes(d_weight, max(pieces, 1), p.weight_grad_bytes if direct else ACCUMULATOR))
            if not direct and p.weight_grad_bytes < ACCUMULATOR:
                self.add(d_weight * (ACCUMULATOR + p.weight_grad_bytes))

    def cost(self, schedule: str, workspace: int, kept: int, **plan: int) -> Cost:
        return Cost(schedule, self.flops, self.bytes, self.seconds, workspace, workspace + kept, **plan)


def single_pass(p: Problem, rates: Rates, *, chunk_rows: int) -> Cost:
    """One pass, (2 scored + 4 active) V H FLOPs: rows without a gradient leave a chunk before its last two products."""
    chunk_rows = max(1, min(chunk_rows, p.scored))
    pieces, phases = -(-p.scored // chunk_rows), _Phases(p, rates)
    taken = phases.take(p.scored, p.rows)
    phases.logits(p.scored, pieces, 1)
    if not p.fused:
        phases.add(p.scored * p.vocabulary * p.logit_bytes, launches=pieces)
    products = p.needs_hidden + p.needs_weight
    if p.drops and moving_pays(p.active, p.scored - p.active, p.hidden, p.operand_bytes, products, rates):
        if not p.fused:  # rows are differentiated before they are dropped
            phases.add((p.scored - p.active) * p.vocabulary * (p.logit_bytes + p.operand_bytes), launches=0)
        moved = rows_moved(p.active, p.scored - p.active)
        phases.add(MOVES * moved * p.vocabulary * p.operand_bytes, launches=2 * pieces)
        phases.take(p.active, p.scored)
    else:
        p = phases.p = replace(p, active=p.scored)
    phases.pull_back(pieces, 1)
    d_weight = p.needs_weight * p.vocabulary * p.hidden * p.weight_grad_bytes
    d_hidden = p.needs_hidden * p.rows * p.hidden * p.operand_bytes
    if pieces > 1 and p.weight_grad_bytes < ACCUMULATOR:  # the accumulator is a second tensor
        d_weight += p.needs_weight * p.vocabulary * p.hidden * ACCUMULATOR
    piece = p.needs_hidden * min(chunk_rows * p.hidden * ACCUMULATOR, SCALED_BYTES) + taken // max(pieces, 1)
    return phases.cost(
        "single_pass", chunk_rows * p.vocabulary * p.logit_bytes, d_weight + d_hidden + piece, chunk_rows=chunk_rows
    )


def two_pass(p: Problem, rates: Rates, *, tile_bytes: int) -> Cost:
    """Two passes, (2 scored + 6 active) V H FLOPs."""
    phases = _Phases(p, rates)
    phases.take(p.scored, p.rows)
    tile = phases.score(tile_bytes)
    taken = phases.take(p.active, p.rows)
    rows, cols = vocabulary_tile(p.active, p.vocabulary, p.logit_bytes, tile_bytes)
    pieces, slices = -(-p.active // rows), -(-p.vocabulary // cols)
    phases.logits(p.active, pieces, slices)
    phases.pull_back(pieces, slices)
    d_weight = p.needs_weight * p.vocabulary * p.hidden * p.weight_grad_bytes
    d_weight += p.needs_weight * (pieces > 1) * cols * p.hidden * ACCUMULATOR
    d_hidden = p.needs_hidden * p.active * p.hidden * ACCUMULATOR
    return phases.cost("two_pass", max(tile, rows * cols * p.logit_bytes), d_weight + d_hidden + taken)


def forward_only(p: Problem, rates: Rates, *, tile_bytes: int) -> Cost:
    """Scoring alone, 2 scored V H FLOPs."""
    phases = _Phases(p, rates)
    taken = phases.take(p.scored, p.rows)
    return phases.cost("forward_only", phases.score(tile_bytes), taken)


def equal_chunks(p: Problem, workspace_bytes: int) -> int:
    """Rows per chunk of a single pass: as few chunks as the workspace allows, equal in size; 0 if no whole row fits."""
    limit = whole_row_tile(p.vocabulary, p.logit_bytes, workspace_bytes)
    return limit and -(-p.scored // max(1, -(-p.scored // limit)))


def single_pass_workspace(p: Problem, default: int) -> int:
    """The workspace of a single pass: `default` bytes, or one chunk of all rows if that takes no more memory in total.

    One chunk needs no float32 accumulator of d_weight, so its tile may use those bytes as well.
    """
    everything = p.rows * p.vocabulary * p.logit_bytes
    spared = ACCUMULATOR * p.vocabulary * p.hidden if p.needs_weight and p.weight_grad_bytes < ACCUMULATOR else 0
    return max(everything, default) if everything <= default + spared else default


def cheapest(p: Problem, workspace_bytes: int, rates: Rates, *, slice_bytes: int | None = None) -> Cost:
    """The faster schedule within the workspace, with its chunk_rows. Two passes must win by MARGIN.

    slice_bytes is the workspace of two passes, if it differs. Whether rollouts must stay whole is for the caller to check.
    Deterministic; takes about 0.1 ms.
    """
    slice_bytes = workspace_bytes if slice_bytes is None else slice_bytes
    if not (p.needs_hidden or p.needs_weight):
        return forward_only(p, rates, tile_bytes=slice_bytes)
    twice, chunk_rows = two_pass(p, rates, tile_bytes=slice_bytes), equal_chunks(p, workspace_bytes)
    if not whole_row_tile(p.vocabulary, p.logit_bytes, workspace_bytes):
        return twice
    once = single_pass(p, rates, chunk_rows=chunk_rows if rates.overlapped else min(chunk_rows, CPU_ROWS))
    return twice if MARGIN * twice.seconds < once.seconds else once
