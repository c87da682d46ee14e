"""policy_loss: the loss of a policy from hidden states and the lm_head, without its logits. Every named loss calls it.

One autograd function serves both schedules and every objective. A single pass computes the gradients in forward; backward
multiplies them by the upstream gradient. Two passes keep each token's coefficient in forward; backward pulls it back.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rlvr_kernels.backend import capturing
from rlvr_kernels.checks import check_no_transform, check_types
from rlvr_kernels.pull_back import Needs
from rlvr_kernels.scale import scale_
from rlvr_kernels.score import score
from rlvr_kernels.single_pass import single_pass
from rlvr_kernels.weigh import SUMS, Rows, weigh
from torch import Tensor

from rlvr_ops.head.compiled import decode, encode
from rlvr_ops.head.head import Head, check_ids, check_vocabulary
from rlvr_ops.head.plan import (
    Call,
    Plan,
    Planner,
    no_autocast,
    or_empty,
    refuse_a_second_derivative,
    rows_to_score,
    save,
)
from rlvr_ops.head.pull_back import is_batched, like_inputs, pull_back, pull_back_op, saved, wanted
from rlvr_ops.objectives.custom import ChunkedFunction, run_untraced, weigh_chosen
from rlvr_ops.objectives.entropy import top_tokens, weighted_sum
from rlvr_ops.objectives.objective import LossOutput, Objective
from rlvr_ops.rollouts import Layout, Rollouts, chosen, count_rows, make_layout, rows_of, spread


def policy_loss(
    hidden_states: Tensor, head: Head, rollouts: Rollouts, objective: Objective, plan: Plan | None = None
) -> LossOutput:
    """The loss of an objective on rollouts, from hidden states (B, T, H) or packed (N, H), after the final norm.

    Traps: `hidden_states[:, t]` must be the state that *predicts* `completion_ids[:, t]`. Reference and policy must be scored
    with the same dtype and temperature, or the confidence shift is not 0 where they agree. Under gradient accumulation or data
    parallelism give `Rollouts.num_items_in_batch`. A rollout whose advantages are all 0 is not scored, unless a KL term, an
    entropy term or `Plan.score_inactive` asks for it: metrics then cover the scored rows only (`head/rows_scored`).

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
        NotImplementedError: a forward-mode tangent, or a transform of torch.func.

    >>> from rlvr_ops import Ace, Clip
    >>> hidden, head = torch.randn(2, 3, 8, requires_grad=True), Head(torch.randn(16, 8))
    >>> rollouts = Rollouts(torch.tensor([[1, 5, 2], [7, 0, 3]]), torch.tensor([1.0, -1.0]), torch.full((2, 3), -3.0))
    >>> policy_loss(hidden, head, rollouts, Objective(Clip(0.2, 0.28), ace=Ace(alpha=1.0))).loss.backward()
    >>> hidden.grad.shape
    torch.Size([2, 3, 8])
    """
    plan = Plan() if plan is None else plan
    hint = ": policy_loss takes Head, Rollouts, Objective and Plan; flat keywords are those of ace_loss"
    given = {"head": (head, Head), "rollouts": (rollouts, Rollouts), "objective": (objective, Objective)}
    check_types(hint, **given, plan=(plan, Plan))
    check_no_transform(
        hidden_states=hidden_states, lm_head_weight=head.weight, lm_head_bias=head.bias, temperature=head.temperature,
        advantages=rollouts.advantages, old_per_token_logps=rollouts.old_per_token_logps,
        ref_per_token_logps=rollouts.ref_per_token_logps, sampling_per_token_logps=rollouts.sampling_per_token_logps,
    )  # fmt: skip
    head.check(hidden_states)
    check_ids(rollouts.completion_ids, hidden_states)  # type: ignore[arg-type]
    ids: Tensor = rollouts.completion_ids  # type: ignore[assignment]
    layout = make_layout("completion_ids", ids, rollouts.completion_mask, rollouts.cu_seqlens)
    dtype = head.compute_dtype(hidden_states)
    logit_map = head.logit_map(layout, dtype)
    rows, metrics = objective.rows(rollouts, layout, logit_map.inv_temperature.dtype, "completion_ids")
    _check_values(hidden_states, head, rollouts, layout, plan)

    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    on = torch.is_grad_enabled()
    needs = Needs(*[on and x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)])
    scored, alive = rows_to_score(rows, layout, objective, plan.score_inactive)
    planner = Planner(plan, hidden, head.weight, needs, dtype, objective, rows, layout, rollouts.advantages)
    schedule, counts = planner.schedule(scored, alive)
    call = Call(ids.reshape(-1), scored, logit_map, schedule, needs, counts)
    loss, logp, entropy, sums, pulled_back = _run(hidden, head.weight, head.bias, LossCall(call, rows, objective))

    metrics |= objective.metrics(sums, rows.ref is not None)
    if call.schedule.with_entropy:
        known = entropy if scored is None else entropy.masked_fill(~scored, 0)
        metrics["entropy"] = known.sum() / sums[:, SUMS.index("tokens")].sum().clamp(min=1)
    count = pulled_back.new_full((), float(layout.rows))  # new_tensor would sync with the device
    metrics |= {
        "head/rows": count,
        "head/rows_scored": count if scored is None else scored.sum().to(count.dtype),
        "head/rows_pulled_back": pulled_back,
        "head/single_pass": count.new_full((), float(call.schedule.single_pass)),
    }
    if scored is not None and scored is not layout.mask:
        logp = logp.masked_fill(~scored, float("nan"))
    return LossOutput(loss, metrics, layout.zero_where_masked(logp))


def _check_values(hidden_states: Tensor, head: Head, rollouts: Rollouts, layout: Layout, plan: Plan) -> None:
    """Checks that read values on the host: ids outside the vocabulary and, if asked for, NaN and inf."""
    ids = rollouts.completion_ids
    if ids is not None and (plan.validate or (ids.device.type == "cpu" and not torch.compiler.is_compiling())):
        check_vocabulary(ids, layout, head.weight.shape[0])
    if plan.validate:
        layout.check_finite("hidden_states", hidden_states)
        rollouts.check_values(layout)
        head.check_finite()


@dataclass(frozen=True, eq=False)
class LossCall:
    """A pass through the head, and the rows and objective that weigh its log-probabilities."""

    call: Call
    rows: Rows
    objective: Objective


Outputs = tuple[Tensor, ...]
"""(loss, logp (R,), entropy (R,), sums (B, 8), rows pulled back), then what backward needs: the gradients of a single pass, or
(lse, coef, entropy_coef) of two passes. Empty tensors where there is nothing."""


def _run(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: LossCall) -> Outputs:
    if job.objective.function is not None:
        return run_untraced(_Loss.apply, hidden, weight, bias, job)
    if torch.compiler.is_compiling():
        return tuple(loss_op(hidden, weight, bias, *encode(job))[:5])
    return _Loss.apply(hidden, weight, bias, job)


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: LossCall) -> Outputs:
    with no_autocast(hidden):
        return (_single_pass if job.call.schedule.single_pass else _two_pass)(hidden, weight, bias, job)


def _single_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: LossCall) -> Outputs:
    call, objective, schedule = job.call, job.objective, job.call.schedule
    counts, coef = call.counts, objective.entropy.coef
    index = rows_of(call.scored, None if counts is None else counts.scored)
    rows, (states, ids, logit_map) = _scored_rows(job, index), call.inputs(hidden, bias, index)
    weigher = partial(weigh, objective=objective, backend=schedule.backend)
    by_function = None if objective.function is None else ChunkedFunction(rows, objective, schedule.backend)
    done = single_pass(
        states, weight.to(schedule.dtype), ids, logit_map, rows, by_function or weigher, index=index,
        lengths=None if counts is None else counts.lengths, drops=schedule.drops, token_local=schedule.token_local,
        needs=Needs(*call.needs), weight_dtype=weight.dtype,
        with_entropy=schedule.with_entropy, entropy_coef=coef, chunk_rows=schedule.chunk_rows, shard=schedule.shard,
        backend=schedule.backend,
    )  # fmt: skip
    if by_function is not None:
        by_function.check_locality(done.logp)
    loss, active = done.sums[:, SUMS.index("loss")].sum(), done.active
    if coef and done.entropy is not None:
        loss = loss - coef * weighted_sum(done.entropy, rows.row_weights())
        active = active.new_full((), float(len(rows))) if rows.mask is None else rows.mask.sum().to(active.dtype)
    logp, entropy = spread(done.logp, index, hidden), spread(done.entropy, index, hidden)
    d_hidden, d_weight, d_bias = done.gradients
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    gradients = or_empty(d_hidden, hidden), or_empty(d_weight, hidden), or_empty(d_bias, hidden)
    return loss, logp, entropy, done.sums, active, *gradients


def _scored_rows(job: LossCall, index: Tensor | None) -> Rows:
    """The rows that a single pass scores: taken out of the batch or, in a capture, all rows with the others masked."""
    rows = job.rows
    if job.call.scored is not None and capturing():
        return replace(rows, mask=job.call.scored)
    return rows if index is None and rows.mask is None else replace(rows.take(index), mask=None)


def _two_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: LossCall) -> Outputs:
    call, objective, schedule = job.call, job.objective, job.call.schedule
    counts, dtype = call.counts, schedule.dtype
    index = rows_of(call.scored, None if counts is None else counts.scored)
    states, ids, logit_map = call.inputs(hidden, bias, index)
    states = chosen(states, index).to(dtype)
    scores = score(
        states, weight.to(dtype), ids, logit_map, entropy=schedule.with_entropy,
        workspace_bytes=schedule.workspace_bytes, shard=schedule.shard, backend=schedule.backend,
    )  # fmt: skip
    logp, lse, entropy = (spread(x, index, hidden) for x in scores[:3])
    rows = replace(job.rows, mask=call.scored)
    top = top_tokens(entropy, call.scored, objective.entropy.top_quantile)
    losses, coef, sums = weigh_chosen(logp, rows, top, objective, schedule.backend)
    loss, entropy_coef, has_gradient = losses.sum(), None, coef != 0
    if schedule.entropy_bonus:
        weights = rows.row_weights() if top is None else rows.row_weights().masked_fill(~top, 0)
        loss = loss - objective.entropy.coef * weighted_sum(entropy, weights)
        entropy_coef, has_gradient = -objective.entropy.coef * weights, has_gradient | (weights != 0)
    pulled_back = (has_gradient if any(call.needs) else torch.zeros_like(has_gradient)).sum().to(logp.dtype)
    return loss, logp, entropy, sums, pulled_back, lse, coef, or_empty(entropy_coef, hidden)


class _Loss(torch.autograd.Function):
    """(hidden, weight, bias, job) -> the first five of Outputs, differentiable once in the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: LossCall) -> Outputs:
        output = _forward(hidden, weight, bias, job)
        schedule = job.call.schedule
        ctx.call, ctx.backend = None if schedule.single_pass else job.call, schedule.backend
        ctx.mark_non_differentiable(*output[1:5])
        ids = () if schedule.single_pass else (job.call.ids,)  # saved, so that autograd refuses an edit in place
        save(ctx, *_for_backward((hidden, weight, bias), output, job.call), *ids)
        return output[:5]

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_others: Any) -> Any:
        refuse_a_second_derivative()
        call = ctx.call
        if d_loss is None:
            return (None,) * 4
        if call is None:
            gradients = tuple(_scaled(x, d_loss, ctx.backend) for x in saved(ctx))
        else:
            hidden, weight, bias, lse, coef, entropy, entropy_coef, _ids = saved(ctx)
            by_entropy = entropy_coef * d_loss if entropy_coef.numel() else None
            coef = coef.mul_(d_loss) if _may_overwrite(coef, d_loss) else coef * d_loss
            gradients = pull_back(hidden, weight, bias, call, lse, coef, entropy, by_entropy)
        return *wanted(gradients, ctx.needs_input_grad[:3]), None


def _for_backward(inputs: tuple[Any, ...], output: Outputs, call: Call) -> tuple[Tensor | None, ...]:
    """The gradients of a single pass, or what two passes pull back through."""
    _loss, _logp, entropy, _sums, _count, lse, coef, *others = output
    return output[5:] if call.schedule.single_pass else (*inputs[:3], lse, coef, entropy, *others)


def _scaled(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """gradient * upstream, in place if it may be, so that no second d_weight exists."""
    factor = upstream.reshape(1)  # a 0-d factor would be rounded to the gradient's dtype: 65536 is inf in float16
    if _may_overwrite(gradient, upstream):
        return scale_(gradient, factor, backend)
    return _multiplied(gradient, factor)


def _multiplied(gradient: Tensor, factor: Tensor) -> Tensor:
    return (gradient * factor).to(gradient.dtype)


def _may_overwrite(saved_tensor: Tensor, upstream: Tensor) -> bool:
    """Whether this backward may write over what forward saved: the graph is freed, and nothing is traced or batched."""
    tracing = torch.compiler.is_compiling() or type(saved_tensor) is not Tensor or is_batched(upstream)
    return not (tracing or torch._C._autograd._get_current_graph_task_keep_graph())


@torch.library.custom_op("rlvr_ops::policy_loss", mutates_args=())
def loss_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tensors: list[Tensor], numbers: Tensor, text: str
) -> list[Tensor]:
    """`_Loss` of an encoded `LossCall`, for torch.compile, which could not count rows."""
    job = decode(tensors, numbers, text)
    if job.call.scored is not None and not (hidden.is_cpu or capturing()):
        counts = count_rows(job.rows.cu_seqlens, job.call.scored, None)
        job = replace(job, call=replace(job.call, counts=counts))
    return list(_forward(hidden, weight, bias, job))


@loss_op.register_fake
def _(hidden, weight, bias, tensors, numbers, text):  # type: ignore[no-untyped-def]
    job = decode(tensors, None, text)
    row = job.call.logit_map.inv_temperature.new_empty(hidden.shape[0])
    number, none, schedule = row.new_empty(()), hidden.new_empty(0), job.call.schedule
    entropy = torch.empty_like(row) if schedule.with_entropy else none.clone()
    sums = row.new_empty(job.rows.weights.shape[0], len(SUMS))
    if schedule.single_pass:
        rest = like_inputs(hidden, weight, bias, job.call.needs)
    else:
        by_entropy = torch.empty_like(row) if schedule.entropy_bonus else none.clone()
        rest = (torch.empty_like(row), torch.empty_like(row), by_entropy)
    return [number, row, entropy, sums, row.new_empty(()), *rest]


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, bias, tensors, numbers, ctx.text = inputs
    ctx.tensors = len(tensors)
    ctx.mark_non_differentiable(*output[1:])
    call = decode(tensors, None, ctx.text).call
    ctx.single_pass = call.schedule.single_pass
    save(ctx, *tensors, numbers, *_for_backward((hidden, weight, bias), tuple(output), call))


def _backward_op(ctx: Any, gradients: list[Tensor | None]) -> Any:
    refuse_a_second_derivative()
    values, d_loss = saved(ctx), gradients[0]
    tensors, numbers, rest = values[: ctx.tensors], values[ctx.tensors], values[ctx.tensors + 1 :]
    found: Any = [None] * 3
    if d_loss is not None and ctx.single_pass:
        found = wanted(tuple(_multiplied(x, d_loss.reshape(1)) for x in rest), ctx.needs_input_grad[:3])
    elif d_loss is not None:
        hidden, weight, bias, lse, coef, entropy, entropy_coef = rest
        by_entropy = entropy_coef * d_loss if entropy_coef.numel() else None
        found = pull_back_op(hidden, weight, bias, tensors, numbers, ctx.text, lse, coef * d_loss, entropy, by_entropy)
        found = wanted(found, ctx.needs_input_grad[:3])
    return *found, [None] * ctx.tensors, None, None


loss_op.register_autograd(_backward_op, setup_context=_save_op)
