"""What a policy says about rollouts that are there already: hidden states of the completions, and their log-probabilities."""

import torch
from torch import Tensor

import rlvr_ops
from rlvr_trainer.policies import Policy
from rlvr_trainer.rollouts import Rollouts


def hidden_states_of(policy: Policy, rollouts: Rollouts) -> Tensor:
    """(B, T, H), row t predicting column t of the completions. Differentiable."""
    return policy.hidden_states(rollouts.input_ids, rollouts.attention_mask, rollouts.completion_ids.shape[1])


@torch.no_grad()
def scores_of(policy: Policy, rollouts: Rollouts, temperature: float) -> Tensor:
    """Log-probabilities (B, T) of the completions at a temperature, 0 where masked."""
    with policy.autocast():
        return rlvr_ops.token_logps(
            hidden_states_of(policy, rollouts),
            policy.head,
            rollouts.completion_ids,
            completion_mask=rollouts.completion_mask,
            temperature=temperature,
        ).logps


def confidences_of(policy: Policy, rollouts: Rollouts, temperature: float, batch_size: int) -> tuple[list[float], int]:
    """The confidence in [0, 1] of every rollout, and how many of them were stated in words.

    What the completion says in `<confidence>...</confidence>` if that can be read, else the mean probability of its tokens
    under the policy. Equal completions of a prompt are scored once. Draws no random numbers.
    """
    stated = [rlvr_ops.stated_confidence(text) for text in rollouts.texts]
    tokens = [tuple(row) for row in rollouts.input_ids.tolist()]
    distinct = list({row: i for i, row in enumerate(tokens) if stated[i] is None}.values())
    measured: dict[tuple[int, ...], float] = {}
    for start in range(0, len(distinct), batch_size):
        rows = distinct[start : start + batch_size]
        part = rollouts.select(rows)
        found = rlvr_ops.mean_token_probability(scores_of(policy, part, temperature), part.completion_mask)
        measured |= zip([tokens[i] for i in rows], found.tolist(), strict=True)
    confidences = [measured[row] if value is None else value for row, value in zip(tokens, stated, strict=True)]
    return confidences, sum(value is not None for value in stated)
