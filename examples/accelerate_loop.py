"""ACE-DAPO by `accelerate launch`: one process or several take the same steps. Arguments: trackers, such as tensorboard.

On a CPU several processes are `ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 examples/accelerate_loop.py`.
"""

import sys
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from policy import Policy

STEPS, MICRO_BATCHES, PROMPTS = 30, 4, 2

accelerator = Accelerator(log_with=sys.argv[1:] or None, project_dir="runs")
accelerator.init_trackers("ace")
torch.manual_seed(0)
policy = Policy().to(accelerator.device)
model, optimizer = accelerator.prepare(policy, torch.optim.AdamW(policy.model.parameters(), lr=3e-3))
for step in range(STEPS):
    batches, losses = [], []
    for index in range(accelerator.process_index, MICRO_BATCHES, accelerator.num_processes):
        torch.manual_seed(step * MICRO_BATCHES + index)  # the micro-batch's own, whichever process samples it
        batches.append(policy.sample(torch.randint(1, 10, (PROMPTS, 2))))
    num_items = accelerator.reduce(sum((batch["labels"] != -100).sum() for batch in batches))
    for batch in batches:
        with nullcontext() if batch is batches[-1] else accelerator.no_sync(model):
            loss = model(**batch, num_items_in_batch=num_items)["loss"]
            accelerator.backward(loss * accelerator.num_processes)  # DDP averages what is to be added
        losses.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    rows, policy.metrics = policy.metrics, []
    seen = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    logs = {name: accelerator.reduce(torch.stack([x.nansum(), x.isfinite().sum()])) for name, x in seen.items()}
    logs = {name: total / count for name, (total, count) in logs.items()}
    logs["loss"] = accelerator.reduce(sum(losses))
    accelerator.log({name: value.item() for name, value in logs.items()}, step)
    accelerator.print(f"step {step} loss {logs['loss']:.3f} reward {logs['reward']:.2f}")
accelerator.end_training()
