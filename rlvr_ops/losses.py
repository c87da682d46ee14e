"""policy_loss: a policy's loss from its hidden states and lm_head, without its logits. Every named loss is a preset of it."""

from typing import NamedTuple

import torch
from rlvr_kernels.logits import Head, accumulator_dtype
from rlvr_kernels.single_pass import is_token_local
from rlvr_kernels.spec import PolicySpec, choose
from rlvr_kernels.tile import bytes_per_logit, default_workspace_bytes, whole_row_tile
from torch import Tensor

from rlvr_ops import arguments, ops
from rlvr_ops.aggregation import rollout_weights
from rlvr_ops.diagnostics import policy_metrics
from rlvr_ops.layout import Layout

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


def policy_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    alpha: float = 0.0,
    confidence: str = "current",
    confidence_reduction: str = "mean",
    shape: str = "softplus",
    loss_type: str = "grpo",
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    temperature: float | Tensor = 1.0,
    lm_head_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    score_inactive: bool = False,
    with_entropy: bool = False,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> LossOutput:
    """Clipped policy-gradient loss, with ACE's confidence-aware weight if `alpha` > 0, from hidden states and the lm_head.

    Per token, with rho = exp(logp - old) and A' = A (1 + alpha f(c)) where A < 0 and A elsewhere::

        l = -min(min(rho, delta) A', clip(rho, 1 - epsilon_low, 1 + epsilon_high) A') + beta KL(logp, ref)

    c is the rollout's confidence shift, the mean (or sum) over its tokens of logp - ref, a constant to the gradient.
    Sources: GRPO 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, delta 2505.07291, ACE 2602.21420.

    Traps: `hidden_states[:, t]` must be the state that *predicts* `completion_ids[:, t]`. Reference and policy must be
    scored with the same dtype and temperature, or c is not 0 where they agree. Under gradient accumulation or data
    parallelism pass `num_items_in_batch`. A rollout whose advantages are all 0 is not scored, unless a KL term or
    `score_inactive` asks for it: metrics then speak of the scored rows only (`head/rows_scored`).

    Args:
        hidden_states: (B, T, H), or packed (N, H) with `cu_seqlens`; the states after the final norm.
        lm_head_weight: (V, H).
        completion_ids: (B, T) or (N,), int.
        advantages: one per rollout (B,), or one per token (B, T) or (N,); packed with N = B means one per rollout.
        ref_per_token_logps: log-probabilities in nats under the frozen reference, like completion_ids; for ACE and the
            KL.
        old_per_token_logps: the same under the policy that sampled. None: on policy, rho = 1 with gradient.
        completion_mask: like completion_ids, nonzero where a token counts.
        cu_seqlens: (B + 1,) int, where each rollout begins in the packed rows, and N.
        alpha: strength of ACE; 0 is off. The paper uses 1.
        confidence: "current" takes c from the policy in training, "old" from `old_per_token_logps` (known before the
            pass; which of the two the authors' code uses is not verified).
        confidence_reduction: "mean" divides c by the rollout's tokens, "sum" does not (the abstract's form; not
            verified which is meant there).
        shape: f is "softplus" or "relu".
        loss_type: how tokens are averaged: grpo, dapo, dr_grpo, bnpo; see `rlvr_ops.aggregation`.
        epsilon_low, epsilon_high: the clip; epsilon_high=None means epsilon_low.
        delta: upper bound of the ratio where A < 0 (two-sided clip), above 1 + epsilon_high.
        beta: weight of the KL term; kl_estimator k1, k2 or k3, differentiated as written.
        temperature: the sampling temperature: a float, or one per rollout or per token.
        lm_head_bias: (V,). softcap, logit_scale: z = softcap tanh(logit_scale (h W^T + b) / softcap) / temperature.
        num_items_in_batch: the global batch's active tokens (dapo) or rollouts (grpo, dr_grpo). None: this batch's.
        max_completion_length: dr_grpo's constant; None means T.
        score_inactive: score rollouts without gradient too, for their log-probabilities and metrics.
        with_entropy: report the scored rows' mean entropy in the metrics; costs no extra matmul.
        schedule: "single_pass" computes gradients while each chunk's logits exist (6NVH); "two_pass" recomputes the
            logits in backward (8NVH) for the rows that have a gradient; "forward_only" gives no gradient; "auto" takes
            single_pass if the longest rollout fits the workspace or the loss is local to tokens, and two_pass
            otherwise, if less than 2/3 of the scored rows can have a gradient, or for float16, whose gradients would
            underflow before a loss scale reached them. The metric `head/single_pass` says which it was.
        workspace_bytes: the most that the logits and their gradient may occupy; None: 2 GiB on an accelerator, 160 MiB
            on CPU.
        backend: "auto", "triton" or "torch"; see `rlvr_ops.explain_backend`.
        validate: also check for NaN and inf, and ids on an accelerator; costs host syncs.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> hidden = torch.randn(2, 3, 8, requires_grad=True)
    >>> weight, ids = torch.randn(16, 8), torch.tensor([[1, 5, 2], [7, 0, 3]])
    >>> out = policy_loss(hidden, weight, ids, torch.tensor([1.0, -1.0]))
    >>> out.loss.backward()
    >>> hidden.grad.shape
    torch.Size([2, 3, 8])
    """
    spec = make_spec(
        alpha, confidence, confidence_reduction, shape, epsilon_low, epsilon_high, delta, beta, kl_estimator
    )
    choose("schedule", schedule, SCHEDULES)
    head = Head(logit_scale, softcap)
    arguments.check_head(hidden_states, lm_head_weight, lm_head_bias)
    arguments.check_ids(completion_ids, hidden_states)
    layout = arguments.make_layout("completion_ids", completion_ids, completion_mask, cu_seqlens)
    dtype = ops.compute_dtype(hidden_states, lm_head_weight)
    given = Constants.collect(
        layout,
        advantages,
        old_per_token_logps,
        ref_per_token_logps,
        spec,
        hidden_states.device,
        accumulator_dtype(dtype),
        "completion_ids",
    )
    if validate or (completion_ids.device.type == "cpu" and not torch.compiler.is_compiling()):
        arguments.check_vocabulary(completion_ids, layout, lm_head_weight.shape[0])
    if validate:
        _check_all_finite(
            layout, hidden_states, lm_head_weight, lm_head_bias, advantages, old_per_token_logps, ref_per_token_logps
        )
    weights = rollout_weights(loss_type, layout, num_items_in_batch, max_completion_length, given.advantages.dtype)
    alive = given.alive(layout, spec)
    scored = layout.mask if score_inactive else given.worth_scoring(layout, alive)
    call = _HeadCall(
        hidden_states.reshape(-1, hidden_states.shape[-1]), lm_head_weight, lm_head_bias, completion_ids.reshape(-1), scored,
        arguments.inverse_temperature(temperature, layout, hidden_states.device, given.advantages.dtype), ops.encode(head), dtype,
        default_workspace_bytes(hidden_states.device) if workspace_bytes is None else workspace_bytes, backend, with_entropy,
    )  # fmt: skip
    if call.workspace_bytes == 0 and schedule != "forward_only" and any(call.needs()):
        raise ValueError(
            "workspace_bytes=0 is forward only: call under torch.no_grad(), or give a workspace for the gradient"
        )
    if schedule == "forward_only":
        with torch.no_grad():
            return _two_pass(call, layout, given, weights, spec)
    chosen = _choose_schedule(schedule, call, layout, spec, given, alive if score_inactive else None)
    return (_single_pass if chosen == "single_pass" else _two_pass)(call, layout, given, weights, spec)


def make_spec(
    alpha: float, confidence: str, confidence_reduction: str, shape: str, epsilon_low: float, epsilon_high: float | None,
    delta: float | None, beta: float, kl_estimator: str,
) -> PolicySpec:  # fmt: skip
    """The spec that a loss's keywords mean."""
    high = epsilon_low if epsilon_high is None else epsilon_high
    return PolicySpec(epsilon_low, high, delta, beta, kl_estimator, alpha, shape, confidence, confidence_reduction)


class Constants(NamedTuple):
    """The flat constants of a loss, each (R,)."""

    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None

    @staticmethod
    def collect(
        layout: Layout, advantages: Tensor, old: Tensor | None, ref: Tensor | None, spec: PolicySpec, device: torch.device,
        dtype: torch.dtype, like: str,
    ) -> "Constants":  # fmt: skip
        """Check the arguments and flatten them."""
        if spec.needs_reference and ref is None:
            reason = (
                "ACE compares the policy with it: pass it, or alpha=0"
                if spec.alpha > 0
                else "the KL term needs it: pass it, or beta=0"
            )
            raise ValueError(f"ref_per_token_logps is missing, and {reason}")
        return Constants(
            arguments.per_rollout_or_token("advantages", advantages, layout, device, dtype),
            arguments.per_token("old_per_token_logps", old, layout, like, device, dtype),
            arguments.per_token("ref_per_token_logps", ref, layout, like, device, dtype),
        )

    def alive(self, layout: Layout, spec: PolicySpec) -> Tensor | None:
        """The rows (R,) that can have a gradient, None meaning all."""
        if spec.beta > 0:
            return layout.mask
        alive = self.advantages != 0
        return alive if layout.mask is None else alive & layout.mask

    @staticmethod
    def worth_scoring(layout: Layout, alive: Tensor | None) -> Tensor | None:
        """The counting rows (R,) of every rollout that has an alive one: its confidence shift needs them all."""
        if alive is None or alive is layout.mask:
            return layout.mask
        rows = (layout.per_rollout(alive.long()) > 0)[layout.rollout()]
        return rows if layout.mask is None else rows & layout.mask


class _HeadCall(NamedTuple):
    """What both schedules hand to the head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    scored: Tensor | None
    inv_temperature: Tensor
    head: str
    dtype: torch.dtype
    workspace_bytes: int
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

    def whole_rows(self) -> int:
        """How many rows fit the workspace with all their logits."""
        return whole_row_tile(
            self.weight.shape[0], bytes_per_logit(self.weight.device, self.dtype), self.workspace_bytes
        )


def _choose_schedule(
    schedule: str, call: _HeadCall, layout: Layout, spec: PolicySpec, given: Constants, alive: Tensor | None
) -> str:
    """`alive` is given if more rows are scored than can have a gradient."""
    if schedule == "two_pass":
        return schedule
    fits = _single_pass_fits(call, layout, spec, given)
    if schedule == "single_pass" and not fits:
        raise ValueError(_too_long(call, layout))
    if schedule == "single_pass":
        return schedule
    if not any(call.needs()) or not fits or call.is_half():
        return "two_pass"
    if alive is None or torch.compiler.is_compiling():
        return "single_pass"
    scored = layout.rows if call.scored is None else int(call.scored.sum())
    return "two_pass" if 3 * int(alive.sum()) < 2 * scored else "single_pass"


def _single_pass_fits(call: _HeadCall, layout: Layout, spec: PolicySpec, given: Constants) -> bool:
    """Whether whole rows, and whole rollouts if the loss needs them, fit the workspace."""
    limit = call.whole_rows()
    if is_token_local(spec, given.old is not None):
        return limit >= 1
    at_most = layout.rows if layout.packed else layout.shape[1]
    if at_most <= limit or torch.compiler.is_compiling():
        return at_most <= limit
    return layout.longest() <= limit


def _too_long(call: _HeadCall, layout: Layout) -> str:
    row = call.weight.shape[0] * bytes_per_logit(call.weight.device, call.dtype)
    limit = call.whole_rows()
    if limit == 0:
        return f"workspace_bytes must hold one row of logits for schedule='single_pass', {row} bytes, got {call.workspace_bytes}"
    longest = layout.longest()
    return (
        f"schedule='single_pass' needs each rollout in one chunk, and workspace_bytes={call.workspace_bytes} holds {limit} rows "
        f"but the longest rollout has {longest}: give workspace_bytes >= {longest * row}, confidence='old', or schedule='two_pass'"
    )


def _single_pass(call: _HeadCall, layout: Layout, given: Constants, weights: Tensor, spec: PolicySpec) -> LossOutput:
    loss, logp, entropy, statistics, pulled_back, *_ = ops.single_pass(
        call.hidden, call.weight, call.bias, call.ids, call.scored, call.inv_temperature, given.old, given.ref, given.advantages,
        layout.cu_seqlens, weights, ops.encode(spec), call.head, call.dtype, *call.needs(), call.with_entropy, call.workspace_bytes,
        call.backend,
    )  # fmt: skip
    metrics = policy_metrics(
        statistics, spec, given.ref is not None, entropy if call.with_entropy else None, call.scored
    )
    metrics |= _head_metrics(call, layout, pulled_back, single=True)
    return LossOutput(loss, metrics, _present(logp, call.scored, layout))


def _two_pass(call: _HeadCall, layout: Layout, given: Constants, weights: Tensor, spec: PolicySpec) -> LossOutput:
    logp, _lse, entropy, _mean, _top1 = ops.score(
        call.hidden, call.weight, call.bias, call.ids, call.scored, call.inv_temperature, call.head, call.dtype,
        call.with_entropy, False, False, call.workspace_bytes, call.backend,
    )  # fmt: skip
    losses, coef, statistics = ops.weigh(
        logp,
        given.old,
        given.ref,
        given.advantages,
        call.scored,
        layout.cu_seqlens,
        weights,
        ops.encode(spec),
        call.backend,
    )
    metrics = policy_metrics(
        statistics, spec, given.ref is not None, entropy.detach() if call.with_entropy else None, call.scored
    )
    pulled_back = (coef != 0).sum().to(coef.dtype) if any(call.needs()) else coef.new_zeros(())
    metrics |= _head_metrics(call, layout, pulled_back, single=False)
    return LossOutput(losses.sum(), metrics, _present(logp.detach(), call.scored, layout))


def _head_metrics(call: _HeadCall, layout: Layout, pulled_back: Tensor, *, single: bool) -> dict[str, Tensor]:
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


def _check_all_finite(
    layout: Layout,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
) -> None:
    arguments.check_finite("hidden_states", hidden, layout)
    arguments.check_finite("lm_head_weight", weight)
    arguments.check_finite("lm_head_bias", bias)
    arguments.check_finite("advantages", advantages, layout)
    arguments.check_finite("old_per_token_logps", old, layout)
    arguments.check_finite("ref_per_token_logps", ref, layout)
