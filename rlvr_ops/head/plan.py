"""How the head runs a loss: in a single pass over chunks of whole rows, or in two, scored first and pulled back in backward."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rlvr_kernels.backend import BACKENDS, capturing
from rlvr_kernels.checks import check_types, choose
from rlvr_kernels.cost import Problem, cheapest, rates_of, single_pass_workspace
from rlvr_kernels.logits import LogitMap, accumulator_dtype
from rlvr_kernels.objective import KL, Ace, Entropy
from rlvr_kernels.pull_back import Needs
from rlvr_kernels.shard import Shard
from rlvr_kernels.tile import bytes_per_logit, default_workspace_bytes, leaves_exponentials, whole_row_tile
from rlvr_kernels.weigh import Rows
from torch import Tensor

from rlvr_ops.rollouts import Counts, Layout, chosen, count_rows

SCHEDULES = ("auto", "single_pass", "two_pass")


class _Demands(Protocol):
    """What the head reads of an `Objective`."""

    @property
    def ace(self) -> Ace: ...
    @property
    def kl(self) -> KL: ...
    @property
    def entropy(self) -> Entropy: ...
    @property
    def function(self) -> Any: ...
    @property
    def surrogate(self) -> Any: ...
    @property
    def level(self) -> str: ...
    @property
    def sampling(self) -> Any: ...
    @property
    def off_policy_mask_threshold(self) -> float | None: ...
    def is_token_local(self, has_old: bool) -> bool: ...


@dataclass(frozen=True)
class Plan:
    """How a loss is computed. Nothing here changes the result beyond rounding.

    schedule: "single_pass" computes gradients while each chunk's tile exists, 6NVH FLOPs. "two_pass" computes the tile again in
        backward for rows with a gradient, up to 8NVH. "auto" takes the one that a model of FLOPs and bytes expects to be faster
        (`rlvr_kernels.cost`). It takes two passes if the longest rollout does not fit the workspace, and for float16, whose
        gradients would underflow before a loss scale reaches them. The metric `head/single_pass` reports the choice.
    workspace_bytes: the most that the tile of logits, or of exponentials in their place, may occupy. None: 300 MiB on a CPU;
        on an accelerator 2.5 GiB for a single pass (or one chunk, if that takes no more memory) and 256 MiB for two.
    backend: "auto", "triton" or "torch"; see `rlvr_ops.explain_backend`.
    score_inactive: also score rollouts without a gradient, for their log-probabilities and metrics.
    with_entropy: report the scored rows' mean entropy in the metrics; no extra product.
    validate: also check the inputs for NaN and inf, log-probabilities for values above 0, the mask for NaN, and ids on an
        accelerator; costs host syncs.
    """

    schedule: str = "auto"
    workspace_bytes: int | None = None
    backend: str = "auto"
    score_inactive: bool = False
    with_entropy: bool = False
    validate: bool = False

    def __post_init__(self) -> None:
        choose("schedule", self.schedule, SCHEDULES)
        choose("backend", self.backend, BACKENDS)
        check_types(
            workspace_bytes=(0 if self.workspace_bytes is None else self.workspace_bytes, int),
            score_inactive=(self.score_inactive, bool),
            with_entropy=(self.with_entropy, bool),
            validate=(self.validate, bool),
        )


@dataclass(frozen=True)
class Schedule:
    """A plan made up for one call: what runs, in which dtype, with how many bytes.

    A single pass takes chunk_rows rows at a time, of whole rollouts unless the loss is token_local. If it `drops` rows, it asks
    which coefficients are 0.

    shard is the place of a vocabulary that several ranks hold: `Shard` says where they talk, after scoring and after pulling
    back. No head has one yet; None means that the weight is whole.
    """

    single_pass: bool
    dtype: torch.dtype
    workspace_bytes: int
    backend: str
    with_entropy: bool
    entropy_bonus: bool = False
    token_local: bool = True
    chunk_rows: int = 0
    drops: bool = True
    shard: Shard | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the head: ids (R,), rows to score (R,) (None: all), the logit map without bias, and the gradients wanted."""

    ids: Tensor
    scored: Tensor | None
    logit_map: LogitMap
    schedule: Schedule
    needs: Needs
    counts: Counts | None = None

    def inputs(self, hidden: Tensor, bias: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor, LogitMap]:
        """(hidden (R, H), ids (n,), logit map (n,)) of the rows `index` (n,); None means all.

        A capture keeps rows that are not scored, as zeros with id 0 and temperature 1.
        """
        numbers, ids, scored = self.logit_map, self.ids, self.scored
        inv_temperature = numbers.inv_temperature
        if scored is not None and capturing():
            hidden, ids = hidden.masked_fill(~scored[:, None], 0), ids.masked_fill(~scored, 0)
            inv_temperature = inv_temperature.masked_fill(~scored, 1)
        logit_map = LogitMap(chosen(inv_temperature, index), bias, numbers.logit_scale, numbers.softcap)
        return hidden, chosen(ids, index).long(), logit_map


def rows_to_score(
    rows: Rows, layout: Layout, objective: _Demands, score_inactive: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(rows to score (R,), those of them that can have a gradient (R,)); None means all.

    A rollout without such a row is not scored. Any other is scored whole, because its confidence shift needs all of it.
    """
    mask = rows.mask
    if objective.kl.beta > 0 or objective.entropy.coef > 0 or objective.function is not None:
        return mask, mask
    alive = rows.advantages != 0
    alive = alive if mask is None else alive & mask
    if score_inactive or objective.entropy.top_quantile < 1:
        return mask, alive
    worth = layout.where_any(alive)
    return worth if mask is None else worth & mask, None


class Planner:
    """Chooses the schedule of one call on hidden (R, H) and weight (V, H), cast to `dtype`."""

    def __init__(
        self, plan: Plan, hidden: Tensor, weight: Tensor, needs: Needs, dtype: torch.dtype, objective: _Demands, rows: Rows,
        layout: Layout, advantages: Tensor,
    ):  # fmt: skip
        self.plan, self.hidden, self.weight, self.needs, self.dtype = plan, hidden, weight, needs, dtype
        self.objective, self.layout, self.advantages = objective, layout, advantages
        self.counts: Counts | None = None
        self.drops = True
        self.token_local, self.has_old = objective.is_token_local(rows.old is not None), rows.old is not None
        self.logit_bytes = bytes_per_logit(weight.device, dtype, plan.backend)
        self.room = self._workspace(whole_rows=True)
        self.limit = whole_row_tile(weight.shape[0], self.logit_bytes, self.room)  # whole rows that fit

    def schedule(self, scored: Tensor | None, alive: Tensor | None) -> tuple[Schedule, Counts | None]:
        """The schedule of this call, and what its rows counted. `alive` is given if more are scored than can have a gradient.

        Raises:
            ValueError: single_pass was asked for and is not possible.
        """
        self.scored, self.alive = scored, alive
        if not (self.hidden.is_cpu or torch.compiler.is_compiling() or capturing()):
            long = not self.token_local and self.layout.rows > self.limit
            if scored is not None or alive is not None or long:
                self._count()
        self.drops = self.hidden.is_cpu or self._may_drop()
        single = self._is_single()
        workspace = self.room if single else self._workspace(whole_rows=False)
        with_entropy = self.plan.with_entropy or self.objective.entropy.wanted
        bonus = self.objective.entropy.coef > 0
        plan = (workspace, self.plan.backend, with_entropy, bonus, self.token_local, self.limit, self.drops)
        return Schedule(single, self.dtype, *plan), self.counts

    def _may_drop(self) -> bool:
        """Whether a single pass on an accelerator asks for coefficients of 0: if there may be some, and nothing was asked yet."""
        known, counts = self.objective, self.counts
        off_policy = self.has_old or known.off_policy_mask_threshold is not None
        if not (off_policy or known.function is not None or self.alive is not None):
            return False
        if counts is None:
            return self.scored is None and self.layout.rows <= self.limit
        return counts.scored <= self.limit and not counts.read

    def _workspace(self, *, whole_rows: bool) -> int:
        """The caller's workspace, else the default for tiles of whole rows or of vocabulary slices."""
        if self.plan.workspace_bytes is not None:
            return self.plan.workspace_bytes
        default, rows = default_workspace_bytes(self.weight.device, whole_rows=whole_rows), self.hidden.shape[0]
        if not whole_rows or rows * self.weight.shape[0] * self.logit_bytes <= default:
            return default
        return single_pass_workspace(self._problem(rows, rows), default)

    def _problem(self, scored: int, active: int) -> Problem:
        return Problem(
            rows=self.hidden.shape[0], hidden=self.hidden.shape[1], vocabulary=self.weight.shape[0], scored=scored, active=active,
            operand_bytes=self.dtype.itemsize, logit_bytes=self.logit_bytes, weight_grad_bytes=self.weight.dtype.itemsize,
            fused=leaves_exponentials(self.weight.device, self.dtype, self.plan.backend) and not self.hidden.is_cpu,
            drops=self.drops,
            needs_hidden=self.needs[0], needs_weight=self.needs[1],
        )  # fmt: skip

    def _is_single(self) -> bool:
        wanted = self.plan.schedule
        if wanted == "two_pass":
            return False
        known = self.objective
        if known.entropy.top_quantile < 1 or getattr(known.surrogate, "whole_batch", False):
            if wanted == "single_pass":
                needs = "top_entropy_quantile < 1, which needs every token's entropy"
                if known.entropy.top_quantile == 1:
                    needs = f"surrogate {known.surrogate}, which needs every token's log-probability"
                raise ValueError(
                    f"schedule='single_pass' does not go with {needs} before any gradient: use schedule='two_pass'"
                )
            return False
        fits = self._fits()
        if wanted == "single_pass":
            if not fits:
                raise ValueError(self._too_long())
            return True
        half = torch.float16 in (self.dtype, self.hidden.dtype, self.weight.dtype)  # two passes scale before rounding
        if not any(self.needs) or not fits or half:
            return False
        if torch.compiler.is_compiling() or capturing():
            return True
        rows = active = self.layout.rows
        if self.alive is not None:
            rows, active = self._count().scored, self._count().active
        if active == rows <= self.limit:
            return True  # one chunk, all active: two passes could save nothing
        slices, rates = self._workspace(whole_rows=False), rates_of(self.hidden.device, self.dtype)
        return cheapest(self._problem(rows, active), self.room, rates, slice_bytes=slices).schedule == "single_pass"

    def _fits(self) -> bool:
        """Whether whole rows, and whole rollouts if the loss needs them, fit the workspace."""
        limit, layout = self.limit, self.layout
        if self.token_local:
            return limit >= 1
        if capturing():
            return layout.rows <= limit
        at_most = layout.rows if layout.packed else layout.shape[1]
        if at_most <= limit or torch.compiler.is_compiling():
            return at_most <= limit
        return self._longest() <= limit

    def _longest(self) -> int:
        """The most rows of one rollout that are scored."""
        return max(self._count().lengths, default=0)

    def _count(self) -> Counts:
        """Count the rows once, in host memory if the caller's tensors are there."""
        if self.counts is None:
            self.counts = self._count_on_host() or count_rows(self.layout.cu_seqlens, self.scored, self.alive)
        return self.counts

    def _count_on_host(self) -> Counts | None:
        """The counts from what lies in host memory; None if the device must be asked."""
        host, mask, advantages = self.layout.host, self.layout.mask, self.advantages
        if host is None:
            return None
        if self.scored is mask and (self.alive is None or self.alive is mask):  # advantages do not matter
            return count_rows(host.cu_seqlens, host.mask, None)
        if not advantages.is_cpu or self.objective.sampling is not None:  # whose weights may be 0 where they are not
            return None
        values = host.spread(advantages.detach().to(accumulator_dtype(self.dtype)))
        rows = Rows(values, host.cu_seqlens, advantages, mask=host.mask)
        return count_rows(host.cu_seqlens, *rows_to_score(rows, host, self.objective, self.plan.score_inactive))

    def _too_long(self) -> str:
        row = self.weight.shape[0] * self.logit_bytes
        limit, workspace = self.limit, self.room
        if limit == 0:
            return (
                f"workspace_bytes must hold one row of logits for schedule='single_pass', {row} bytes, got {workspace}"
            )
        if capturing():  # asking where rollouts end would sync
            needs, which, longest = "all rows in one chunk in a CUDA graph", "the batch has", self.layout.rows
        else:
            needs, which, longest = "each rollout in one chunk", "the longest rollout has", self._longest()
        known = self.objective
        needs_rollouts = (
            known.function is not None or known.level != "token" or known.off_policy_mask_threshold is not None
        )
        local = "" if needs_rollouts else f"confidence='old'{'' if self.has_old else ' with old_per_token_logps'}, "
        return (
            f"schedule='single_pass' needs {needs}, and workspace_bytes={workspace} holds {limit} rows "
            f"but {which} {longest}: give workspace_bytes >= {longest * row}, {local}or schedule='two_pass'"
        )


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast off: the head chooses the dtypes of its products."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def or_empty(values: Tensor | None, like: Tensor) -> Tensor:
    """The values, or an empty tensor for None."""
    return like.new_empty(0) if values is None else values


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for backward. Inference tensors, which autograd cannot save, go on `ctx` instead."""
    ctx.set_materialize_grads(False)
    ctx.kept_aside = [x if x is not None and x.is_inference() else None for x in tensors]
    ctx.save_for_backward(*[x if x is not None and not x.is_inference() else None for x in tensors])


def refuse_a_second_derivative() -> None:
    """Raise in a double backward: these gradients are constants, so their derivative would be silently wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the losses can be differentiated once: create_graph=True is not supported, nor by token_logps"
        )
