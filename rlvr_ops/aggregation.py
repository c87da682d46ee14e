"""From per-token losses to one number: L = sum_i w_i sum_t loss_it, w_i the weight of rollout i's tokens.

    grpo     seq-mean-token-mean      mean over rollouts of the mean over tokens    w_i = 1 / (rollouts * T_i)
    dapo     token-mean               mean over the tokens of the global batch      w_i = 1 / tokens
    bnpo                              mean over the tokens of the batch at hand     w_i = 1 / tokens here
    dr_grpo  seq-mean-token-sum-norm  sum over tokens by a constant length          w_i = 1 / (rollouts * max_completion_length)
    luspo    seq-mean-token-sum       mean over rollouts of the sum over tokens     w_i = 1 / rollouts

The second column is what verl calls them; either name does.
Under gradient accumulation or data parallelism the count is the global one, passed in: never averaged per micro-batch.
"""

import torch
from torch import Tensor

from rlvr_ops.layout import Layout
from rlvr_ops.names import unknown_loss_type

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "luspo")
VERL_NAMES = {
    "seq-mean-token-mean": "grpo",
    "token-mean": "dapo",
    "seq-mean-token-sum-norm": "dr_grpo",
    "seq-mean-token-sum": "luspo",
}


def rollout_weights(
    loss_type: str,
    layout: Layout,
    num_items_in_batch: float | Tensor | None,
    max_completion_length: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """w (B,). Rollouts without a token that counts get 0 where the formula would divide by it."""
    loss_type = canonical(loss_type)
    tokens = layout.tokens().to(dtype)
    count = _check_count(num_items_in_batch, loss_type)
    if loss_type == "dr_grpo":
        longest = _constant_length(max_completion_length, layout)
        return torch.ones_like(tokens) / ((max(layout.rollouts, 1) if count is None else count) * longest)
    if loss_type in ("grpo", "luspo"):
        share = (tokens > 0) / tokens.clamp(min=1) if loss_type == "grpo" else torch.ones_like(tokens)
        return share / (max(layout.rollouts, 1) if count is None else count)
    return torch.ones_like(tokens) / (tokens.sum().clamp(min=1) if count is None else count)


def canonical(loss_type: str) -> str:
    """The name in LOSS_TYPES, from it or from verl's.

    Raises:
        ValueError: neither.
    """
    if loss_type not in (*LOSS_TYPES, *VERL_NAMES):
        raise ValueError(unknown_loss_type(loss_type, (*LOSS_TYPES, *VERL_NAMES)))
    return VERL_NAMES.get(loss_type, loss_type)


def _check_count(count: float | Tensor | None, loss_type: str) -> float | Tensor | None:
    if count is None:
        return None
    if loss_type == "bnpo":
        raise ValueError(
            "num_items_in_batch does not go with loss_type='bnpo', which divides by the tokens at hand: use loss_type='dapo'"
        )
    if not isinstance(count, Tensor | int | float):
        raise TypeError(f"num_items_in_batch must be a number or a tensor, got {count!r}")
    if not isinstance(count, Tensor) and not count > 0:
        unit = "active tokens" if loss_type == "dapo" else "rollouts"
        raise ValueError(f"num_items_in_batch must be > 0, the {unit} of the global batch, got {count}")
    if isinstance(count, Tensor) and count.numel() != 1:
        raise ValueError(f"num_items_in_batch must be one number, got a tensor of shape {tuple(count.shape)}")
    return count.reshape(()) if isinstance(count, Tensor) else count


def _constant_length(length: int | None, layout: Layout) -> int:
    if length is None:
        if layout.packed:
            raise ValueError(
                "max_completion_length is needed for loss_type='dr_grpo' on packed rows: the constant that it divides by"
            )
        return max(layout.shape[1], 1)
    if not length > 0:
        raise ValueError(f"max_completion_length must be > 0, got {length}")
    return length
