"""token_logps: log-probabilities of given tokens from hidden states, and what else the same pass over the logits knows."""

import math
from typing import NamedTuple

import torch
from rlvr_kernels.logits import Head, accumulator_dtype
from rlvr_kernels.tile import default_workspace_bytes
from torch import Tensor

from rlvr_ops import arguments, ops
from rlvr_ops.spec_text import encode


class TokenScores(NamedTuple):
    """Per token, shaped like completion_ids and 0 where masked; None where not asked for.

    logps, entropy and self_certainty are in nats; top1 is bool, whether no token was likelier; sum_p_squared is the sum
    over the vocabulary of squared probabilities, which `squared_gradient_norms` reads.
    """

    logps: Tensor
    entropy: Tensor | None
    self_certainty: Tensor | None
    top1: Tensor | None
    sum_p_squared: Tensor | None = None


def token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    with_self_certainty: bool = False,
    with_top1: bool = False,
    with_sum_p_squared: bool = False,
    workspace_bytes: int | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> TokenScores:
    """Log-probabilities of `completion_ids` (B, T) or (N,) under hidden states (B, T, H) or (N, H), in float32.

    Float64 inputs give float64.
    Differentiable in `logps` and `entropy`; the backward pass recomputes the logits and skips rows without a gradient.
    Self-certainty is log V-normalised: mean over the vocabulary of -log(V p_j) (arXiv 2502.18581).
    The keywords are those of `policy_loss`. Without gradients, `workspace_bytes=0` takes the kernel whose logits never
    leave the registers; it gives the log-probabilities alone.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> scores = token_logps(torch.zeros(1, 2, 4), torch.randn(8, 4), torch.tensor([[3, 1]]), with_entropy=True)
    >>> scores.logps.exp(), scores.entropy.exp()
    (tensor([[0.1250, 0.1250]]), tensor([[8., 8.]]))
    """
    head = Head(logit_scale, softcap)
    arguments.check_head(hidden_states, lm_head_weight, lm_head_bias)
    arguments.check_ids(completion_ids, hidden_states)
    rows = completion_ids.reshape(-1) if completion_ids.ndim == 1 else completion_ids
    bounds = torch.arange(2, device=rows.device) * rows.shape[0] if rows.ndim == 1 else None
    layout = arguments.make_layout("completion_ids", rows, completion_mask, bounds)
    if validate or (completion_ids.device.type == "cpu" and not torch.compiler.is_compiling()):
        arguments.check_vocabulary(completion_ids, layout, lm_head_weight.shape[0])
    if validate:
        arguments.check_finite("hidden_states", hidden_states, layout)
        arguments.check_finite("lm_head_weight", lm_head_weight)
    dtype = ops.compute_dtype(hidden_states, lm_head_weight)
    statistics = with_entropy or with_self_certainty or with_top1 or with_sum_p_squared
    _check_zero_workspace(workspace_bytes, statistics, hidden_states, lm_head_weight, lm_head_bias)
    device = hidden_states.device
    logp, lse, entropy, mean, top1, squares, _kept = ops.score(
        hidden_states.reshape(-1, hidden_states.shape[-1]), lm_head_weight, lm_head_bias, completion_ids.reshape(-1), layout.mask,
        arguments.inverse_temperature(temperature, layout, device, accumulator_dtype(dtype)), encode(head), dtype,
        with_entropy, with_self_certainty, with_top1, with_sum_p_squared,
        default_workspace_bytes(device, whole_rows=False) if workspace_bytes is None else workspace_bytes, 0, backend,
    )  # fmt: skip
    certainty = lse - mean - math.log(lm_head_weight.shape[0]) if with_self_certainty else None
    return TokenScores(
        layout.zero_where_masked(logp),
        layout.zero_where_masked(entropy) if with_entropy else None,
        None if certainty is None else layout.zero_where_masked(certainty),
        layout.zero_where_masked(top1) if with_top1 else None,
        layout.zero_where_masked(squares) if with_sum_p_squared else None,
    )


def _check_zero_workspace(workspace_bytes: int | None, statistics: bool, *head: Tensor | None) -> None:
    if workspace_bytes != 0:
        return
    if statistics:
        raise ValueError(
            "workspace_bytes=0 gives log-probabilities alone: "
            "drop with_entropy, with_self_certainty, with_top1 and with_sum_p_squared, or give a workspace"
        )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head):
        raise ValueError(
            "workspace_bytes=0 is forward only: call under torch.no_grad(), or give a workspace for the gradient"
        )
