"""token_logps: log-probabilities of given tokens from hidden states, and other statistics of the same pass."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rlvr_kernels.checks import check_no_transform
from rlvr_kernels.pull_back import Needs
from rlvr_kernels.score import score
from rlvr_kernels.tile import default_workspace_bytes
from torch import Tensor

from rlvr_ops.head.compiled import decode, encode
from rlvr_ops.head.head import Head, check_ids, check_vocabulary
from rlvr_ops.head.plan import Call, Plan, Schedule, no_autocast, refuse_a_second_derivative, save
from rlvr_ops.head.pull_back import pull_back, pull_back_op, saved, wanted
from rlvr_ops.rollouts import chosen, count_rows, make_layout, rows_of, spread


class TokenScores(NamedTuple):
    """Per token, shaped like completion_ids and 0 where masked; None where not asked for.

    logps, entropy and self_certainty are in nats. top1 is bool: whether no token was likelier. sum_p_squared is the sum of
    squared probabilities over the vocabulary, which `squared_gradient_norms` reads.
    """

    logps: Tensor
    entropy: Tensor | None
    self_certainty: Tensor | None
    top1: Tensor | None
    sum_p_squared: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ScoreCall:
    """A pass through the head, and the statistics wanted besides log-probabilities."""

    call: Call
    entropy: bool
    mean: bool
    top1: bool
    squares: bool


def token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor | Head,
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

    Float64 inputs give float64. Differentiable in `logps` and `entropy`; the backward pass recomputes the logits and skips rows
    without a gradient. Self-certainty is the mean over the vocabulary of -log(V p_j) (arXiv 2502.18581).
    `ace_loss` explains the keywords. On an accelerator, scoring 16-bit operands takes no workspace: their logits never leave
    the registers.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
        NotImplementedError: a forward-mode tangent, or a transform of torch.func.

    >>> scores = token_logps(torch.zeros(1, 2, 4), torch.randn(8, 4), torch.tensor([[3, 1]]), with_entropy=True)
    >>> scores.logps.exp(), scores.entropy.exp()
    (tensor([[0.1250, 0.1250]]), tensor([[8., 8.]]))
    """
    head = Head(lm_head_weight, lm_head_bias, logit_scale, softcap, temperature)
    plan = Plan(workspace_bytes=workspace_bytes, backend=backend)
    check_no_transform(
        hidden_states=hidden_states, lm_head_weight=head.weight, lm_head_bias=head.bias, temperature=head.temperature
    )
    head.check(hidden_states)
    check_ids(completion_ids, hidden_states)
    one = None
    if completion_ids.ndim == 1:
        place = "cpu" if getattr(completion_mask, "is_cpu", False) else completion_ids.device
        one = torch.arange(2, device=place) * completion_ids.shape[0]
    layout = make_layout("completion_ids", completion_ids, completion_mask, one)
    if validate or (completion_ids.device.type == "cpu" and not torch.compiler.is_compiling()):
        check_vocabulary(completion_ids, layout, head.weight.shape[0])
    if validate:
        layout.check_finite("hidden_states", hidden_states)
        head.check_finite()
    dtype = head.compute_dtype(hidden_states)
    room = (
        default_workspace_bytes(hidden_states.device, whole_rows=False) if workspace_bytes is None else workspace_bytes
    )
    on = torch.is_grad_enabled()
    leaves = (hidden_states, head.weight, head.bias)
    needs = Needs(*[on and x is not None and x.requires_grad for x in leaves])
    schedule = Schedule(False, dtype, room, plan.backend, with_entropy)
    host = layout.host
    counts = None if host is None or torch.compiler.is_compiling() else count_rows(host.cu_seqlens, host.mask, None)
    call = Call(completion_ids.reshape(-1), layout.mask, head.logit_map(layout, dtype), schedule, needs, counts)
    job = ScoreCall(call, with_entropy, with_self_certainty, with_top1, with_sum_p_squared)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    logp, lse, entropy, mean, top1, squares = _run(hidden, head.weight, head.bias, job)
    certainty = lse - mean - math.log(head.weight.shape[0]) if with_self_certainty else None
    return TokenScores(
        layout.zero_where_masked(logp),
        layout.zero_where_masked(entropy) if with_entropy else None,
        None if certainty is None else layout.zero_where_masked(certainty),
        layout.zero_where_masked(top1) if with_top1 else None,
        layout.zero_where_masked(squares) if with_sum_p_squared else None,
    )


def _run(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: ScoreCall) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling():
        return tuple(scores_op(hidden, weight, bias, *encode(job)))
    return _Scores.apply(hidden, weight, bias, job)


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: ScoreCall) -> tuple[Tensor, ...]:
    """(logp, lse, entropy, mean logit, top1, sum p^2), each (R,), 0 where not scored and empty where not asked for."""
    call, schedule = job.call, job.call.schedule
    with no_autocast(hidden):
        index, dtype = rows_of(call.scored, None if call.counts is None else call.counts.scored), schedule.dtype
        states, ids, logit_map = call.inputs(hidden, bias, index)
        states, weight = chosen(states, index).to(dtype), weight.to(dtype)
        found = score(
            states, weight, ids, logit_map, entropy=job.entropy, mean=job.mean, top1=job.top1, squares=job.squares,
            workspace_bytes=schedule.workspace_bytes, shard=schedule.shard, backend=schedule.backend,
        )  # fmt: skip
        return tuple(spread(x, index, hidden) for x in found)


class _Scores(torch.autograd.Function):
    """(hidden, weight, bias, job) -> scores, differentiable in logp and entropy."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: ScoreCall) -> tuple[Tensor, ...]:
        output, ctx.job = _forward(hidden, weight, bias, job), job
        ctx.mark_non_differentiable(*_constants(output))
        save(
            ctx, hidden, weight, bias, output[1], output[2], job.call.ids
        )  # ids: autograd then refuses an edit in place
        return output

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor | None, _lse: Any, d_entropy: Tensor | None, *_others: Any) -> Any:
        refuse_a_second_derivative()
        hidden, weight, bias, lse, entropy, _ids = saved(ctx)
        job = ctx.job
        d_entropy = d_entropy if job.entropy else None
        if d_logp is None and d_entropy is None:
            return (None,) * 4
        coef = torch.zeros_like(lse) if d_logp is None else d_logp
        return *wanted(
            pull_back(hidden, weight, bias, job.call, lse, coef, entropy, d_entropy), ctx.needs_input_grad[:3]
        ), None


def _constants(output: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    """The outputs without a gradient: all but logp and entropy."""
    return (output[1], *output[3:])


@torch.library.custom_op("rlvr_ops::token_logps", mutates_args=())
def scores_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tensors: list[Tensor], numbers: Tensor, text: str
) -> list[Tensor]:
    """`_Scores` of an encoded `ScoreCall`, for torch.compile."""
    return list(_forward(hidden, weight, bias, decode(tensors, numbers, text)))


@scores_op.register_fake
def _(hidden, weight, bias, tensors, numbers, text):  # type: ignore[no-untyped-def]
    job = decode(tensors, None, text)
    row = job.call.logit_map.inv_temperature.new_empty(hidden.shape[0])

    def made(asked: bool, dtype: torch.dtype = row.dtype) -> Tensor:
        return torch.empty_like(row, dtype=dtype) if asked else hidden.new_empty(0)

    others = made(job.entropy), made(job.mean), made(job.top1, torch.bool), made(job.squares)
    return [row, torch.empty_like(row), *others]


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, bias, tensors, numbers, ctx.text = inputs
    ctx.tensors, ctx.entropy = len(tensors), decode(tensors, None, ctx.text).entropy
    ctx.mark_non_differentiable(*_constants(output))
    save(ctx, *tensors, numbers, hidden, weight, bias, output[1], output[2])


def _backward_op(ctx: Any, gradients: list[Tensor | None]) -> Any:
    d_logp, _lse, d_entropy, *_ = gradients
    refuse_a_second_derivative()
    values = saved(ctx)
    tensors, (numbers, hidden, weight, bias, lse, entropy) = values[: ctx.tensors], values[ctx.tensors :]
    d_entropy = d_entropy if ctx.entropy else None
    found: Any = [None] * 3
    if d_logp is not None or d_entropy is not None:
        coef = torch.zeros_like(lse) if d_logp is None else d_logp
        found = pull_back_op(hidden, weight, bias, tensors, numbers, ctx.text, lse, coef, entropy, d_entropy)
        found = wanted(found, ctx.needs_input_grad[:3])
    return *found, [None] * ctx.tensors, None, None


scores_op.register_autograd(_backward_op, setup_context=_save_op)
