"""One of two processes that take the steps of CASES with sharded weights: two_ranks.py FILE PATH..., in CASES' order."""

import sys
from functools import partial

import tiny
import torch
import torch.distributed
import transformers
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from verl.models.transformers.dense_common import CausalLMOutputForPPO

import rlvr_ops.integrations.verl.engine  # noqa: F401
from rlvr_ops import Ace
from rlvr_ops.integrations.verl import head

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


def fsdp1(path, rows):
    """What the sum of these rows' log-probabilities takes off each weight under FSDP1, which verl's engine refuses on a CPU."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    head.install(model, CausalLMOutputForPPO)
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])})
    module = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    head.check(module, "cpu")
    tensors = tiny.batch()
    given = {name: tensors[name][rows] for name in ("input_ids", "attention_mask", "position_ids")}
    module(**given, temperature=1.0).log_probs[:, tiny.PROMPT - 1 : -1].sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    with FullyShardedDataParallel.summon_full_params(module):
        after = {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in module.named_parameters()}
    return {name: before[name] - after[name] for name in before}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    file, paths = sys.argv[1], sys.argv[2:]
    rows = slice(2 * rank, 2 * rank + 2)
    found = [step(path, *case[1:], rows=rows) for path, case in zip(paths, CASES, strict=True)]
    torch.save((found, [fsdp1(paths[0], rows), fsdp1(paths[2], rows)]), f"{file}{rank}")
    torch.distributed.destroy_process_group()
