"""One of two processes that take the steps of CASES with sharded weights: two_ranks.py FILE PATH..., in CASES' order."""

import sys

import tiny
import torch
import torch.distributed

import rlvr_ops.integrations.verl.engine  # noqa: F401
from rlvr_ops import Ace

CASES = [  # model, remove_padding, processes that share a shard (-1: all)
    ({"tie_word_embeddings": False}, False, -1),
    ({"tie_word_embeddings": False}, True, -1),
    ({"tie_word_embeddings": True}, False, -1),
    ({"tie_word_embeddings": True}, True, -1),
    ({"tie_word_embeddings": False}, True, 1),
]


def step(path, remove_padding, fsdp_size, rows=slice(None)):
    """Log-probabilities of these rows, then the loss and the gradients of a step on micro-batches of one rollout."""
    worker = tiny.training_worker(path, remove_padding=remove_padding, micro_batch=1, fsdp_size=fsdp_size)
    logps, _ = tiny.score(worker, tiny.nested(tiny.batch(), rows))
    metrics, gradients = tiny.train(
        worker, tiny.nested(tiny.batch(), rows), tiny.actor("ace", entropy_coeff=0.05), Ace()
    )
    return type(worker.engine).__name__, logps, metrics["loss"], gradients


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    file, paths = sys.argv[1], sys.argv[2:]
    rows = slice(2 * rank, 2 * rank + 2)
    found = [step(path, *case[1:], rows=rows) for path, case in zip(paths, CASES, strict=True)]
    torch.save(found, f"{file}{rank}")
    torch.distributed.destroy_process_group()
