"""REAL: rewards as labels. A group's rollouts are classified by how much likelier they have become (arXiv 2602.05630)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from rlvr_kernels.checks import check_number
from torch import Tensor

if TYPE_CHECKING:
    from rlvr_ops.objectives.custom import SurrogateRows


@dataclass(frozen=True)
class Real:
    """log(1 + sum over wrong rollouts of exp(s / tau)) + log(1 + sum over right ones of exp(-s / tau)), for each group.

    s is the mean of logp - old over a rollout's tokens, where one that is not finite counts 0. A rollout is right where its
    advantages' mean is above 0, wrong where it is below; one at 0 has no label. A group without both kinds has no loss. Every
    token gets its group's loss, so that loss_type="grpo" makes it the mean over groups, where a rollout without tokens counts as
    one without a loss. The size of an advantage is not read, and a rollout is read whole: neither ACE nor a sampling
    correction nor an entropy quantile goes with it.

    group_size: rollouts of a prompt, one group after another, as in `group_advantages`.
    tau: the temperature; a rollout's gradient by s is at most 1 / tau.

    Formula and tau from the authors' code and from ms-swift 4.6.0 (loss_type="real").
    """

    group_size: int
    tau: float = 0.5
    whole_batch: ClassVar[bool] = True
    signs_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.group_size, int) or self.group_size < 2:
            raise ValueError(f"group_size must be an integer of 2 or more, got {self.group_size!r}")
        check_number("tau", self.tau)

    def __call__(self, per_token_logps: Tensor, rows: "SurrogateRows") -> Tensor:
        """Each token's loss (n,)."""
        if rows.rollouts % self.group_size:
            raise ValueError(f"group_size must divide the {rows.rollouts} rollouts of the batch, got {self.group_size}")
        moved = per_token_logps - rows.old_per_token_logps
        sums = (moved.masked_fill(~moved.isfinite(), 0), rows.advantages, torch.ones_like(moved))
        total, label, tokens = (rows.sums(x).view(-1, self.group_size) for x in sums)
        score = total / tokens.clamp(min=1) / self.tau
        losses = _softplus_of_sum(score, label < 0) + _softplus_of_sum(-score, label > 0)
        mixed = (label < 0).any(1) & (label > 0).any(1)
        return torch.where(mixed, losses, 0).repeat_interleave(self.group_size)[rows.rollout]


def _softplus_of_sum(logits: Tensor, chosen: Tensor) -> Tensor:
    """log(1 + sum of exp(logits) (groups, G) where chosen), (groups,)."""
    anchored = torch.nn.functional.pad(logits.masked_fill(~chosen, -float("inf")), (1, 0))
    return anchored.logsumexp(1)
