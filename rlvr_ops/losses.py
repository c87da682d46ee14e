"""policy_loss: a policy's loss from its hidden states and lm_head, without its logits. Every named loss is a preset of it."""

import torch
from rlvr_kernels.logits import Head, accumulator_dtype
from rlvr_kernels.spec import choose
from torch import Tensor

from rlvr_ops import arguments, ops
from rlvr_ops.aggregation import rollout_weights
from rlvr_ops.constants import Constants
from rlvr_ops.hyperparameters import SurrogateLike, make_hyperparameters
from rlvr_ops.schedules import SCHEDULES, HeadCall, Loss, LossOutput, choose_schedule, single_pass, two_pass
from rlvr_ops.spec_text import encode


def policy_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    surrogate: SurrogateLike = "ppo_clip",
    importance_sampling_level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    alpha: float = 0.0,
    confidence: str = "current",
    confidence_reduction: str = "mean",
    shape: str = "softplus",
    loss_type: str = "grpo",
    beta: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None,
    sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None,
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
    """Policy-gradient loss, with ACE's confidence-aware weight if `alpha` > 0, from hidden states and the lm_head.

    Per token, with rho = exp(logp - old) and A' = A (1 + alpha f(c)) where A < 0 and A elsewhere::

        l = surrogate(rho, A') + beta KL(logp, ref) - entropy_coef H

    and the surrogate is PPO's clip unless another is chosen::

        -min(min(rho, delta) A', clip(rho, 1 - epsilon_low, 1 + epsilon_high) A')

    c is the rollout's confidence shift, the mean (or sum) over its tokens of logp - ref, a constant to the gradient.
    Sources: GRPO 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, delta 2505.07291, ACE 2602.21420; docs/methods.md
    has the others.

    Traps: `hidden_states[:, t]` must be the state that *predicts* `completion_ids[:, t]`. Reference and policy must be
    scored with the same dtype and temperature, or c is not 0 where they agree. Under gradient accumulation or data
    parallelism pass `num_items_in_batch`. A rollout whose advantages are all 0 is not scored, unless a KL term, an
    entropy term or `score_inactive` asks for it: metrics then speak of the scored rows only (`head/rows_scored`).

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
        surrogate: "ppo_clip", "cispo", "cispo_two_sided", "dispo", "sapo", "gmpo", "vespo" or "reinforce"; one of them with
            other numbers, from `rlvr_ops.surrogates`; or a function of (per_token_logps, rows) that gives each token's
            loss, over `rlvr_ops.SurrogateRows`: any differentiable PyTorch.
        importance_sampling_level: "token"; "sequence": rho is its geometric mean over the rollout (GSPO); or
            "sequence_token": that value with each token's own gradient (GSPO-token).
        alpha: strength of ACE; 0 is off. The paper uses 1.
        confidence: "current" takes c from the policy in training, "old" from `old_per_token_logps` (known before the
            pass; which of the two the authors' code uses is not verified).
        confidence_reduction: "mean" divides c by the rollout's tokens, "sum" does not (the abstract's form; not
            verified which is meant there).
        shape: f is "softplus" or "relu".
        loss_type: how tokens are averaged: grpo, dapo, dr_grpo, bnpo, luspo, or verl's names for them; see
            `rlvr_ops.aggregation`.
        epsilon_low, epsilon_high: PPO's clip; epsilon_high=None means epsilon_low.
        delta: upper bound of the ratio where A < 0 (two-sided clip), above 1 + epsilon_high.
        beta: weight of the KL term; kl_estimator k1, k2 or k3, differentiated as written.
        use_bias_correction_kl: multiply the estimate by the token's rho; its gradient is then the reverse KL's,
            rho (logp - ref), whichever estimator gives the value (2512.02556).
        entropy_coef: weight of the entropy bonus, aggregated like the loss.
        top_entropy_quantile: the share of tokens, those of the highest entropy in this call, that have a surrogate and
            an entropy bonus at all (2506.01939); below 1 it needs schedule two_pass.
        off_policy_mask_threshold: a rollout whose mean of sampling (or old) - logp is above it has no surrogate where
            A < 0 (2512.02556).
        sampling_per_token_logps: log-probabilities under the engine that sampled, NaN where it gave none: such a token's
            correction is 1, and it adds nothing to the mean of the off-policy mask.
        sampling_correction: multiply the surrogate by exp(old - sampling): "token_truncate", "token_mask",
            "sequence_truncate" or "sequence_mask", see `rlvr_ops.sampling`; sampling_clip_max and sampling_clip_min
            bound it, None is no bound.
        temperature: the sampling temperature: a float, or one per rollout or per token.
        lm_head_bias: (V,). softcap, logit_scale: z = softcap tanh(logit_scale (h W^T + b) / softcap) / temperature.
        num_items_in_batch: the global batch's active tokens (dapo) or rollouts (grpo, dr_grpo, luspo). None: this
            batch's.
        max_completion_length: dr_grpo's constant; None means T.
        score_inactive: score rollouts without gradient too, for their log-probabilities and metrics.
        with_entropy: report the scored rows' mean entropy in the metrics; costs no extra matmul.
        schedule: "single_pass" computes gradients while each chunk's logits exist (6NVH); "two_pass" recomputes the
            logits in backward (up to 8NVH) for the rows that have a gradient; "forward_only" gives no gradient; "auto" takes
            whichever a model of their FLOPs and bytes expects to be faster (`rlvr_kernels.cost`), and two_pass where the
            longest rollout does not fit the workspace of a single pass, and for float16, whose gradients would underflow
            before a loss scale reached them. The metric `head/single_pass` says which it was.
        workspace_bytes: the most that the logits and their gradient may occupy. None: 160 MiB on CPU; on an accelerator
            2.5 GiB for a single pass (or a single chunk, if that takes no more memory) and 384 MiB for two passes. Two passes
            given more may keep logits for backward.
        backend: "auto", "triton" or "torch"; see `rlvr_ops.explain_backend`.
        validate: also check the inputs for NaN and inf, and ids on an accelerator; costs host syncs.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> hidden = torch.randn(2, 3, 8, requires_grad=True)
    >>> weight, ids = torch.randn(16, 8), torch.tensor([[1, 5, 2], [7, 0, 3]])
    >>> out = policy_loss(hidden, weight, ids, torch.tensor([1.0, -1.0]))
    >>> out.loss.backward()
    >>> hidden.grad.shape
    torch.Size([2, 3, 8])
    """
    hyper = make_hyperparameters(
        surrogate=surrogate, importance_sampling_level=importance_sampling_level, epsilon_low=epsilon_low,
        epsilon_high=epsilon_high, delta=delta, alpha=alpha, confidence=confidence, confidence_reduction=confidence_reduction,
        shape=shape, beta=beta, kl_estimator=kl_estimator, use_bias_correction_kl=use_bias_correction_kl,
        entropy_coef=entropy_coef, top_entropy_quantile=top_entropy_quantile,
        off_policy_mask_threshold=off_policy_mask_threshold, sampling_correction=sampling_correction,
        sampling_clip_max=sampling_clip_max, sampling_clip_min=sampling_clip_min,
    )  # fmt: skip
    choose("schedule", schedule, SCHEDULES)
    head = Head(logit_scale, softcap)
    arguments.check_head(hidden_states, lm_head_weight, lm_head_bias)
    arguments.check_ids(completion_ids, hidden_states)
    layout = arguments.make_layout("completion_ids", completion_ids, completion_mask, cu_seqlens)
    dtype, device = ops.compute_dtype(hidden_states, lm_head_weight), hidden_states.device
    given = Constants.collect(
        layout, advantages, old_per_token_logps, ref_per_token_logps, sampling_per_token_logps, hyper, device,
        accumulator_dtype(dtype), "completion_ids",
    )  # fmt: skip
    if validate or (device.type == "cpu" and not torch.compiler.is_compiling()):
        arguments.check_vocabulary(completion_ids, layout, lm_head_weight.shape[0])
    if validate:
        arguments.check_all_finite(
            layout, hidden_states=hidden_states, advantages=advantages, old_per_token_logps=old_per_token_logps,
            ref_per_token_logps=ref_per_token_logps, sampling_per_token_logps=arguments.zero_where_nan(sampling_per_token_logps),
        )  # fmt: skip
        arguments.check_all_finite(None, lm_head_weight=lm_head_weight, lm_head_bias=lm_head_bias)
    weights = rollout_weights(loss_type, layout, num_items_in_batch, max_completion_length, given.advantages.dtype)
    alive = given.alive(layout, hyper)
    score_all = score_inactive or hyper.top_entropy_quantile < 1
    call = HeadCall(
        hidden_states.reshape(-1, hidden_states.shape[-1]), lm_head_weight, lm_head_bias, completion_ids.reshape(-1),
        layout.mask if score_all else given.worth_scoring(layout, alive),
        arguments.inverse_temperature(temperature, layout, device, given.advantages.dtype), encode(head), dtype,
        workspace_bytes, backend,
        with_entropy or hyper.wants_entropy,
    )  # fmt: skip
    if call.workspace_bytes == 0 and call.with_entropy:
        raise ValueError("workspace_bytes=0 gives log-probabilities alone: no entropy, so give a workspace")
    if call.workspace_bytes == 0 and schedule != "forward_only" and any(call.needs()):
        raise ValueError(
            "workspace_bytes=0 is forward only: call under torch.no_grad(), or give a workspace for the gradient"
        )
    loss = Loss(layout, given, weights, hyper)
    if schedule == "forward_only":
        with torch.no_grad():
            return two_pass(call, loss)
    chosen = choose_schedule(schedule, call, loss, alive if score_all else None)
    return single_pass(call, loss) if chosen == "single_pass" else two_pass(call, loss)
