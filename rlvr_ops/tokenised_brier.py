"""tokenised_brier_loss: trains the token that states a confidence, from hidden states and K rows of the lm_head."""

from __future__ import annotations

import torch
from rlvr_kernels.logits import Head, accumulator_dtype
from torch import Tensor

from rlvr_ops import arguments, ops
from rlvr_ops.judged import check_correct

__all__ = ["tokenised_brier_loss"]


def tokenised_brier_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    confidence_token_ids: Tensor,
    correct: Tensor,
    *,
    confidence_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """Mean over rows of sum_k p_k (y - k / (K - 1))^2, p the softmax over the K confidence tokens alone (arXiv 2508.18847).

    `hidden_states` (.., H) are the states that predict the confidence token, `correct` (..) the verdict y on each, and
    `confidence_token_ids` (K,) the tokens of 0 to K - 1 in order: "0" to "100" for percentages, "0" to "9" where a
    tokenizer splits larger numbers. Of (B, T, H) give all states and mark the rows in `confidence_mask` (B, T), one a
    rollout: only marked rows are read (their number is fetched from the device), masked ones may hold anything.

    The loss is least where all mass is on the token nearest to the true probability of being correct. That says nothing of
    how much mass the K tokens have among all V, so the format of answers must be kept by other means.
    `num_items_in_batch` is the number of marked rows in the whole batch if this is a part of it. With nothing marked the
    loss is 0 and attached to the graph.

    Costs 2 n K H for n marked rows, and nothing of width V but the weight's own gradient, which is 0 outside its K rows.
    A `temperature` tensor and the head's other keywords are as in `token_logps`, one temperature per row.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> hidden, weight = torch.zeros(1, 4), torch.randn(200, 4)
    >>> tokenised_brier_loss(hidden, weight, torch.arange(101), torch.tensor([1]))  # uniform: the mean of (1 - k/100)^2
    tensor(0.3350)
    """
    Head(logit_scale, softcap)
    rows, y, warmth = _marked_rows(hidden_states, lm_head_weight, lm_head_bias, correct, confidence_mask, temperature)
    _check_tokens(confidence_token_ids, lm_head_weight)
    count = max(len(rows), 1) if num_items_in_batch is None else num_items_in_batch
    if not isinstance(count, Tensor) and not count > 0:
        raise ValueError(f"num_items_in_batch must be > 0, the marked rows of the global batch, got {count}")
    dtype = ops.compute_dtype(hidden_states, lm_head_weight)
    wide = accumulator_dtype(dtype)
    z = (rows.to(dtype) @ lm_head_weight.index_select(0, confidence_token_ids).to(dtype).T).to(wide)
    if lm_head_bias is not None:
        z = z + lm_head_bias.index_select(0, confidence_token_ids).to(wide)
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    levels = torch.arange(z.shape[1], device=z.device, dtype=wide) / (z.shape[1] - 1)
    penalties = (y.to(wide)[:, None] - levels).square()
    total = ((z / warmth.to(wide)[:, None]).softmax(1) * penalties).sum()
    return total / count


def _marked_rows(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    correct: Tensor,
    confidence_mask: Tensor | None,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (n, H), verdicts (n,) and temperatures (n,) of the rows that count."""
    arguments.check_head(hidden_states, lm_head_weight, lm_head_bias)
    shape = hidden_states.shape[:-1]
    warmth = torch.as_tensor(temperature, device=hidden_states.device)
    if warmth.ndim and warmth.shape != shape:
        raise ValueError(
            f"temperature must be a number or have shape {tuple(shape)}, one per row, got {tuple(warmth.shape)}"
        )
    arguments.check_tensor("correct", correct, hidden_states.device, floating=False)
    if correct.shape != shape:
        raise ValueError(
            f"correct must have shape {tuple(shape)} like hidden_states without H, got {tuple(correct.shape)}: "
            "expand one verdict per rollout over its tokens, correct[:, None].expand(B, T)"
        )
    rows, verdicts, warmth = hidden_states.flatten(0, -2), correct.flatten(), warmth.expand(shape).flatten()
    if confidence_mask is not None:
        arguments.check_tensor("confidence_mask", confidence_mask, hidden_states.device, floating=False)
        if confidence_mask.shape != shape:
            raise ValueError(
                f"confidence_mask must have shape {tuple(shape)} like hidden_states without H, "
                f"got {tuple(confidence_mask.shape)}"
            )
        marked = (confidence_mask != 0).flatten().nonzero()[:, 0]
        rows, verdicts, warmth = rows[marked], verdicts[marked], warmth[marked]
    if not bool(((warmth > 0) & warmth.isfinite()).all()):
        raise ValueError("temperature must be > 0 and finite where confidence_mask is 1")
    return rows, check_correct(verdicts, "the marked rows of hidden_states", verdicts), warmth


def _check_tokens(confidence_token_ids: Tensor, lm_head_weight: Tensor) -> None:
    arguments.check_tensor("confidence_token_ids", confidence_token_ids, lm_head_weight.device, floating=False)
    if confidence_token_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"confidence_token_ids must have dtype int64 or int32, got {confidence_token_ids.dtype}")
    if confidence_token_ids.ndim != 1 or len(confidence_token_ids) < 2:
        raise ValueError(
            f"confidence_token_ids must have shape (K,), K at least 2, got {tuple(confidence_token_ids.shape)}"
        )
    vocabulary = lm_head_weight.shape[0]
    if bool(((confidence_token_ids < 0) | (confidence_token_ids >= vocabulary)).any()):
        raise ValueError(
            f"confidence_token_ids must lie in [0, V) = [0, {vocabulary}), got {confidence_token_ids.tolist()[:16]}"
        )
    if len(confidence_token_ids.unique()) < len(confidence_token_ids):
        raise ValueError("confidence_token_ids must be distinct: does the tokenizer split some of the numbers?")
