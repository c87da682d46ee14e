"""A tiny policy whose forward is its loss, and batches of any size for it."""

import torch
from torch import nn

import rlvr_ops

VOCABULARY, HIDDEN = 61, 16


class Policy(nn.Module):
    """One attention block and an lm_head; `forward` returns `ace_loss` of a batch."""

    def __init__(self, **loss):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.block = Block()
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.loss = loss

    def hidden_states(self, ids):
        """(B, T, H), or (N, H); packed rows attend to each other, which no test minds."""
        return self.norm(self.block(self.embedding(ids)))

    def forward(self, ids, advantages, **given):
        return rlvr_ops.ace_loss(
            self.hidden_states(ids), self.lm_head.weight, ids, advantages, **self.loss, **given
        ).loss


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 1, HIDDEN)).unbind(-3)
        q, k, v = (part.transpose(-3, -2) for part in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.squeeze(-3))


def make_policy(dtype=torch.float64, **loss):
    """The same weights every time."""
    torch.manual_seed(0)
    return Policy(**loss).to(dtype)


def make_batch(rollouts=4, length=8, *, packed=False, seed=0, dtype=torch.float64):
    """Keyword arguments of `Policy.forward`: `rollouts` rollouts of up to `length` tokens, scored by two other policies."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rollouts, 1), generator=g)
    per_token = {
        "ids": torch.randint(VOCABULARY, (rollouts, length), generator=g),
        "ref_per_token_logps": -4 + 0.2 * torch.randn(rollouts, length, generator=g, dtype=dtype),
        "old_per_token_logps": -4 + 0.2 * torch.randn(rollouts, length, generator=g, dtype=dtype),
    }
    advantages = torch.randn(rollouts, generator=g, dtype=dtype)
    if not packed:
        return {**per_token, "advantages": advantages, "completion_mask": mask}
    lengths = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
    return {name: x[mask] for name, x in per_token.items()} | {"advantages": advantages, "cu_seqlens": lengths}


def gradients(policy, loss):
    """Every parameter's gradient of a loss, by name."""
    named = dict(policy.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
