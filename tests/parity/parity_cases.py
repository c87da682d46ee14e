"""The batch that every peer is given, and the comparison: loss and gradients, ours against theirs."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from loss_cases import assert_same, policy_loss_from_logps

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # verl adds 1e-8 to counts and 1e-10 to weights
LENGTHS = (7, 5, 1, 4, 6, 3)
LONGEST = 9  # dr_grpo's constant, longer than any rollout


@dataclass(frozen=True)
class Batch:
    """B = 6 rollouts of at most T = 7 tokens: log-probabilities under four policies, with finite noise in the padding."""

    logps: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    sampling: torch.Tensor
    entropies: torch.Tensor
    advantages: torch.Tensor  # (B,)
    mask: torch.Tensor

    def to(self, dtype: torch.dtype) -> "Batch":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()})

    @property
    def tokens(self) -> torch.Tensor:
        return self.mask.sum(dim=1)


def make_batch(lengths: tuple[int, ...] = LENGTHS, *, dtype: torch.dtype = torch.float64, spread: float = 0.3) -> Batch:
    """Ratios on both sides of every bound: within a rollout, across rollouts, and one outlier of either sign."""
    g = torch.Generator().manual_seed(11)
    b, t = len(lengths), max(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.arange(t) < torch.tensor(lengths)[:, None]
    mask[[0, 4], [3, 2]] = False  # as a tool's tokens are
    logps = -normal(b, t).abs() - 0.1
    old = logps + spread * normal(b, t) + torch.linspace(-0.5, 0.5, b, dtype=torch.float64)[:, None]
    old[0, 1] = logps[0, 1] - 1.7  # ratio 5.5 where A > 0
    old[1, 0] = logps[1, 0] - 1.9  # ratio 6.7 where A < 0: beyond delta, and beyond the dual clip
    batch = Batch(
        logps=logps,
        old=old,
        ref=logps + spread * normal(b, t),
        sampling=old + 0.5 * spread * normal(b, t) + 0.1 * normal(b, 1),
        entropies=normal(b, t).abs() + 0.05,
        advantages=torch.tensor([1.0, -1.3, 0.4, -0.5, 2.0, 0.0, -2.0, 0.7][:b], dtype=torch.float64),
        mask=mask,
    )
    return batch.to(dtype)


class Outcome(NamedTuple):
    """A loss, and its gradients where the mask is set: by the log-probabilities and by the entropies."""

    loss: torch.Tensor
    d_logps: torch.Tensor
    d_entropies: torch.Tensor


def differentiate(loss, batch: Batch) -> Outcome:
    """`loss(logps, entropies)` at the batch's values; the gradient in the padding must be 0."""
    leaves = [x.detach().clone().requires_grad_() for x in (batch.logps, batch.entropies)]
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else (None, None)
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]
    for grad in grads:
        assert not bool(grad[~batch.mask].any()), "the padding has a gradient"
    return Outcome(value.detach(), *grads)


def ours(batch: Batch, **kwargs) -> Outcome:
    """`policy_loss_from_logps`; `old`, `ref` and `sampling` are passed only where the case says True."""
    given = {
        f"{name}_per_token_logps": getattr(batch, name)
        for name in ("old", "ref", "sampling")
        if kwargs.pop(name, False)
    }
    with_entropy = kwargs.get("entropy_coef", 0.0) != 0 or kwargs.get("top_entropy_quantile", 1.0) < 1

    def loss(logps, entropies):
        extra = {"per_token_entropies": entropies} if with_entropy else {}
        arguments = {"completion_mask": batch.mask} | given | extra | kwargs
        return policy_loss_from_logps(logps, batch.advantages, **arguments).loss

    return differentiate(loss, batch)


def assert_parity(got: Outcome, theirs: Outcome, tolerance: float | None = None) -> None:
    """The loss to `tolerance` absolute (or relative where it is above 1), each gradient relative to its largest entry."""
    tolerance = TOLERANCE[theirs.loss.dtype] if tolerance is None else tolerance
    assert_same(got.loss, theirs.loss, tolerance, "loss", scale=1.0)
    assert_same(got.d_logps, theirs.d_logps, tolerance, "d_logps")
    assert_same(got.d_entropies, theirs.d_entropies, tolerance, "d_entropies")


def plus(one: Outcome, other: Outcome, times: float = 1.0) -> Outcome:
    """one + times * other: for a difference that a formula accounts for."""
    return Outcome(*(x + times * y for x, y in zip(one, other, strict=True)))


def aggregate(values: torch.Tensor, mask: torch.Tensor, loss_type: str) -> torch.Tensor:
    """A per-token tensor (B, T) by a loss type's rule, in the plainest form; dr_grpo's constant length is LONGEST."""
    sums = torch.where(mask, values, 0).sum(dim=1)
    match loss_type:
        case "grpo":
            return (sums / mask.sum(dim=1).clamp(min=1)).mean()
        case "luspo":
            return sums.mean()
        case "dr_grpo":
            return sums.mean() / LONGEST
        case "dapo" | "bnpo":
            return sums.sum() / mask.sum()


def by_the_rollouts_ratio(
    logps: torch.Tensor, old: torch.Tensor | None, ref: torch.Tensor, mask: torch.Tensor, loss_type: str
) -> torch.Tensor:
    """What the corrected KL of TRL and Liger has more at level "sequence": (s - rho) k3, aggregated.

    s is the rollout's ratio, rho the token's own, which is the one that this library takes.
    """
    log_ratio = torch.where(mask, logps - (logps.detach() if old is None else old), 0)
    log_s = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    gap = torch.where(mask, ref - logps, 0)
    return aggregate((log_s.exp() - log_ratio.exp()) * (gap.exp() - gap - 1), mask, loss_type)
