"""otb_advantages: a baseline for every token, from what the group's rollouts have spent up to it. O(B T)."""

from __future__ import annotations

import math

import torch
from rlvr_kernels.checks import check_tensor
from rlvr_kernels.logits import sum_dtype
from torch import Tensor
from torch.nn.functional import pad

from rlvr_ops.advantages.gradient_norms import squared_logit_gradients
from rlvr_ops.advantages.groups import Groups, make_groups
from rlvr_ops.advantages.inputs import check_finite
from rlvr_ops.checks import check_all_tensors
from rlvr_ops.rollouts import Layout, make_layout, per_token


def otb_advantages(
    rewards: Tensor,
    per_token_logps: Tensor,
    sum_p_squared: Tensor,
    completion_mask: Tensor | None = None,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
) -> Tensor:
    """G_t - sum(W_t G_t) / sum(W_t) for every token, the optimal token baseline (OTB, arXiv 2602.07078, read in verl).

    G_t is the rollout's reward from its t-th token on, and W_t = sum_{j <= t} |e_y - p_j|^2 the squared gradient with
    respect to the logits up to it. Both sums run over the rollouts of the group that have a t-th token. Tokens are counted
    where `completion_mask` is nonzero, so what a tool wrote moves nothing (verl's tir_optimal_token_baseline). A token that no
    other rollout of the group reaches has no baseline: its advantage is G_t.

    `rewards` is (B,), one at the end of each rollout, or one per token, grouped as in `group_advantages`. If a packed batch has
    as many tokens as rollouts, they are read as one per rollout, like the advantages of a loss. `per_token_logps` (B, T), or
    packed (N,) with `cu_seqlens`, in nats, and `sum_p_squared` of the same shape come from the policy that sampled:
    `token_logps(with_sum_p_squared=True)`. `importance_sampling_ratio`, of that shape too, multiplies a token's squared
    gradient by its square.

    The result has the shape of `per_token_logps` and the dtype of floating `rewards`, else float32; masked tokens get 0, and
    so do tokens at which all that reach it have the same G. A constant to any gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted; the rollout of a NaN or inf reward.

    >>> half = torch.full((2, 2), 0.5)  # p = 1/2, 1/2: |e_y - p|^2 = 1/2
    >>> otb_advantages(torch.tensor([1.0, 0.0]), half.log(), half, torch.tensor([[1, 1], [1, 0]]), group_size=2)
    tensor([[ 0.5000,  1.0000],
            [-0.5000,  0.0000]])
    """
    check_tensor("per_token_logps", per_token_logps)
    check_tensor("rewards", rewards, per_token_logps.device, floating=False)
    check_all_tensors(completion_mask=completion_mask, cu_seqlens=cu_seqlens)
    layout = make_layout("per_token_logps", per_token_logps, completion_mask, cu_seqlens)
    groups = _groups(rewards, layout, group_size, group_ids)
    wide = sum_dtype(rewards.device)
    energies = squared_logit_gradients(per_token_logps, sum_p_squared, layout, wide)
    ratio = per_token(
        "importance_sampling_ratio", importance_sampling_ratio, layout, "per_token_logps", rewards.device, wide
    )
    per_rollout = rewards.shape == (layout.rollouts,)
    worth = rewards.detach().to(wide)
    totals = worth if per_rollout else layout.per_rollout(layout.zero_where_masked(worth.flatten()).flatten())
    check_finite("rewards", totals, group_size, group_ids)
    for name, values in (
        ("per_token_logps", per_token_logps),
        ("sum_p_squared", sum_p_squared),
        ("importance_sampling_ratio", importance_sampling_ratio),
    ):
        layout.check_finite(name, values)
    if ratio is not None:
        negative = layout.zero_where_masked(ratio < 0).flatten()
        if bool(negative.any()):
            raise ValueError(f"importance_sampling_ratio must not be negative, got {float(ratio[negative][0]):g}")
        energies = energies * ratio.square().view(layout.shape)
    tokens = _Tokens(layout)
    returns = worth[:, None] * tokens.reached if per_rollout else running_sum(tokens.gather(worth).flip(1)).flip(1)
    spent = running_sum(tokens.gather(energies)) * tokens.reached
    advantages = _less_baseline(returns, spent, tokens.reached, groups)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    return tokens.scatter(advantages).to(dtype) + 0.0  # -0.0 + 0.0 is 0.0


def running_sum(values: Tensor) -> Tensor:
    """The sum of each row (B, L) up to each column. torch.cumsum may give other bits each time on an accelerator."""
    step = 1
    while step < values.shape[1]:
        values = values + pad(values[:, :-step], (step, 0))
        step *= 2
    return values


def _less_baseline(returns: Tensor, spent: Tensor, reached: Tensor, groups: Groups) -> Tensor:
    """G less its group's mean weighted by W, over those that reach a token, all (B, L); G where no other does."""
    others = groups.sum(reached.long()) - 1
    weights = torch.where(groups.sum(spent) == 0, reached.to(spent.dtype), spent)
    highest = groups.max(returns.masked_fill(~reached, -math.inf))
    lowest = groups.min(returns.masked_fill(~reached, math.inf))
    centred = torch.where(highest != lowest, returns - groups.weighted_mean(returns, weights), 0.0)
    return torch.where(others > 0, centred, returns)


class _Tokens:
    """The tokens that count as a table (B, L): the t-th of each rollout in column t, wherever it lies in the batch."""

    def __init__(self, layout: Layout) -> None:
        lengths = layout.tokens()
        every = torch.arange(layout.rows, device=lengths.device)
        self.shape, self.rows = layout.shape, every if layout.mask is None else every[layout.mask]
        self.rollout = layout.rollout()[self.rows]
        first = lengths.cumsum(0) - lengths
        self.column = torch.arange(len(self.rows), device=lengths.device) - first[self.rollout]
        self.reached = torch.arange(max([1, *lengths.tolist()]), device=lengths.device) < lengths[:, None]

    def gather(self, values: Tensor) -> Tensor:
        """The table of values in the batch's shape, 0 behind a rollout's end."""
        table = values.new_zeros(self.reached.shape)
        return table.index_put((self.rollout, self.column), values.reshape(-1)[self.rows])

    def scatter(self, table: Tensor) -> Tensor:
        """The values of a table in the batch's shape, 0 where masked."""
        values = table.new_zeros(math.prod(self.shape))
        return values.index_put((self.rows,), table[self.rollout, self.column]).view(self.shape)


def _groups(rewards: Tensor, layout: Layout, group_size: int | None, group_ids: Tensor | None) -> Groups:
    if tuple(rewards.shape) not in ((layout.rollouts,), layout.shape):
        raise ValueError(
            f"rewards must have one value per rollout (B,) = ({layout.rollouts},) or one per token = {layout.shape}, "
            f"got {tuple(rewards.shape)}"
        )
    rollouts = torch.empty(layout.rollouts, device=rewards.device)
    return make_groups("rewards", rollouts, group_size, group_ids)
