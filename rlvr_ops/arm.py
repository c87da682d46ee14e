"""arm_advantages: advantages that hold back answers the policy is already sure of, relative to their prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from rlvr_ops import arguments
from rlvr_ops.groups import check_like, make_groups


def arm_advantages(
    advantages: Tensor,
    per_token_logps: Tensor,
    completion_mask: Tensor | None = None,
    *,
    prompt_logps: Tensor,
    prompt_mask: Tensor | None = None,
    correct: Tensor,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    alpha: float,
    fraction: float = 0.2,
) -> Tensor:
    """A + alpha (c(prompt) - c(answer)), and A in groups without a correct rollout (ProGRPO, arXiv 2602.05281).

    The confidence c is the geometric mean of the probabilities of the `fraction` of tokens least likely: of the answer by
    `per_token_logps` (B, T), of the prompt by `prompt_logps` (B, P). Log-probabilities are in nats and come from one
    policy; the prompt's first token has none, so mask it. `advantages` are (B,) or (B, T), `correct` (B,) what the
    verifier said, 0 or 1, in groups as in `group_advantages`. The shift is added to right and wrong answers alike and not
    centred again. A constant to any gradient.

    Taken from secondary readings: the paper's alpha is not verified and has no default; nor is it that 20 % rounds up to
    whole tokens, as it does here. One reading leaves groups alone too whose rollouts are all correct; this one does not.
    Where no token is unmasked c is 1.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> answers, prompts = torch.tensor([[0.5, 1.0], [0.25, 1.0]]).log(), torch.tensor([[0.4], [0.4]]).log()
    >>> correct = torch.tensor([1, 0])
    >>> arm_advantages(torch.tensor([1.0, -1.0]), answers, prompt_logps=prompts, correct=correct, group_size=2, alpha=1.0)
    tensor([ 0.9000, -0.8500])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie above 0 and at most at 1, got {fraction}.")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be at least 0, got {alpha}.")
    arguments.check_tensor("advantages", advantages)
    answers = _confidences("per_token_logps", per_token_logps, "completion_mask", completion_mask, fraction)
    prompts = _confidences("prompt_logps", prompt_logps, "prompt_mask", prompt_mask, fraction)
    if advantages.shape not in (answers.shape, per_token_logps.shape):
        raise ValueError(
            f"advantages must have shape (B,) = {tuple(answers.shape)} or (B, T) = {tuple(per_token_logps.shape)} "
            f"like per_token_logps, got {tuple(advantages.shape)}"
        )
    if prompts.shape != answers.shape:
        raise ValueError(
            f"prompt_logps must have a row for each of B = {len(answers)} rollouts like per_token_logps, "
            f"got {tuple(prompt_logps.shape)}"
        )
    arguments.check_tensor("correct", correct, floating=False)
    check_like("correct", correct, "the rollouts", answers)
    if bool(((correct != 0) & (correct != 1)).any()):
        raise ValueError("correct must hold only 0 and 1: give what the verifier said, not the shaped reward.")
    groups = make_groups("correct", correct, group_size, group_ids)
    shift = torch.where(groups.max((correct != 0).long()) > 0, alpha * (prompts - answers), 0.0)
    shift = shift if advantages.ndim == 1 else shift[:, None]
    return (advantages.detach() + shift).to(advantages.dtype)


def _confidences(name: str, logps: Tensor, mask_name: str, mask: Tensor | None, fraction: float) -> Tensor:
    """exp of the mean over each row's lowest log-probabilities, ceil(fraction of its tokens) of them, (B,)."""
    arguments.check_tensor(name, logps)
    if logps.ndim != 2:
        raise ValueError(f"{name} must have shape (B, tokens), got {tuple(logps.shape)}")
    if mask is not None:
        arguments.check_tensor(mask_name, mask, logps.device, floating=False)
        if mask.shape != logps.shape:
            raise ValueError(f"{mask_name} must have shape {tuple(logps.shape)} like {name}, got {tuple(mask.shape)}")
    counts = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask != 0
    values = logps.detach().to(torch.promote_types(logps.dtype, torch.float32)).masked_fill(~counts, float("inf"))
    if bool(values.isnan().any()):
        row, column = (int(i) for i in values.isnan().nonzero()[0])
        raise ValueError(f"{name} must not be NaN where {mask_name} is 1, got NaN at {(row, column)}")
    kept = (counts.sum(1) * fraction * (1 - 1e-6)).ceil()[:, None]  # 30 % of 50 is 15, though float32's 0.3 is more
    lowest = torch.arange(logps.shape[1], device=logps.device) < kept
    total = values.sort(dim=1).values.masked_fill(~lowest, 0).sum(1)
    return (total / kept[:, 0].clamp(min=1)).exp()
