"""What a head on several GPUs costs, predicted: the cost model for each GPU's share, and bytes over links in between.

Groups of `shards` GPUs divide the vocabulary; the groups are data parallel to each other. A group gathers the hidden
states of its GPUs' tokens, combines three float32 a row, and scatters the sums of d_hidden; between groups each GPU's
slice of d_weight is all-reduced once a step. Nothing overlaps: communication and arithmetic are added.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from rlvr_kernels.cost import H100_BF16, Problem, Rates, cheapest, single_pass_workspace
from rlvr_kernels.tile import default_workspace_bytes

NVLINK = 450e9  # bytes/s in each direction of an H100 SXM: the vendor's figure
INFINIBAND = 50e9  # bytes/s of a 400 Gb/s adapter, one for each GPU: the vendor's figure
GPUS_PER_NODE = 8
WORKSPACE_BYTES = default_workspace_bytes(torch.device("cuda"))
SLICE_BYTES = default_workspace_bytes(torch.device("cuda"), whole_rows=False)
STATE_BYTES = 12  # of a row: maximum, sum of exponentials, target logit
D_HIDDEN_BYTES = 4  # summed in float32
D_WEIGHT_BYTES = 4  # reduced in float32
HIDDEN_BYTES = 2


@dataclass(frozen=True)
class Job:
    """One optimiser step of the head alone: all GPUs' tokens, and how many GPUs."""

    tokens: int
    hidden: int
    vocabulary: int
    gpus: int
    workspace_bytes: int = WORKSPACE_BYTES


class Step(NamedTuple):
    """Of one GPU: seconds of arithmetic, of exchanging rows within the group, of all-reducing d_weight; and bytes.

    memory_bytes has the weight's slice, its gradient and accumulator, the group's hidden states and their gradient, and
    the workspace.
    """

    compute: float
    rows_exchanged: float
    weight_reduced: float
    memory_bytes: float

    @property
    def seconds(self) -> float:
        """One after the other."""
        return self.compute + self.rows_exchanged + self.weight_reduced


def bandwidth(gpus: int, stride: int = 1) -> float:
    """Bytes/s of one GPU in a ring of `gpus`, every stride-th one: within a node its link, else the node's adapters shared
    by the ring's GPUs there."""
    if gpus * stride <= GPUS_PER_NODE:
        return NVLINK
    return min(NVLINK, INFINIBAND * max(1, GPUS_PER_NODE // stride))


def step(job: Job, shards: int, rates: Rates = H100_BF16) -> Step:
    """The layout with groups of `shards` GPUs; 1 is data parallel alone."""
    groups = job.gpus // shards
    rows, vocabulary = job.tokens // groups, -(-job.vocabulary // shards)
    problem = Problem(rows, job.hidden, vocabulary, scored=rows, active=rows)
    cost = cheapest(problem, single_pass_workspace(problem, job.workspace_bytes), rates)
    row = job.hidden * (HIDDEN_BYTES + D_HIDDEN_BYTES) + 2 * STATE_BYTES
    exchanged = (shards - 1) / shards * rows * row / bandwidth(shards)
    reduced = 2 * (groups - 1) / groups * vocabulary * job.hidden * D_WEIGHT_BYTES / bandwidth(groups, shards)
    inputs = (vocabulary + rows) * job.hidden * HIDDEN_BYTES
    return Step(cost.seconds, exchanged, reduced, inputs + cost.peak_bytes)


def layouts(job: Job) -> dict[int, Step]:
    """Every power of two up to all GPUs."""
    found, shards = {}, 1
    while shards <= job.gpus:
        found[shards] = step(job, shards)
        shards *= 2
    return found


def rows_dominate(vocabulary: int, links: float, rates: Rates = H100_BF16) -> float:
    """The size of a group from which exchanging rows takes longer than the three products.

    6 N H (r - 1) / r / links > 6 N H V / r / flops: N, H and the width of a row cancel.
    """
    return 1 + vocabulary * links / rates.matmul_flops


def weights_dominate(links: float, rates: Rates = H100_BF16) -> float:
    """The tokens a GPU below which all-reducing d_weight takes longer than the three products: 8 V H / links > 6 N V H / flops."""
    return 2 * D_WEIGHT_BYTES / 6 * rates.matmul_flops / links
