"""tokenised_brier_loss: trains the token that states a confidence, from hidden states and K rows of the lm_head. 2 n K H."""

from __future__ import annotations

import torch
from rlvr_kernels.checks import check_tensor
from rlvr_kernels.logits import accumulator_dtype
from torch import Tensor

from rlvr_ops.checks import check_all_tensors
from rlvr_ops.head.head import Head
from rlvr_ops.rewards.judged import check_correct


def tokenised_brier_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor | Head,
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

    `hidden_states` (.., H) are the states that predict the confidence token, and `correct` (..) holds the verdict y on each.
    `confidence_token_ids` (K,) are the tokens of 0 to K - 1 in order: "0" to "100" for percentages, "0" to "9" where the
    tokenizer splits larger numbers. If you have the states of all tokens (B, T, H), mark one row per rollout in
    `confidence_mask` (B, T). Only marked rows are read, the others may hold anything; finding them is a host sync.

    The loss is least with all mass on the token nearest to the true probability of being correct. It does not say how much
    mass the K tokens have among all V, so keep the format of answers by other means. If this is part of a larger batch,
    `num_items_in_batch` is the number of marked rows in all of it. With nothing marked the loss is 0, attached to the graph.

    Differentiable in the states, the head, `temperature` and `num_items_in_batch`, in reverse and forward mode; verdicts and
    mask are a constant to any gradient. Costs 2 n K H for n marked rows. Nothing of width V is made but the weight's
    gradient, which is 0 outside of its K rows. The head's keywords are as in `token_logps`; a `temperature` tensor is (..),
    one per row. The result is in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> hidden, weight = torch.zeros(1, 4), torch.randn(200, 4)
    >>> tokenised_brier_loss(hidden, weight, torch.arange(101), torch.tensor([1]))  # uniform: the mean of (1 - k/100)^2
    tensor(0.3350)
    """
    head = Head(lm_head_weight, lm_head_bias, logit_scale, softcap, temperature)
    head.check(hidden_states)
    dtype = head.compute_dtype(hidden_states)
    wide = accumulator_dtype(dtype)
    rows, y, warmth = _marked_rows(hidden_states, correct, confidence_mask, head.temperature, wide)
    ids = _check_tokens(confidence_token_ids, head.weight)
    z = (rows.to(dtype) @ head.weight.index_select(0, ids).to(dtype).T).to(wide)
    if head.bias is not None:
        z = z + head.bias.index_select(0, ids).to(wide)
    z = head.logit_scale * z
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    levels = torch.arange(z.shape[1], device=z.device, dtype=wide) / (z.shape[1] - 1)
    penalties = (y.to(wide)[:, None] - levels).square()
    total = ((z / warmth[:, None]).softmax(1) * penalties).sum()
    return total / _count(len(rows), num_items_in_batch)


def _marked_rows(
    hidden_states: Tensor,
    correct: Tensor,
    confidence_mask: Tensor | None,
    temperature: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (n, H), verdicts (n,) and temperatures (n,), the last in `dtype`, of the n rows that count."""
    shape = hidden_states.shape[:-1]
    check_all_tensors(temperature=temperature if isinstance(temperature, Tensor) else None)
    warmth = torch.as_tensor(temperature, device=hidden_states.device, dtype=dtype)
    if warmth.ndim and warmth.shape != shape:
        raise ValueError(
            f"temperature must be a number or have shape {tuple(shape)}, one per row, got {tuple(warmth.shape)}"
        )
    check_tensor("correct", correct, hidden_states.device, floating=False)
    if correct.shape != shape:
        raise ValueError(
            f"correct must have shape {tuple(shape)} like hidden_states without H, got {tuple(correct.shape)}: "
            "expand one verdict per rollout over its tokens, correct[:, None].expand(B, T)"
        )
    rows, verdicts, warmth = hidden_states.flatten(0, -2), correct.flatten(), warmth.expand(shape).flatten()
    if confidence_mask is not None:
        check_tensor("confidence_mask", confidence_mask, hidden_states.device, floating=False)
        if confidence_mask.shape != shape:
            raise ValueError(
                f"confidence_mask must have shape {tuple(shape)} like hidden_states without H, "
                f"got {tuple(confidence_mask.shape)}"
            )
        marked = (confidence_mask != 0).flatten().nonzero()[:, 0]
        rows, verdicts, warmth = rows[marked], verdicts[marked], warmth[marked]
    if not bool(((warmth > 0) & warmth.isfinite()).all()):
        raise ValueError("temperature must be > 0 and finite where confidence_mask is 1")
    return _saveable(rows), check_correct(verdicts, "the marked rows of hidden_states", verdicts), _saveable(warmth)


def _count(rows: int, num_items_in_batch: float | Tensor | None) -> float | Tensor:
    """What the sum is divided by."""
    if num_items_in_batch is None:
        return max(rows, 1)
    if isinstance(num_items_in_batch, Tensor):
        check_tensor("num_items_in_batch", num_items_in_batch, floating=False)
        return _saveable(num_items_in_batch)
    if not num_items_in_batch > 0:
        raise ValueError(
            f"num_items_in_batch must be > 0, the marked rows of the global batch, got {num_items_in_batch}"
        )
    return num_items_in_batch


def _saveable(values: Tensor) -> Tensor:
    """The values, copied if they come from inference mode, for autograd refuses to save such tensors."""
    return values.clone() if values.is_inference() else values


def _check_tokens(confidence_token_ids: Tensor, lm_head_weight: Tensor) -> Tensor:
    """The ids, checked."""
    check_tensor("confidence_token_ids", confidence_token_ids, lm_head_weight.device, floating=False)
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
    return _saveable(confidence_token_ids)
