"""ACE-DAPO by transformers' Trainer. `compute_loss_func` gets logits; a model whose forward is the loss makes none."""

import torch
from policy import Policy
from transformers import Trainer, TrainingArguments


class ACETrainer(Trainer):
    """Logs the policy's metrics. Trainer counts labels, adds up micro-batches and undoes DDP's average by itself."""

    def log(self, logs, start_time=None):
        """Log the means over the micro-batches since the last log beside Trainer's own."""
        rows, self.model.metrics = self.model.metrics, []
        for name in rows[0] if rows else ():
            logs[name] = self.accelerator.gather(torch.stack([row[name] for row in rows])).nanmean().item()
        super().log(logs, start_time)


torch.manual_seed(0)
policy = Policy()
arguments = TrainingArguments(
    "runs",
    max_steps=30,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    learning_rate=3e-3,
    lr_scheduler_type="constant",
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    dataloader_pin_memory=False,
)
prompts = torch.randint(1, 10, (240, 2))
# The loader samples one micro-batch ahead of the optimizer, which the old log-probabilities make up for.
trainer = ACETrainer(policy, arguments, lambda rows: policy.sample(torch.stack(rows)), prompts)
trainer.train()
