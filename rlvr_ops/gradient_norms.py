"""squared_gradient_norms: how large a rollout's grad log pi is, as far as the head can tell without a backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from rlvr_ops import arguments


def squared_gradient_norms(
    per_token_logps: Tensor,
    sum_p_squared: Tensor,
    hidden_states: Tensor | None = None,
    completion_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """sum_t |e_y - p_t|^2 |h_t|^2 of every rollout, (B,): the weights of `group_advantages(..., estimator="oblr")`.

    The gradient of log p_t(y) with respect to the head is (e_y - p_t) h_t^T, and |e_y - p|^2 = 1 - 2 p_y + sum_j p_j^2.
    So this is exact for a rollout of one token and the head's weight alone; it leaves out the rest of the model and the
    products of different tokens' gradients. Without `hidden_states` (B, T, H) it is sum_t |e_y - p_t|^2, the squared
    gradient with respect to the logits, and verl's proxy in its optimal token baseline. Only ratios inside a group count.

    `per_token_logps` are (B, T) in nats, or packed (N,) with `cu_seqlens`; `sum_p_squared` has their shape and holds
    sum_j p_tj^2 = exp(logsumexp(2 z_t) - 2 logsumexp(z_t)) of the same logits, as
    `token_logps(with_sum_p_squared=True)` gives it.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> logits = torch.tensor([[[2.0, 2.0]]])  # p = 1/2, 1/2: |e_y - p|^2 = 1/2
    >>> p = logits.softmax(-1)
    >>> squared_gradient_norms(p[..., 0].log(), p.square().sum(-1), hidden_states=torch.tensor([[[3.0, 4.0]]]))
    tensor([12.5000])
    """
    arguments.check_tensor("per_token_logps", per_token_logps)
    layout = arguments.make_layout("per_token_logps", per_token_logps, completion_mask, cu_seqlens)
    device, dtype = per_token_logps.device, torch.promote_types(per_token_logps.dtype, torch.float32)
    logps = layout.zero_where_masked(per_token_logps.detach().reshape(-1).to(dtype))
    squares = arguments.per_token("sum_p_squared", sum_p_squared, layout, "per_token_logps", device, dtype)
    if squares is None:
        raise TypeError("sum_p_squared must be a torch.Tensor, got NoneType")
    norms = (1 - 2 * logps.reshape(-1).exp() + squares).clamp(min=0)  # a difference of numbers near 1 can round below 0
    if hidden_states is not None:
        arguments.check_tensor("hidden_states", hidden_states, device)
        if hidden_states.ndim != per_token_logps.ndim + 1 or tuple(hidden_states.shape[:-1]) != layout.shape:
            raise ValueError(
                f"hidden_states must have shape {layout.shape} like per_token_logps and H, got {tuple(hidden_states.shape)}"
            )
        norms = norms * hidden_states.detach().to(dtype).square().sum(-1).reshape(-1)
    return layout.per_rollout(layout.zero_where_masked(norms).reshape(-1))
