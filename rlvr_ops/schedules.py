"""How the head runs a loss: in a single pass over chunks of whole rows, or scored first and pulled back in backward."""

from dataclasses import replace
from typing import NamedTuple

import torch
from rlvr_kernels.capture import capturing
from rlvr_kernels.cost import Problem, Rates, best_two_pass, cheapest, rates_of, single_pass_workspace
from rlvr_kernels.tile import ALIGNED_COLUMNS, bytes_per_logit, default_workspace_bytes, row_pitch, whole_row_tile
from rlvr_kernels.weigh import STATISTICS
from torch import Tensor

from rlvr_ops import ops
from rlvr_ops.constants import Loss
from rlvr_ops.custom import GivenSlope, single_pass_of, weigher_of
from rlvr_ops.diagnostics import policy_metrics
from rlvr_ops.entropy import top_entropy, weighted_sum
from rlvr_ops.layout import Layout
from rlvr_ops.spec_text import encode

SCHEDULES = ("auto", "single_pass", "two_pass", "forward_only")


class LossOutput(NamedTuple):
    """What a loss returns.

    loss: 0-d, to call backward on.
    metrics: detached 0-d tensors on the device, explained in docs/metrics.md.
    per_token_logps: detached, shaped like completion_ids; 0 where masked, NaN where a row counts but was not scored
        because its rollout has no gradient (`score_inactive=False`).
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    per_token_logps: Tensor


class HeadCall(NamedTuple):
    """What both schedules hand to the head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    scored: Tensor | None
    inv_temperature: Tensor
    head: str
    dtype: torch.dtype
    workspace_bytes: int | None
    backend: str
    with_entropy: bool

    def needs(self) -> tuple[bool, bool, bool]:
        """Which of hidden, weight and bias want a gradient."""
        on = torch.is_grad_enabled()
        return (
            on and self.hidden.requires_grad,
            on and self.weight.requires_grad,
            on and self.bias is not None and self.bias.requires_grad,
        )

    def is_half(self) -> bool:
        """Whether a gradient may be float16, which has to meet the loss scale before it is rounded: in backward."""
        return torch.float16 in (self.dtype, self.hidden.dtype, self.weight.dtype)

    def workspace(self, *, whole_rows: bool) -> int:
        """The workspace's bytes: what the caller gave, else the default for tiles of whole rows, or of slices."""
        if self.workspace_bytes is not None:
            return self.workspace_bytes
        default = default_workspace_bytes(self.weight.device, whole_rows=whole_rows)
        rows = self.hidden.shape[0]
        return single_pass_workspace(self.problem(rows, rows), default) if whole_rows else default

    def whole_rows(self) -> int:
        """How many rows fit the workspace with all their logits."""
        logit = bytes_per_logit(self.weight.device, self.dtype)
        return whole_row_tile(self.weight.shape[0], logit, self.workspace(whole_rows=True))

    def rates(self) -> Rates:
        """What the cost model assumes of the device."""
        return rates_of(self.hidden.device, self.dtype)

    def problem(self, scored: int, active: int) -> Problem:
        """What the cost model is asked about."""
        hidden, weight, _ = self.needs()
        return Problem(
            rows=self.hidden.shape[0], hidden=self.hidden.shape[1], vocabulary=self.weight.shape[0], scored=scored, active=active,
            operand_bytes=self.dtype.itemsize, logit_bytes=bytes_per_logit(self.weight.device, self.dtype),
            weight_grad_bytes=self.weight.dtype.itemsize, needs_hidden=hidden, needs_weight=weight,
        )  # fmt: skip


def choose_schedule(schedule: str, call: HeadCall, loss: Loss, alive: Tensor | None) -> str:
    """`alive` is given if more rows are scored than can have a gradient.

    Raises:
        ValueError: single_pass was asked for and is not possible.
    """
    if schedule == "two_pass":
        return schedule
    if loss.hyper.top_entropy_quantile < 1:
        if schedule == "single_pass":
            raise ValueError(
                "schedule='single_pass' does not go with top_entropy_quantile < 1, which needs every token's entropy before "
                "any gradient: use schedule='two_pass'"
            )
        return "two_pass"
    fits = _single_pass_fits(call, loss)
    if schedule == "single_pass" and not fits:
        raise ValueError(_too_long(call, loss))
    if schedule == "single_pass":
        return schedule
    if not any(call.needs()) or not fits or call.is_half():
        return "two_pass"
    if torch.compiler.is_compiling() or capturing():
        return "single_pass"
    scored = loss.layout.rows if call.scored is None or alive is None else int(call.scored.sum())
    active = scored if alive is None else int(alive.sum())
    problem, slices = call.problem(scored, active), call.workspace(whole_rows=False)
    return cheapest(problem, call.workspace(whole_rows=True), call.rates(), slice_bytes=slices).schedule


def _single_pass_fits(call: HeadCall, loss: Loss) -> bool:
    """Whether whole rows, and whole rollouts if the loss needs them, fit the workspace."""
    limit, layout = call.whole_rows(), loss.layout
    if loss.hyper.is_token_local(loss.given.old is not None):
        return limit >= 1
    if capturing():
        return layout.rows <= limit
    at_most = layout.rows if layout.packed else layout.shape[1]
    if at_most <= limit or torch.compiler.is_compiling():
        return at_most <= limit
    return layout.longest() <= limit


def _too_long(call: HeadCall, loss: Loss) -> str:
    row = call.weight.shape[0] * bytes_per_logit(call.weight.device, call.dtype)
    limit, workspace = call.whole_rows(), call.workspace(whole_rows=True)
    if limit == 0:
        return f"workspace_bytes must hold one row of logits for schedule='single_pass', {row} bytes, got {workspace}"
    if capturing():  # nobody may ask where rollouts end
        needs, which, longest = "all rows in one chunk in a CUDA graph", "the batch has", loss.layout.rows
    else:
        needs, which, longest = "each rollout in one chunk", "the longest rollout has", loss.layout.longest()
    would_be_local = replace(loss.hyper.spec, confidence="old").is_token_local(has_old=True)
    local = "confidence='old', " if would_be_local and loss.hyper.function is None else ""
    return (
        f"schedule='single_pass' needs {needs}, and workspace_bytes={workspace} holds {limit} rows "
        f"but {which} {longest}: give workspace_bytes >= {longest * row}, {local}or schedule='two_pass'"
    )


def single_pass(call: HeadCall, loss: Loss) -> LossOutput:
    """The loss, its gradients made along with it."""
    layout, given, weights, hyper = loss
    arguments = (
        call.hidden, call.weight, call.bias, call.ids, call.scored, call.inv_temperature, given.old, given.ref,
        given.behaviour(hyper), given.advantages, layout.cu_seqlens, weights, encode(hyper.spec), call.head, call.dtype,
        *call.needs(), call.with_entropy, hyper.entropy_coef, call.workspace(whole_rows=True), call.backend,
    )  # fmt: skip
    function = hyper.function
    out = ops.single_pass(*arguments) if function is None else single_pass_of(function, *arguments)
    value, logp, entropy, statistics, pulled_back, *_ = out
    metrics = policy_metrics(statistics, loss, entropy if call.with_entropy else None, call.scored)
    metrics |= _head_metrics(call, layout, pulled_back, single=True)
    return LossOutput(value, metrics, _present(logp, call.scored, layout))


def two_pass(call: HeadCall, loss: Loss) -> LossOutput:
    """The loss from scores, whose backward recomputes the logits of the rows that have a gradient, if they are not kept."""
    hyper = loss.hyper
    workspace = call.workspace(whole_rows=False)
    keep = _bytes_to_keep(call, workspace)
    logp, _lse, entropy, *_ = ops.score(
        call.hidden, call.weight, call.bias, call.ids, call.scored, call.inv_temperature, call.head, call.dtype,
        call.with_entropy, False, False, False, workspace - keep, keep, call.backend,
    )  # fmt: skip
    kept = None
    if hyper.top_entropy_quantile < 1:
        kept = top_entropy(entropy.detach(), call.scored, hyper.top_entropy_quantile)
    value, coef, statistics = weigh(logp, call.scored, loss, kept, call.backend)
    pulled_back = coef != 0
    if hyper.entropy_coef > 0:
        row_weights = loss.row_weights(call.scored, kept)
        value = value - hyper.entropy_coef * weighted_sum(entropy, row_weights)
        pulled_back = pulled_back | (row_weights != 0)
    metrics = policy_metrics(statistics, loss, entropy.detach() if call.with_entropy else None, call.scored)
    count = pulled_back.sum().to(coef.dtype) if any(call.needs()) else coef.new_zeros(())
    metrics |= _head_metrics(call, loss.layout, count, single=False)
    return LossOutput(value, metrics, _present(logp.detach(), call.scored, loss.layout))


def _bytes_to_keep(call: HeadCall, workspace: int) -> int:
    """How much of the workspace holds logits from scoring until backward, which need not be recomputed there."""
    if not any(call.needs()) or torch.compiler.is_compiling():
        return 0
    rows = call.hidden.shape[0]
    problem = call.problem(rows, rows)
    pitch = row_pitch(problem.vocabulary, call.hidden.device)
    best = best_two_pass(replace(problem, vocabulary=pitch), workspace, call.rates())
    columns = best.cached_rows * pitch // max(rows, 1)
    return best.cached_rows * pitch * problem.logit_bytes if columns >= min(ALIGNED_COLUMNS, pitch) else 0


def weigh(
    logp: Tensor, mask: Tensor | None, loss: Loss, kept: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, coef (R,), statistics) of log-probabilities (R,); `kept` (R,) says which tokens have a surrogate at all."""
    layout, given, weights, hyper = loss
    advantages = given.advantages if kept is None else given.advantages.masked_fill(~kept, 0)
    if hyper.function is None:
        losses, coef, statistics = ops.weigh(
            logp, given.old, given.ref, advantages, mask, layout.cu_seqlens, weights, given.behaviour(hyper),
            encode(hyper.spec), backend,
        )  # fmt: skip
        return losses.sum(), coef, _counting_all_wrong(statistics, mask, loss, kept)
    found = weigher_of(hyper.function)(
        logp.detach(), given.old, given.ref, advantages, mask, layout.cu_seqlens, weights, hyper.spec, backend,
        behaviour=given.behaviour(hyper),
    )  # fmt: skip
    statistics = _counting_all_wrong(found.statistics, mask, loss, kept)
    return GivenSlope.apply(logp, found.losses, found.coef).sum(), found.coef, statistics


def _counting_all_wrong(statistics: Tensor, mask: Tensor | None, loss: Loss, kept: Tensor | None) -> Tensor:
    """The statistics, with rollouts counted as wrong by the advantages that they had before some tokens lost theirs."""
    if kept is None:
        return statistics
    negative = loss.given.advantages < 0 if mask is None else (loss.given.advantages < 0) & mask
    columns = list(statistics.unbind(1))
    columns[STATISTICS.index("wrong")] = (loss.layout.per_rollout(negative.long()) > 0).to(statistics.dtype)
    return torch.stack(columns, 1)


def _head_metrics(call: HeadCall, layout: Layout, pulled_back: Tensor, *, single: bool) -> dict[str, Tensor]:
    rows = pulled_back.new_full((), float(layout.rows))  # new_tensor would wait for the device
    scored = rows if call.scored is None else call.scored.sum().to(rows.dtype)
    return {
        "head/rows": rows,
        "head/rows_scored": scored,
        "head/rows_pulled_back": pulled_back,
        "head/single_pass": rows.new_full((), float(single)),
    }


def _present(logp: Tensor, scored: Tensor | None, layout: Layout) -> Tensor:
    """Log-probabilities in the batch's shape: 0 where masked, NaN where a row counts and was not scored."""
    if scored is not None and scored is not layout.mask:
        logp = logp.masked_fill(~scored, float("nan"))
    return layout.zero_where_masked(logp)
