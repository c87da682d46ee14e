"""arm_advantages: advantages shifted against answers that the policy is already sure of. One sort over the tokens."""

from __future__ import annotations

from fractions import Fraction

import torch
from rlvr_kernels.checks import check_tensor
from torch import Tensor

from rlvr_ops.advantages.groups import check_like, make_groups
from rlvr_ops.checks import active_logps, check_verdicts


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

    The confidence c is the geometric mean probability of the least likely `fraction` of tokens, rounded up to whole tokens,
    and 1 without tokens. `per_token_logps` (B, T) are the answer's, `prompt_logps` (B, P) the prompt's, in nats and under
    one policy. The prompt's first token has none: mask it. `advantages` is (B,) or (B, T), and the result has its shape and
    dtype. `correct` (B,) holds verdicts of 0 and 1, grouped as in `group_advantages`. Right and wrong answers get the same
    shift, and nothing is centred again. A constant to any gradient.

    The formula comes from secondary readings. The paper's alpha and its rounding of `fraction` are not verified, so alpha
    has no default. One reading also leaves groups alone in which all are correct; this function does not.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> answers, prompts = torch.tensor([[0.5, 1.0], [0.25, 1.0]]).log(), torch.tensor([[0.4], [0.4]]).log()
    >>> correct = torch.tensor([1, 0])
    >>> arm_advantages(torch.tensor([1.0, -1.0]), answers, prompt_logps=prompts, correct=correct, group_size=2, alpha=1.0)
    tensor([ 0.9000, -0.8500])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie above 0 and at most at 1, got {fraction}")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    check_tensor("advantages", advantages)
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
    check_like("correct", correct, "the rollouts", answers)
    check_verdicts("correct", correct)
    groups = make_groups("correct", correct, group_size, group_ids)
    shift = torch.where(groups.max((correct != 0).long()) > 0, alpha * (prompts - answers), 0.0)
    shift = shift if advantages.ndim == 1 else shift[:, None]
    return (advantages.detach() + shift).to(advantages.dtype) + 0.0  # -0.0 + 0.0 is 0.0


def _confidences(name: str, logps: Tensor, mask_name: str, mask: Tensor | None, fraction: float) -> Tensor:
    """exp of the mean over each row's lowest ceil(fraction n) of n log-probabilities, (B,)."""
    values, counts = active_logps(name, logps, mask_name, mask)
    if logps.ndim != 2:
        raise ValueError(f"{name} must have shape (B, tokens), got {tuple(logps.shape)}")
    share = max(
        Fraction(fraction).limit_denominator(10**6), Fraction(1, 10**6)
    )  # 7 % of 100 is 7, but 100 * 0.07 is more
    kept = (counts.sum(1, keepdim=True) * share.numerator + share.denominator - 1) // share.denominator
    lowest = torch.arange(logps.shape[1], device=logps.device) < kept
    total = values.masked_fill(~counts, float("inf")).sort(dim=1).values.masked_fill(~lowest, 0).sum(1)
    return (total / kept[:, 0].clamp(min=1)).exp()
