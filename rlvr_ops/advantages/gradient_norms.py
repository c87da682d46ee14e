"""squared_gradient_norms: the size of a rollout's grad log pi, as far as the head shows it without a backward pass. O(N H)."""

from __future__ import annotations

import torch
from rlvr_kernels.checks import check_logps, check_tensor
from torch import Tensor

from rlvr_ops.checks import check_all_tensors
from rlvr_ops.rollouts import Layout, make_layout


def squared_gradient_norms(
    per_token_logps: Tensor,
    sum_p_squared: Tensor,
    hidden_states: Tensor | None = None,
    completion_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """sum_t |e_y - p_t|^2 |h_t|^2 of every rollout, (B,): the weights of `group_advantages(..., estimator="oblr")`.

    The gradient of log p_t(y) with respect to the head is (e_y - p_t) h_t^T, and |e_y - p|^2 = 1 - 2 p_y + sum_j p_j^2. The
    sum leaves out the rest of the model and the products between tokens: it is exact for a rollout of one token and the
    head's weight alone. Without `hidden_states` it is sum_t |e_y - p_t|^2, the squared gradient with respect to the logits,
    as in verl's optimal token baseline. Only ratios within a group matter. A constant to any gradient. One host sync.

    `per_token_logps` is (B, T), or packed (N,) with `cu_seqlens`, in nats; `hidden_states` has one more dimension, H.
    `sum_p_squared`, of the same shape, holds sum_j p_tj^2 = exp(logsumexp(2 z_t) - 2 logsumexp(z_t)) of the same logits, as
    `token_logps(with_sum_p_squared=True)` returns it. The result is in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> logits = torch.tensor([[[2.0, 2.0]]])  # p = 1/2, 1/2: |e_y - p|^2 = 1/2
    >>> p = logits.softmax(-1)
    >>> squared_gradient_norms(p[..., 0].log(), p.square().sum(-1), hidden_states=torch.tensor([[[3.0, 4.0]]]))
    tensor([12.5000])
    """
    check_tensor("per_token_logps", per_token_logps)
    check_all_tensors(completion_mask=completion_mask, cu_seqlens=cu_seqlens)
    layout = make_layout("per_token_logps", per_token_logps, completion_mask, cu_seqlens)
    norms = squared_logit_gradients(
        per_token_logps, sum_p_squared, layout, torch.promote_types(per_token_logps.dtype, torch.float32)
    )
    if hidden_states is not None:
        check_tensor("hidden_states", hidden_states, per_token_logps.device)
        if hidden_states.ndim != per_token_logps.ndim + 1 or tuple(hidden_states.shape[:-1]) != layout.shape:
            raise ValueError(
                f"hidden_states must have shape {layout.shape} like per_token_logps and H, got {tuple(hidden_states.shape)}"
            )
        norms = norms * hidden_states.detach().to(norms.dtype).square().sum(-1)
    return layout.per_rollout(layout.zero_where_masked(norms.flatten()).flatten())


def squared_logit_gradients(logps: Tensor, sum_p_squared: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """|e_y - p_t|^2 of every token, in the batch's shape; anything where masked. Raises if shapes differ or logps exceed 0."""
    check_tensor("sum_p_squared", sum_p_squared, logps.device)
    if tuple(sum_p_squared.shape) != layout.shape:
        raise ValueError(
            f"sum_p_squared must have shape {layout.shape} like per_token_logps, got {tuple(sum_p_squared.shape)}"
        )
    check_logps("per_token_logps", logps, None if layout.mask is None else layout.mask.view(layout.shape))
    p = layout.zero_where_masked(logps.detach().flatten().to(dtype)).exp()
    return (1 - 2 * p + sum_p_squared.detach().to(dtype)).clamp(min=0)  # numbers near 1 can round below 0
