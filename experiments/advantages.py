"""Advantages that the trainer's settings cannot name, each from a batch and what policy and reference say about it."""

from collections.abc import Callable

import torch
from rlvr_trainer.config import Config
from rlvr_trainer.policies import Policy
from rlvr_trainer.rollouts import Batch
from rlvr_trainer.scoring import scores_of
from torch import Tensor

import rlvr_ops
from rlvr_ops import arm_advantages, group_advantages

ARM_ALPHA = 0.5  # the paper's is not known here


def _ace_weights(batch: Batch, policy: Policy, reference: Policy, config: Config) -> Tensor:
    """(B,) 1 + softplus(c), by which ACE would multiply a wrong rollout's advantage."""
    temperature, ones = config.rollout.temperature, torch.ones_like(batch.advantages)
    logps, ref = (scores_of(one, batch.rollouts, temperature) for one in (policy, reference))
    return -rlvr_ops.ace_advantages(-ones, logps, ref, batch.rollouts.completion_mask)


def constant(batch: Batch, policy: Policy, reference: Policy, config: Config, step: int) -> Tensor:
    """Every wrong rollout weighs what they weigh on average under ACE."""
    wrong = batch.advantages < 0
    mean = _ace_weights(batch, policy, reference, config)[wrong].mean()
    return torch.where(wrong, batch.advantages * mean, batch.advantages)


def shuffled(batch: Batch, policy: Policy, reference: Policy, config: Config, step: int) -> Tensor:
    """ACE's weights, dealt out among the batch's wrong rollouts at random."""
    rows = (batch.advantages < 0).nonzero().flatten()
    weights = _ace_weights(batch, policy, reference, config)[rows]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1000 * config.run.seed + step))
    found = batch.advantages.clone()
    found[rows] *= weights[order]
    return found


def lens(batch: Batch, policy: Policy, reference: Policy, config: Config, step: int) -> Tensor:
    """LENS (arXiv 2510.08696) by the mean log-probability of each rollout."""
    mask = batch.rollouts.completion_mask
    logps = scores_of(policy, batch.rollouts, config.rollout.temperature)
    confidences = (logps.sum(1) / mask.sum(1)).exp()
    return group_advantages(batch.rewards, config.rollout.group_size, "lens", confidences=confidences)


def arm(batch: Batch, policy: Policy, reference: Policy, config: Config, step: int) -> Tensor:
    """ProGRPO's ARM (arXiv 2602.05281) with alpha = `ARM_ALPHA`."""
    rollouts, size = batch.rollouts, config.rollout.group_size
    prompts, mask = _prompt_logps(batch, policy, config)
    return arm_advantages(
        batch.advantages,
        scores_of(policy, rollouts, config.rollout.temperature),
        rollouts.completion_mask,
        prompt_logps=prompts.repeat_interleave(size, 0),
        prompt_mask=mask.repeat_interleave(size, 0),
        correct=batch.rewards,
        group_size=size,
        alpha=ARM_ALPHA,
    )


@torch.no_grad()
def _prompt_logps(batch: Batch, policy: Policy, config: Config) -> tuple[Tensor, Tensor]:
    """Log-probabilities (groups, P - 1) of the prompts' tokens, and which of them have one: not the first."""
    rollouts, first = batch.rollouts, slice(None, None, config.rollout.group_size)
    width = rollouts.input_ids.shape[1] - rollouts.completion_ids.shape[1]
    ids, attended = rollouts.input_ids[first, :width], rollouts.attention_mask[first, :width]
    mask = attended[:, 1:] * attended[:, :-1]
    hidden = policy.hidden_states(ids, attended, width - 1)
    return rlvr_ops.token_logps(hidden, policy.head, ids[:, 1:], completion_mask=mask).logps, mask


ADVANTAGES: dict[str, Callable[[Batch, Policy, Policy, Config, int], Tensor]] = {
    one.__name__: one for one in (constant, shuffled, lens, arm)
}
