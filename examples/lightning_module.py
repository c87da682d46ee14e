"""ACE-DAPO by Lightning. Its automatic optimisation averages micro-batches, which have unequal tokens: so by hand."""

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from policy import Policy
from torch.utils.data import DataLoader


class ACE(lightning.LightningModule):
    """A policy that answers each batch of prompts, and takes one step of the optimizer in micro-batches."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.automatic_optimization = policy, False

    def training_step(self, prompts, index):
        """Sample, count the tokens of all devices, accumulate, step, log."""
        batches, total = [self.policy.sample(part) for part in prompts.chunk(4)], 0
        num_items = self.all_gather(sum((batch["labels"] != -100).sum() for batch in batches)).sum()
        for batch in batches:
            loss = self.policy(**batch, num_items_in_batch=num_items)["loss"]
            self.manual_backward(loss * self.trainer.world_size)  # DDP averages what is to be added
            total += self.all_gather(loss.detach()).sum()
        self.optimizers().step()
        self.optimizers().zero_grad()
        rows, self.policy.metrics = self.policy.metrics, []
        logs = {name: self.all_gather(torch.stack([row[name] for row in rows])).nanmean() for name in rows[0]}
        self.log_dict(logs | {"loss": total})
        self.print(f"loss {total:.3f} reward {logs['reward']:.2f}")

    def configure_optimizers(self):
        """The reference stays as it is."""
        return torch.optim.AdamW(self.policy.model.parameters(), lr=3e-3)


if __name__ == "__main__":
    lightning.seed_everything(0)
    trainer = lightning.Trainer(max_steps=30, log_every_n_steps=1, logger=CSVLogger("runs"), enable_checkpointing=False)
    trainer.fit(ACE(Policy()), DataLoader(torch.randint(1, 10, (240, 2)), batch_size=8))
