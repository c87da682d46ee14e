"""ACE: a clipped surrogate that punishes a wrong rollout harder, the likelier the policy has made it."""

from collections.abc import Callable

from rlvr_kernels.checks import check_logits, check_number
from rlvr_kernels.objective import KL, Ace, Entropy
from torch import Tensor, nn

from rlvr_ops.head.head import Head
from rlvr_ops.head.plan import Plan
from rlvr_ops.losses.policy_loss import policy_loss
from rlvr_ops.losses.policy_loss_from_logps import policy_loss_from_logps
from rlvr_ops.objectives.names import numbers_of, unknown_surrogate
from rlvr_ops.objectives.objective import AGGREGATIONS, LossOutput, Objective, correction
from rlvr_ops.rollouts import Rollouts
from rlvr_ops.surrogates import SURROGATES, Clip, Surrogate

SurrogateLike = str | Surrogate | Callable[..., Tensor]


def ace_loss(
    hidden_states: Tensor, lm_head_weight: Tensor | Head, completion_ids: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, surrogate: SurrogateLike = "ppo_clip",
    importance_sampling_level: str = "token", epsilon_low: float = 0.2, epsilon_high: float | None = None,
    delta: float | None = None, alpha: float = 1.0, confidence: str = "current", confidence_reduction: str = "mean",
    shape: str = "softplus", loss_type: str = "grpo", beta: float = 0.0, kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False, kl_against: str = "reference", entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None, sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None, temperature: float | Tensor = 1.0, lm_head_bias: Tensor | None = None,
    softcap: float | None = None, logit_scale: float = 1.0, num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None, score_inactive: bool = False, with_entropy: bool = False,
    schedule: str = "auto", workspace_bytes: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """ACE: punish a wrong rollout harder, the likelier the policy has made it (arXiv 2602.21420).

    Per token, with rho = exp(logp - old) and A' = A (1 + alpha f(c)) where A < 0 and A elsewhere::

        l = surrogate(rho, A') + beta KL(logp, ref) - entropy_coef H

    and the surrogate is PPO's clip unless another is chosen::

        -min(min(rho, delta) A', clip(rho, 1 - epsilon_low, 1 + epsilon_high) A')

    c is the rollout's confidence shift, the mean (or sum) over its tokens of logp - ref, a constant to the gradient. If all
    rollouts of a group are wrong, their advantage is 0 and ACE does nothing. The default is ACE-GRPO; ACE-DAPO is
    loss_type="dapo" with epsilon_high=0.28. `policy_loss` lists the traps.

    Sources: GRPO 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, delta 2505.07291; docs/methods.md has the others.

    Args:
        hidden_states: (B, T, H), or packed (N, H) with `cu_seqlens`; the states after the final norm.
        lm_head_weight: (V, H), or a `Head`, which brings its bias, softcap, logit_scale and temperature: `Head.from_model` finds
            a transformers model's, and `Head.of` that of a module with an adapter.
        completion_ids: (B, T) or (N,), int.
        advantages: one per rollout (B,), or one per token. Packed with N = B means one per rollout.
        ref_per_token_logps: log-probabilities in nats under the frozen reference, like completion_ids. None only with alpha=0.
        old_per_token_logps: the same under the policy that sampled. None: on policy, rho = 1 with gradient.
        sampling_per_token_logps: the same under the engine that sampled, NaN where it gave none: the correction is then 1.
        completion_mask: like completion_ids, nonzero where a token counts.
        cu_seqlens: (B + 1,) int: where each rollout begins in the packed rows, then N. It, completion_mask and advantages may be on
            the CPU; an accelerator is then not asked which rows count.
        surrogate: a name in `surrogates.SURROGATES`; a record with other numbers, such as `Sapo(tau_negative=1.1)`; or a function
            of (per_token_logps, rows) that gives each token's loss, over `SurrogateRows`.
        importance_sampling_level: "token"; "sequence": rho is its geometric mean over the rollout (GSPO); or
            "sequence_token": that value with each token's own gradient (GSPO-token).
        epsilon_low, epsilon_high: PPO's clip; epsilon_high=None means epsilon_low.
        delta: upper bound of the ratio where A < 0 (two-sided clip), above 1 + epsilon_high.
        alpha: strength of ACE. The paper uses 1; 0 is the plain loss, bit for bit.
        confidence: "current" takes c from the policy in training, "old" from `old_per_token_logps`, known before the pass. Which
            of the two the authors' code uses is not verified.
        confidence_reduction: "mean" divides c by the rollout's tokens, "sum" does not (the abstract's form; not verified).
        shape: f is "softplus" or "relu".
        loss_type: how tokens are averaged: grpo, dapo, dr_grpo, bnpo, luspo, or verl's names; `Objective.aggregation` has each.
        beta: weight of the KL term; kl_estimator k1, k2 or k3, differentiated as written. kl_against: "reference", or "old", the
            policy that sampled.
        use_bias_correction_kl: multiply the estimate by the token's rho; its gradient is then the reverse KL's,
            rho (logp - ref), whichever estimator gives the value (2512.02556).
        entropy_coef: weight of the entropy bonus, aggregated like the loss.
        top_entropy_quantile: the share of this call's tokens, by highest entropy, that get a surrogate and an entropy bonus
            (2506.01939). Below 1 it needs schedule="two_pass".
        off_policy_mask_threshold: drop the surrogate where A < 0 in rollouts whose mean of sampling (or old) - logp is above it
            (2512.02556).
        sampling_correction: multiply the surrogate by exp(old - sampling): "token_truncate", "token_mask", "sequence_truncate" or
            "sequence_mask"; sampling_clip_max and sampling_clip_min bound it, None is no bound.
        temperature: the sampling temperature: a number, or one per rollout or per token.
        lm_head_bias: (V,). softcap, logit_scale: z = softcap tanh(logit_scale (h W^T + b) / softcap) / temperature.
        num_items_in_batch: the global batch's active tokens (dapo) or rollouts (grpo, dr_grpo, luspo). None: this batch's. 0 is for
            a batch without a token that counts, here or anywhere; the loss is then 0.
        max_completion_length: dr_grpo's constant; None means T.
        score_inactive, with_entropy, schedule, workspace_bytes, backend, validate: see `Plan`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
        NotImplementedError: a forward-mode tangent, or a transform of torch.func.

    >>> hidden = torch.randn(2, 3, 8, requires_grad=True)
    >>> weight, ids = torch.randn(16, 8), torch.tensor([[1, 5, 2], [7, 0, 3]])
    >>> out = ace_loss(hidden, weight, ids, torch.tensor([1.0, -1.0]), ref_per_token_logps=torch.full((2, 3), -3.0))
    >>> out.loss.backward()
    >>> hidden.grad.shape
    torch.Size([2, 3, 8])
    """
    objective = Objective(
        resolve(surrogate, epsilon_low, epsilon_high, delta),
        ace=Ace(alpha, confidence, confidence_reduction, shape), kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against),
        importance_sampling_level=importance_sampling_level, off_policy_mask_threshold=off_policy_mask_threshold,
        entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation=loss_type,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        completion_ids, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps,
        completion_mask, cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    head = Head(lm_head_weight, lm_head_bias, logit_scale, softcap, temperature)
    plan = Plan(schedule, workspace_bytes, backend, score_inactive, with_entropy, validate)
    return policy_loss(hidden_states, head, rollouts, objective, plan)


def ace_loss_from_logps(
    per_token_logps: Tensor, advantages: Tensor, *,
    ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, per_token_entropies: Tensor | None = None,
    surrogate: SurrogateLike = "ppo_clip", importance_sampling_level: str = "token", epsilon_low: float = 0.2,
    epsilon_high: float | None = None, delta: float | None = None, alpha: float = 1.0, confidence: str = "current",
    confidence_reduction: str = "mean", shape: str = "softplus", loss_type: str = "grpo", beta: float = 0.0,
    kl_estimator: str = "k3", use_bias_correction_kl: bool = False, kl_against: str = "reference",
    entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
    sampling_correction: str | None = None, sampling_clip_max: float | None = 3.0,
    sampling_clip_min: float | None = None, num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None, backend: str = "auto", validate: bool = False,
) -> LossOutput:  # fmt: skip
    """`ace_loss` from log-probabilities (B, T), or packed (N,) with `cu_seqlens`; see `policy_loss_from_logps`."""
    objective = Objective(
        resolve(surrogate, epsilon_low, epsilon_high, delta),
        ace=Ace(alpha, confidence, confidence_reduction, shape), kl=KL(kl_estimator, beta, use_bias_correction_kl, kl_against),
        importance_sampling_level=importance_sampling_level, off_policy_mask_threshold=off_policy_mask_threshold,
        entropy=Entropy(entropy_coef, top_entropy_quantile),
        sampling=correction(sampling_correction, sampling_clip_max, sampling_clip_min), aggregation=loss_type,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    rollouts = Rollouts(
        None, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps, completion_mask,
        cu_seqlens, num_items_in_batch,
    )  # fmt: skip
    return policy_loss_from_logps(
        per_token_logps, rollouts, objective, per_token_entropies=per_token_entropies, backend=backend, validate=validate
    )  # fmt: skip


def resolve(
    surrogate: SurrogateLike, epsilon_low: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> Surrogate | Callable[..., Tensor]:
    """Turn `surrogate` and the numbers of PPO's clip into a record; return a user's function as it is.

    Raises:
        TypeError: `surrogate` is not a name, a record or a function.
        ValueError: an unknown name, or a number of PPO's clip given with another surrogate.
    """
    if isinstance(surrogate, type):
        raise TypeError(f"surrogate must be a name, a record or a function, got the class: call {surrogate.__name__}()")
    if isinstance(surrogate, str) and surrogate not in SURROGATES:
        raise ValueError(unknown_surrogate(surrogate, SURROGATES, AGGREGATIONS))
    if isinstance(surrogate, str) and surrogate == "ppo_clip":
        return Clip(epsilon_low, epsilon_high, delta)
    given = {"epsilon_low": (epsilon_low, 0.2), "epsilon_high": (epsilon_high, None), "delta": (delta, None)}
    for name, (value, default) in given.items():
        if value != default:
            own = (
                f": set that one's numbers by {numbers_of(SURROGATES[surrogate])}" if isinstance(surrogate, str) else ""
            )
            raise ValueError(f"{name}={value} belongs to surrogate='ppo_clip', and surrogate is {surrogate!r}{own}")
    if isinstance(surrogate, str):
        return SURROGATES[surrogate]()
    if not (isinstance(surrogate, Surrogate) or callable(surrogate)):
        raise TypeError(f"surrogate must be a name, one of rlvr_ops.surrogates or a function, got {surrogate!r}")
    return surrogate


class ACELoss(nn.Module):
    """ACE from hidden states and the lm_head's weight, with hyper-parameters fixed once; see `ace_loss`.

    Shapes: hidden states (B, T, H), weight (V, H), ids (B, T), advantages (B,) or (B, T).

    Raises:
        TypeError, ValueError: at construction for a bad hyper-parameter, in forward for a bad tensor.

    >>> loss = ACELoss(alpha=1.0, loss_type="dapo", epsilon_high=0.28)
    >>> hidden, weight, ids = torch.randn(2, 3, 8), torch.randn(16, 8), torch.zeros(2, 3, dtype=torch.long)
    >>> loss(hidden, weight, ids, torch.tensor([1.0, -1.0]), ref_per_token_logps=torch.zeros(2, 3)).loss.shape
    torch.Size([])
    """

    def __init__(
        self, *, alpha: float = 1.0, confidence: str = "current", confidence_reduction: str = "mean", shape: str = "softplus",
        surrogate: SurrogateLike = "ppo_clip", importance_sampling_level: str = "token", epsilon_low: float = 0.2,
        epsilon_high: float | None = None, delta: float | None = None, loss_type: str = "grpo", beta: float = 0.0,
        kl_estimator: str = "k3", use_bias_correction_kl: bool = False, kl_against: str = "reference",
        entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
        sampling_correction: str | None = None, sampling_clip_max: float | None = 3.0, sampling_clip_min: float | None = None,
        temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
        max_completion_length: int | None = None, schedule: str = "auto", workspace_bytes: int | None = None,
        backend: str = "auto",
    ):  # fmt: skip
        super().__init__()
        self.objective = Objective(
            resolve(surrogate, epsilon_low, epsilon_high, delta), Ace(alpha, confidence, confidence_reduction, shape),
            KL(kl_estimator, beta, use_bias_correction_kl, kl_against), importance_sampling_level, off_policy_mask_threshold,
            Entropy(entropy_coef, top_entropy_quantile), correction(sampling_correction, sampling_clip_max, sampling_clip_min),
            loss_type, max_completion_length,
        )  # fmt: skip
        check_logits(logit_scale, softcap)
        check_number("temperature", temperature)
        self.logit_scale, self.softcap, self.temperature = logit_scale, softcap, temperature
        self.plan = Plan(schedule, workspace_bytes, backend)

    def forward(
        self, hidden_states: Tensor, lm_head_weight: Tensor | Head, completion_ids: Tensor, advantages: Tensor, *,
        ref_per_token_logps: Tensor, old_per_token_logps: Tensor | None = None,
        sampling_per_token_logps: Tensor | None = None, completion_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None, lm_head_bias: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> LossOutput:  # fmt: skip
        """The loss of one batch."""
        head = Head(lm_head_weight, lm_head_bias, self.logit_scale, self.softcap, self.temperature)
        rollouts = Rollouts(
            completion_ids, advantages, ref_per_token_logps, old_per_token_logps, sampling_per_token_logps, completion_mask,
            cu_seqlens, num_items_in_batch,
        )  # fmt: skip
        return policy_loss(hidden_states, head, rollouts, self.objective, self.plan)

    def extra_repr(self) -> str:
        """The hyper-parameters, for torch to print."""
        numbers = f"logit_scale={self.logit_scale}, softcap={self.softcap}, temperature={self.temperature}"
        return f"{self.objective}, {numbers}, {self.plan}"
