"""policy_loss_from_logps: the losses for a trainer that already has log-probabilities. The same numbers as `policy_loss`."""

from dataclasses import dataclass
from typing import Any

import torch
from rlvr_kernels.checks import check_logps, check_no_transform, check_tensor, check_types
from rlvr_kernels.logits import accumulator_dtype
from rlvr_kernels.weigh import SUMS, Rows
from torch import Tensor

from rlvr_ops.head.compiled import decode, encode
from rlvr_ops.head.plan import refuse_a_second_derivative
from rlvr_ops.objectives.custom import run_untraced, weigh_chosen
from rlvr_ops.objectives.entropy import top_tokens, weighted_sum
from rlvr_ops.objectives.objective import LossOutput, Objective
from rlvr_ops.rollouts import Layout, Rollouts, make_layout, per_token


def policy_loss_from_logps(
    per_token_logps: Tensor,
    rollouts: Rollouts,
    objective: Objective,
    *,
    per_token_entropies: Tensor | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> LossOutput:
    """`policy_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; `rollouts.completion_ids` is not read.

    Differentiable in `per_token_logps` and in `per_token_entropies` (nats, of the same shape), which an entropy term needs.
    Masked values, NaN included, never reach the loss or a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
        NotImplementedError: a forward-mode tangent, or a transform of torch.func.

    >>> from rlvr_ops import Clip
    >>> rollouts = Rollouts(None, torch.tensor([1.0, -1.0]))
    >>> policy_loss_from_logps(torch.zeros(2, 3), rollouts, Objective(Clip(), aggregation="dapo")).loss
    tensor(0.)
    """
    check_tensor("per_token_logps", per_token_logps)
    hint = ": policy_loss_from_logps takes Rollouts and Objective; flat keywords are those of ace_loss_from_logps"
    check_types(hint, rollouts=(rollouts, Rollouts), objective=(objective, Objective))
    check_no_transform(
        per_token_logps=per_token_logps, per_token_entropies=per_token_entropies, advantages=rollouts.advantages,
        old_per_token_logps=rollouts.old_per_token_logps, ref_per_token_logps=rollouts.ref_per_token_logps,
        sampling_per_token_logps=rollouts.sampling_per_token_logps,
    )  # fmt: skip
    layout = make_layout("per_token_logps", per_token_logps, rollouts.completion_mask, rollouts.cu_seqlens)
    dtype = accumulator_dtype(per_token_logps.dtype)
    rows, metrics = objective.rows(rollouts, layout, dtype, "per_token_logps")
    entropy = _entropies(per_token_entropies, layout, objective, dtype)
    if validate:
        layout.check_finite("per_token_logps", per_token_logps)
        check_logps("per_token_logps", layout.zero_where_masked(per_token_logps.reshape(-1)))
        rollouts.check_values(layout)
        layout.check_finite("per_token_entropies", per_token_entropies)
    logp = per_token_logps.reshape(-1).to(dtype)
    top = None if entropy is None else top_tokens(entropy.detach(), layout.mask, objective.entropy.top_quantile)
    losses, sums = _weigh(logp, rows, top, objective, backend)
    loss = losses.sum()
    metrics |= objective.metrics(sums, rows.ref is not None)
    if entropy is not None:
        heard = entropy.detach() if layout.mask is None else entropy.detach().masked_fill(~layout.mask, 0)
        metrics["entropy"] = heard.sum() / sums[:, SUMS.index("tokens")].sum().clamp(min=1)
        if objective.entropy.coef > 0:
            weights = rows.row_weights() if top is None else rows.row_weights().masked_fill(~top, 0)
            loss = loss - objective.entropy.coef * weighted_sum(entropy, weights)
    return LossOutput(loss, metrics, layout.zero_where_masked(per_token_logps.detach().reshape(-1)))


def _entropies(values: Tensor | None, layout: Layout, objective: Objective, dtype: torch.dtype) -> Tensor | None:
    """Check the entropies; return them as (R,), still attached to their graph."""
    if values is None:
        if objective.entropy.wanted:
            name = "entropy_coef" if objective.entropy.coef > 0 else "top_entropy_quantile"
            raise ValueError(
                f"per_token_entropies is missing, and {name} needs it: token_logps(with_entropy=True) gives it"
            )
        return None
    per_token("per_token_entropies", values, layout, "per_token_logps", layout.cu_seqlens.device, dtype)
    return values.reshape(-1).to(dtype)


@dataclass(frozen=True, eq=False)
class WeighCall:
    """What weighs log-probabilities. top (R,): which tokens have a surrogate; None means all."""

    rows: Rows
    top: Tensor | None
    objective: Objective
    backend: str


def _weigh(logp: Tensor, rows: Rows, top: Tensor | None, objective: Objective, backend: str) -> tuple[Tensor, Tensor]:
    """(losses (R,), differentiable in logp (R,); sums (B, 8))."""
    job = WeighCall(rows, top, objective, backend)
    if objective.function is not None:
        losses, _coef, sums = run_untraced(_Weigh.apply, logp, job)
    elif torch.compiler.is_compiling():
        losses, _coef, sums = weigh_op(logp, *encode(job))
    else:
        losses, _coef, sums = _Weigh.apply(logp, job)
    return losses, sums


def _forward(logp: Tensor, job: WeighCall) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(weigh_chosen(logp.contiguous(), job.rows, job.top, job.objective, job.backend))  # type: ignore[return-value]


class _Weigh(torch.autograd.Function):
    """(logp, job) -> (losses, coef, sums), differentiable once in the losses."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, job: WeighCall) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(logp, job)
        _save(ctx, (logp, job), output)
        return output

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor | None, *_others: Any) -> Any:
        refuse_a_second_derivative()
        (coef,) = ctx.saved_tensors
        return None if d_losses is None else d_losses * coef, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[1])


@torch.library.custom_op("rlvr_ops::weigh", mutates_args=())
def weigh_op(logp: Tensor, tensors: list[Tensor], numbers: Tensor, text: str) -> tuple[Tensor, Tensor, Tensor]:
    """`_Weigh` of an encoded `WeighCall`, for torch.compile."""
    return _forward(logp, decode(tensors, numbers, text))


@weigh_op.register_fake
def _(logp, tensors, numbers, text):  # type: ignore[no-untyped-def]
    rollouts = decode(tensors, None, text).rows.weights.shape[0]
    return torch.empty_like(logp), torch.empty_like(logp), logp.new_empty(rollouts, len(SUMS))


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.tensors = len(inputs[1])
    _save(ctx, inputs, output)


def _backward_op(ctx: Any, d_losses: Tensor | None, *_others: Any) -> Any:
    refuse_a_second_derivative()
    (coef,) = ctx.saved_tensors
    return None if d_losses is None else d_losses * coef, [None] * ctx.tensors, None, None


weigh_op.register_autograd(_backward_op, setup_context=_save_op)
