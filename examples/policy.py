"""What the trainers train. Prompts are two digits; those of a right answer are at least as large as both; 0 ends it."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlvr_ops import Head, ace_loss, group_advantages, hidden_states_of, token_logps


class Policy(torch.nn.Module):
    """A model whose forward is its ACE-DAPO loss, so that the hooks of DDP and FSDP run before its body and its head."""

    def __init__(self, alpha=1.0):
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=10, pad_token_id=0, eos_token_id=0, **sizes))
        self.reference, self.alpha, self.metrics = copy.deepcopy(self.model).requires_grad_(False), alpha, []

    @torch.no_grad()
    def sample(self, prompts, group_size=8):
        """Answers to prompts (B, 2), verified, and scored by the policy and the reference: the keywords of `forward`."""
        prompts = prompts.to(self.model.device).repeat_interleave(group_size, 0)
        ids = self.model.generate(prompts, attention_mask=prompts > 0, do_sample=True, top_k=0, max_new_tokens=2)
        answers, rewards = ids[:, 2:], (ids[:, 2:] >= prompts.amax(1, keepdim=True)).all(1).float()
        batch = {"input_ids": ids, "rewards": rewards, "advantages": group_advantages(rewards, group_size)}
        batch["labels"] = answers.masked_fill((answers == 0).cumsum(1).cumsum(1) > 1, -100)  # after the first 0
        for name, model in {"old_per_token_logps": self.model, "ref_per_token_logps": self.reference}.items():
            hidden = hidden_states_of(model, ids, length=answers.shape[1])
            batch[name] = token_logps(hidden, Head.from_model(model), answers).logps
        return batch

    def forward(self, input_ids, labels, rewards, **batch):
        """The loss. Over micro-batches it adds up to the batch's, if all are given its labels' number as num_items_in_batch."""
        hidden = hidden_states_of(self.model, input_ids, length=labels.shape[1])
        batch |= {"completion_mask": labels != -100, "loss_type": "dapo", "epsilon_high": 0.28, "alpha": self.alpha}
        loss, metrics, _ = ace_loss(hidden, Head.from_model(self.model), labels, **batch)
        ace = 1.0 if (batch["advantages"] < 0).any() else torch.nan  # these are means over wrong answers
        self.metrics.append({"reward": rewards.mean()} | {k: x * ace if "ace/" in k else x for k, x in metrics.items()})
        return {"loss": loss}
