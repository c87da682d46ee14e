"""A batch of log-probabilities, and what is asked of every framework's loss."""

from types import SimpleNamespace

import torch

SETTINGS = [
    {},
    {"alpha": 0.5, "confidence": "old"},
    {"confidence_reduction": "sum", "alpha": 0.3},
    {"shape": "relu", "confidence": "old"},
]


def make_batch(rollouts=6, tokens=7, seed=0):
    """Log-probabilities (B, T) of four policies, one advantage for each token, and a mask that leaves each rollout some."""
    make = torch.Generator().manual_seed(seed)
    logps = -torch.rand(rollouts, tokens, generator=make) * 3

    def near():
        return logps + 0.4 * torch.randn(rollouts, tokens, generator=make)

    lengths = torch.randint(1, tokens + 1, (rollouts,), generator=make)
    mask = torch.arange(tokens) < lengths[:, None]
    signs = torch.tensor([1.0, -1.0]).repeat(rollouts)[:rollouts]
    advantages = (signs * (0.2 + torch.rand(rollouts, generator=make)))[:, None].expand(-1, tokens).clone()
    return SimpleNamespace(
        logps=logps, old=near(), ref=near(), sampling=near(), advantages=advantages, mask=mask, lengths=lengths
    )


def value_and_gradient(loss_of, logps):
    """The loss and its gradient by the log-probabilities."""
    leaf = logps.clone().requires_grad_()
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def assert_same(found, wanted, tolerance=1e-6):
    for name, a, b in zip(("loss", "gradient"), found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
