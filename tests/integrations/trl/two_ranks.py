"""What test_two_ranks runs on every rank: `two_ranks.py MODEL OUT`. Rank 0 saves what it found.

Updates under DistributedDataParallel, with TRL's loss and the fused one; and gradients under FSDP2, with the head in the root
module's group and in a group of its own, beside the mean of the ranks' gradients without sharding.
"""

import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from rlvr_ops.integrations.trl import ACEGRPOConfig, ACEGRPOTrainer


def reward(completions, prompts, **_):
    """Completions of one prompt are all right: nothing to learn there."""
    return [
        float(prompt == "x" or completion[:1] < "@") for prompt, completion in zip(prompts, completions, strict=True)
    ]


def make_trainer(folder, out, fused):
    """A trainer of two updates."""
    args = ACEGRPOConfig(
        out + "-run", per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=2, beta=0.02,
        report_to="none", use_cpu=True, ddp_backend="gloo", bf16=False, save_strategy="no", learning_rate=1e-2, seed=3,
        gradient_checkpointing=False, gradient_accumulation_steps=2, disable_tqdm=True, loss_type="dapo", logging_steps=1,
        fused_loss=fused,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": prompt} for prompt in ("1+1=", "2+30=", "say:", "x")] * 8)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return ACEGRPOTrainer(folder, reward, args, train_dataset=rows, processing_class=tokenizer)


def trained(folder, out, fused):
    """The wrapper's name, the weights and the logs after two updates."""
    trainer = make_trainer(folder, out, fused)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {"kind": type(trainer.model_wrapped).__name__, "weights": trainer.model.state_dict(), "logs": logs}


def a_batch():
    """Other completions on each rank."""
    g = torch.Generator().manual_seed(dist.get_rank())
    ids, ones = torch.randint(3, 90, (4, 10), generator=g), torch.ones(4, 10, dtype=torch.long)
    logps = [-5 + torch.randn(4, 6, generator=g) for _ in range(2)]
    return {
        "prompt_ids": ids[:, :4], "prompt_mask": ones[:, :4], "completion_ids": ids[:, 4:], "completion_mask": ones[:, 4:],
        "advantages": torch.tensor([1.0, -0.7, -1.3, 0.4]), "num_items_in_batch": torch.tensor(96),
        "ref_per_token_logps": logps[0], "old_per_token_logps": logps[1],
    }  # fmt: skip


def gradients(trainer):
    """Of one batch, in full, by name."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer._compute_loss(trainer.model, a_batch()).backward()
    named = {name: p.grad for name, p in trainer.model.named_parameters()}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in named.items()}


def sharded_gradients(folder, out, *, head_apart):
    """Under FSDP2."""
    trainer = make_trainer(folder, out, fused=True)
    for layer in trainer.model.model.layers:
        fully_shard(layer)
    if head_apart:
        fully_shard(trainer.model.lm_head)
    fully_shard(trainer.model)
    return gradients(trainer)


def mean_gradients(folder, out):
    """Of the ranks, without a wrapper and with TRL's own loss."""
    found = gradients(make_trainer(folder, out, fused=False))
    for gradient in found.values():
        dist.all_reduce(gradient)
    return {name: gradient / dist.get_world_size() for name, gradient in found.items()}


def main(folder: str, out: str) -> None:
    """Run everything."""
    torch.set_num_threads(1)
    found = {"fused": trained(folder, out, True), "unfused": trained(folder, out, False)}
    found["expected"] = mean_gradients(folder, out)
    found["root"] = sharded_gradients(folder, out, head_apart=False)
    if "tied" not in folder or "untied" in folder:
        found["apart"] = sharded_gradients(folder, out, head_apart=True)
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()  # or a rank that ends while its threads run may abort


if __name__ == "__main__":
    main(*sys.argv[1:])
