"""What the peers would take on a GPU in bf16, counted from what their code does: FLOPs, passes over logits, and accumulators.

A product takes its FLOPs at the device's rate, and its operands arrive behind them, as in `rlvr_kernels.cost`. Everything else
takes its bytes: passes over the logits, sums added to accumulators, casts of the weight. Left out, in the peers' favour: what
stays in a cache, tiles too small to fill a GPU, exponentials, and the host.
"""

from typing import NamedTuple

from rlvr_kernels.cost import Rates

ROLLOUTS = 16


class Peer(NamedTuple):
    """Products of NVH FLOPs in bf16, in TF32 (half the rate), and by Triton kernels of its own; bytes a logit in passes other
    than products; bytes an element of the weight for each piece of `rows` rows (0: of a rollout), and once; slices of `cols`
    columns, for each of which d_hidden takes `slice_bytes` an element; launches for each of those tiles.
    """

    name: str
    key: str
    products: float = 8
    tf32: float = 0
    own: float = 0
    logit_bytes: float = 0
    weight_bytes: float = 0
    rows: int = 1 << 30
    once_bytes: float = 0
    cols: int = 1 << 30
    slice_bytes: float = 0
    launches: int = 4

    def seconds(self, n: int, h: int, v: int, rates: Rates) -> float:
        """The time of loss and gradients of (n, H) hidden states and a weight (V, H)."""
        flops = self.products + 2 * self.tf32 + self.own * rates.matmul_flops / rates.own_flops(h)
        rows = n // ROLLOUTS if self.rows == 0 else self.rows
        pieces, slices = -(-n // rows), -(-v // self.cols)
        moved = self.logit_bytes * n * v + (self.weight_bytes * pieces + self.once_bytes) * v * h
        moved += self.slice_bytes * slices * n * h
        launches = self.launches * pieces * slices
        return (
            flops * n * v * h / rates.matmul_flops + moved / rates.bytes_per_second + launches * rates.overhead_seconds
        )


PEERS = [
    # 41 bytes fit the published 59 ms of cross entropy beside 42 ms of products at (8192, 4096, 151936) on an H100.
    Peer("eager, cross_entropy", "eager", 6, logit_bytes=41),
    # Read twice for the log-sum-exp, then read and overwritten, if the compiler fuses all that it could.
    Peer("eager under torch.compile", "eager-compiled", 6, logit_bytes=8),
    # Tiles of 4096 x 32768 are folded, made again, and overwritten; both gradients are added up in float32.
    Peer("TRL", "trl", 8, logit_bytes=6, weight_bytes=8, rows=4096, once_bytes=10, cols=32768, slice_bytes=8),
    # A rollout at a time in tiles of 4096 columns: d_weight in float32, added to one in bf16, and the weight widened.
    Peer("Liger, GRPO", "liger-grpo", 4, tf32=4, weight_bytes=34, rows=0, cols=4096, slice_bytes=12, launches=30),
    # 512 rows at a time, the softmax, its log and the entropy written out; d_weight is added up in bf16.
    Peer("verl, PyTorch", "verl-torch", 8, logit_bytes=118, weight_bytes=6, rows=512, launches=40),
    # The logits twice by kernels of its own, given the rate of ours; slices of 9504 columns.
    Peer("verl, Triton", "verl-triton", 4, own=4, cols=9504, slice_bytes=6, launches=3),
]
