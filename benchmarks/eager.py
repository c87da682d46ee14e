"""The losses in eager PyTorch with full logits, as someone who cares about speed would write them."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from benchmarks.cases import Batch, Case
from benchmarks.entrants import Outputs, Run, Score


def by_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, T) in float32: PyTorch's own fused log-softmax and gather."""
    logits = (hidden @ weight.T).float()
    logps = -cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="none").view(ids.shape)
    return logps, entropies(logits) if entropy else None


def by_logsumexp(hidden: Tensor, weight: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, T) in float32: the target's logit less the log-sum-exp."""
    logits = (hidden @ weight.T).float()
    logps = logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)
    return logps, entropies(logits) if entropy else None


@torch.no_grad()
def entropies(logits: Tensor) -> Tensor:
    """In nats, without gradient."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def clipped_loss(logp: Tensor, old: Tensor, advantages: Tensor, ref: Tensor | None) -> Tensor:
    """GRPO's loss, mean over rollouts of token means; ACE's if `ref` is given. No masked tokens."""
    if ref is not None:
        shift = (logp.detach() - ref).mean(dim=1)
        advantages = torch.where(advantages < 0, advantages * (1 + softplus(shift)), advantages)
    ratio = torch.exp(logp - old)
    advantages = advantages[:, None]
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean(dim=1).mean()


def scored(case: Case, score: Score) -> Run:
    """What the case asks for, from a function that scores: its log-probabilities under the loss in plain PyTorch."""

    def run(batch: Batch) -> Outputs:
        logps, entropy = score(batch.hidden, batch.weight, batch.ids, case.entropy)
        if case.forward:
            return Outputs(None, logps, entropy)
        ref = batch.ref if case.loss == "ace" else None
        return Outputs(clipped_loss(logps, batch.old, batch.advantages, ref), logps.detach(), entropy)

    return run


def on_active_rows(case: Case, score: Score) -> Run:
    """The same for the rollouts that have an advantage alone: what an eager trainer could do and trainers do not."""
    whole = scored(case, score)

    def run(batch: Batch) -> Outputs:
        kept = Batch(*(x if x is batch.weight else x[batch.active] for x in batch))
        out = whole(kept)
        assert out.loss is not None
        return Outputs(out.loss * (len(kept.advantages) / len(batch.advantages)))

    return run
