"""Objective: the definition of a loss, apart from data and model, from log-probabilities to the loss and its metrics."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rlvr_kernels.checks import check_tensor, check_types
from rlvr_kernels.objective import KL, Ace, Entropy, TokenObjective
from rlvr_kernels.surrogates import Surrogate
from rlvr_kernels.weigh import SUMS, Rows
from torch import Tensor

from rlvr_ops.objectives.names import unknown_loss_type
from rlvr_ops.objectives.sampling import SamplingCorrection, geometric_mean, sampling_metrics
from rlvr_ops.rollouts import Layout, Rollouts, per_rollout_or_token, per_token

AGGREGATIONS = ("grpo", "dapo", "dr_grpo", "bnpo", "luspo")
VERL_NAMES = {
    "seq-mean-token-mean": "grpo",
    "token-mean": "dapo",
    "seq-mean-token-sum-norm": "dr_grpo",
    "seq-mean-token-sum": "luspo",
}
LEAST_LOG_WEIGHT = math.log(1e-8)  # of a sampling weight inside VESPO's product, as in the authors' code
EXPLORATORY_BAND = 0.05
"""|c| up to which a wrong rollout counts as exploratory rather than overconfident or self-correcting. The paper says c ~ 0
and gives no width, so this one is ours."""


@dataclass(frozen=True)
class Objective(TokenObjective):
    """A surrogate and the terms around it.

    Per token, with A' = A (1 + alpha f(c)) where A < 0 (ACE) and A elsewhere::

        l = surrogate(x, A') + beta KL(logp, ref) - entropy_coef H,     L = sum over rollouts i of w_i sum over tokens of l

        aggregation   verl's name              L is                                         w_i
        grpo          seq-mean-token-mean      the mean over rollouts of token means        1 / (rollouts * T_i)
        dapo          token-mean               the mean over the global batch's tokens      1 / tokens
        bnpo                                   the mean over the tokens at hand             1 / tokens here
        dr_grpo       seq-mean-token-sum-norm  token sums over a constant length            1 / (rollouts * max_completion_length)
        luspo         seq-mean-token-sum       the mean over rollouts of token sums         1 / rollouts

    Either name is accepted. Under gradient accumulation or data parallelism pass the global count, `num_items_in_batch`: a mean
    of micro-batch means would weigh a token by the micro-batch it fell into.

    surrogate: a record such as `Clip(0.2, 0.28)`, or a function of (per_token_logps, rows) that gives each token's loss
        over `rlvr_ops.SurrogateRows`: any differentiable PyTorch.
    ace, kl, entropy: records `Ace`, `KL` and `Entropy`. None leaves the term out.
    sampling: a `SamplingCorrection`, or None.
    importance_sampling_level: "token"; "sequence", the rollout's geometric mean ratio (GSPO 2507.18071); or
        "sequence_token", that value with each token's own gradient (GSPO-token).
    off_policy_mask_threshold: drop the surrogate where A < 0 in rollouts whose mean of sampling (or old) - logp is above it
        (2512.02556).
    max_completion_length: dr_grpo's constant; None means T.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted. Arguments go by their names in `ace_loss`:
            loss_type for aggregation, kl_estimator for `KL.estimator`, sampling_correction for `SamplingCorrection.kind`.

    >>> from rlvr_ops import Clip
    >>> Objective(Clip(0.2, 0.28), ace=Ace(alpha=1.0), kl=KL("k3", 0.001), aggregation="dapo").level
    'token'
    """

    surrogate: Surrogate | Callable[..., Tensor]  # type: ignore[assignment]
    ace: Ace = None  # type: ignore[assignment]  # torch 2.11 does not trace a field whose default is a record
    kl: KL = None  # type: ignore[assignment]
    importance_sampling_level: str = "token"
    off_policy_mask_threshold: float | None = None
    entropy: Entropy = None  # type: ignore[assignment]
    sampling: SamplingCorrection | None = None
    aggregation: str = "grpo"
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        for name, record in (("ace", Ace), ("kl", KL), ("entropy", Entropy)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, Ace(alpha=0.0) if name == "ace" else record())
        check_types(ace=(self.ace, Ace), kl=(self.kl, KL), entropy=(self.entropy, Entropy))
        if self.sampling is not None:
            check_types(sampling=(self.sampling, SamplingCorrection))
        if not (isinstance(self.surrogate, Surrogate) or callable(self.surrogate)) or isinstance(self.surrogate, type):
            raise TypeError(f"surrogate must be a record such as Clip(), or a function, got {self.surrogate!r}")
        object.__setattr__(self, "aggregation", canonical(self.aggregation))
        if self.max_completion_length is not None:
            if not isinstance(self.max_completion_length, int | float):
                raise TypeError(f"max_completion_length must be a number, got {self.max_completion_length!r}")
            if not 0 < self.max_completion_length < math.inf:
                raise ValueError(f"max_completion_length must be > 0, got {self.max_completion_length}")
        super().__post_init__()
        self._check_combination()

    @property
    def function(self) -> Callable[..., Tensor] | None:
        """The surrogate, if it is a user's function."""
        return None if isinstance(self.surrogate, Surrogate) else self.surrogate

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probabilities."""
        return self.ace.alpha > 0 or (self.kl.beta > 0 and self.kl.against == "reference")

    def is_token_local(self, has_old: bool) -> bool:
        """Whether each token's coefficient depends on its own log-probability alone."""
        return self.function is None and super().is_token_local(has_old)

    def _check_combination(self) -> None:
        level, surrogate = self.importance_sampling_level, self.surrogate
        if not isinstance(surrogate, Surrogate):
            if level != "token":
                raise ValueError(
                    f"importance_sampling_level={level!r} does not go with a surrogate function, which makes its own ratios: "
                    "see SurrogateRows.rollout_mean"
                )
            given = {"alpha > 0": self.ace.alpha > 0, "sampling_correction": self.sampling is not None}
            given["top_entropy_quantile < 1"] = self.entropy.top_quantile < 1
            if getattr(surrogate, "signs_only", False) and any(given.values()):
                raise ValueError(
                    f"{' and '.join(name for name in given if given[name])}: surrogate {surrogate} reads the advantages' signs "
                    "alone, and whole rollouts: pass alpha=0.0, no correction, and a quantile of 1"
                )
            return
        form = surrogate.form
        if surrogate.level and level != "token":
            raise ValueError(
                f"importance_sampling_level={level!r} does not go with surrogate {form}, which has a ratio of its own for the "
                "whole rollout: leave it at 'token'"
            )
        if level != "token" and surrogate.token_only:
            raise ValueError(
                f"importance_sampling_level={level!r} does not go with a surrogate {surrogate.token_only}: leave it at 'token'"
            )
        if form == "weight" and level == "sequence_token":
            raise ValueError(
                "importance_sampling_level='sequence_token' does not go with a surrogate whose ratio is a constant to the "
                "gradient (cispo, dispo, reinforce): 'sequence' is the same there"
            )
        if form == "gmpo" and self.entropy.top_quantile < 1:
            raise ValueError(
                "top_entropy_quantile < 1 does not go with surrogate gmpo, whose ratio is made of all of a rollout's tokens"
            )
        if form == "vespo" and self.sampling is not None:
            self._check_vespo(self.sampling)

    def _check_vespo(self, sampling: SamplingCorrection) -> None:
        """VESPO's ratio is the rollout's product, and the correction enters it through old_per_token_logps."""
        if sampling.per_rollout:
            raise ValueError(
                f"sampling_correction={sampling.kind!r} does not go with surrogate vespo, whose ratio is the rollout's product "
                "already: use token_truncate or token_mask"
            )
        for name, on in (
            ("confidence='old'", self.ace.confidence == "old"),
            ("use_bias_correction_kl", self.kl.bias_correction),
            ("kl_against='old'", self.kl.against == "old"),
        ):
            if on:
                raise ValueError(
                    f"{name} does not go with surrogate vespo and a sampling_correction, which changes the old_per_token_logps "
                    "that it reads"
                )

    def rows(
        self, rollouts: Rollouts, layout: Layout, dtype: torch.dtype, like_name: str
    ) -> tuple[Rows, dict[str, Tensor]]:
        """Check the rollouts and flatten them to rows (R,); return them with the sampling correction's metrics.

        Weights that are known before the pass go into the advantages: the sampling correction, and ACE's with
        confidence="old".
        """
        self._check_presence(rollouts)
        device = layout.cu_seqlens.device
        names = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
        old, ref, sampling = [per_token(n, getattr(rollouts, n), layout, like_name, device, dtype) for n in names]
        advantages = per_rollout_or_token("advantages", rollouts.advantages, layout, device, dtype)
        metrics: dict[str, Tensor] = {}
        if self.sampling is not None and old is not None and sampling is not None:
            weights = self.sampling.weights(old, sampling, layout)
            metrics = sampling_metrics(weights, layout)
            form = "" if self.function is not None else self.surrogate.form  # type: ignore[union-attr]
            if form == "vespo":
                old = old - weights.log().clamp(min=LEAST_LOG_WEIGHT)
            else:
                if form == "gmpo" and not self.sampling.per_rollout:
                    weights = geometric_mean(weights, layout)
                advantages = torch.where(advantages == 0, 0, advantages * weights)  # 0 * inf must be 0
        if ref is not None and old is not None and self.ace.alpha > 0 and self.ace.confidence == "old":
            gap = old - ref if layout.mask is None else (old - ref).masked_fill(~layout.mask, 0)
            weight = self.ace.weight(self.ace.shift(layout.per_rollout(gap), layout.tokens()))
            advantages = torch.where(advantages < 0, advantages * weight[layout.rollout()], advantages)
        read = self.function is not None or self.off_policy_mask_threshold is not None
        weights = self.rollout_weights(layout, rollouts.num_items_in_batch, dtype)
        return Rows(advantages, layout.cu_seqlens, weights, old, ref, sampling if read else None, layout.mask), metrics

    def _check_presence(self, rollouts: Rollouts) -> None:
        old, sampling = rollouts.old_per_token_logps, rollouts.sampling_per_token_logps
        if self.needs_reference and rollouts.ref_per_token_logps is None:
            ace = "ACE compares the policy with it: pass it, or alpha=0"
            reason = ace if self.ace.alpha > 0 else "the KL term needs it: pass it, or beta=0, or kl_against='old'"
            raise ValueError(f"ref_per_token_logps is missing, and {reason}")
        if self.sampling is not None:
            for name, values in (("sampling_per_token_logps", sampling), ("old_per_token_logps", old)):
                if values is None:
                    raise ValueError(
                        f"{name} is missing, and sampling_correction={self.sampling.kind!r} weighs by exp(old - sampling): "
                        "pass both, old_per_token_logps scored by token_logps before the first update"
                    )
        elif sampling is not None and self.function is None and self.off_policy_mask_threshold is None:
            raise ValueError(
                "sampling_per_token_logps is given and nothing reads it: choose a sampling_correction or an "
                "off_policy_mask_threshold"
            )

    def rollout_weights(self, layout: Layout, num_items: float | Tensor | None, dtype: torch.dtype) -> Tensor:
        """Each rollout's weight w (B,): finite if the rollout has no tokens; all 0 if num_items is 0."""
        tokens = layout.tokens().to(dtype)
        count = _check_count(num_items, self.aggregation, layout)
        if self.aggregation in ("dapo", "bnpo"):
            weights = torch.ones_like(tokens)
            count = tokens.sum().clamp(min=1) if count is None else count
        else:
            weights = tokens.clamp(min=1).reciprocal() if self.aggregation == "grpo" else torch.ones_like(tokens)
            count = max(layout.rollouts, 1) if count is None else count
        if self.aggregation == "dr_grpo":
            weights = weights / self._constant_length(layout)
        if num_items is None:
            return weights / count
        if not isinstance(count, Tensor):
            return weights / count if count else torch.zeros_like(weights)
        return torch.where(count == 0, 0, weights / count)

    def _constant_length(self, layout: Layout) -> int:
        if self.max_completion_length is not None:
            return self.max_completion_length
        if layout.packed:
            raise ValueError(
                "max_completion_length is needed for loss_type='dr_grpo' on packed rows: the constant that it divides by"
            )
        return max(layout.shape[1], 1)

    def metrics(self, sums: Tensor, has_reference: bool) -> dict[str, Tensor]:
        """Detached 0-d metrics from each rollout's sums (B, 8), over the scored rows; docs/metrics.md explains them."""
        column = dict(zip(SUMS, sums.detach().unbind(1), strict=True))
        tokens = column["tokens"].sum().clamp(min=1)
        wrong = (column["wrong"] > 0).to(sums.dtype)
        count = wrong.sum().clamp(min=1)
        low, high = column["clipped_low"].sum() / tokens, column["clipped_high"].sum() / tokens
        metrics = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
        if self.off_policy_mask_threshold is not None:
            metrics["off_policy/frac_dropped"] = (wrong * (column["dropped"] > 0)).sum() / count
        if has_reference or self.kl.against == "old":
            metrics["kl"] = column["kl"].sum() / tokens
        if not has_reference:
            return metrics
        shift = self.ace.shift(column["shift"], column["tokens"])
        weight = self.ace.weight(shift)
        return metrics | {
            "ace/shift/mean": (wrong * shift).sum() / count,
            "ace/weight/mean": (wrong * weight).sum() / count,
            "ace/weight/max": weight.masked_fill(wrong == 0, 0).amax() if weight.numel() else wrong.sum(),
            "ace/frac_overconfident": (wrong * (shift > EXPLORATORY_BAND)).sum() / count,
            "ace/frac_exploratory": (wrong * (shift.abs() <= EXPLORATORY_BAND)).sum() / count,
            "ace/frac_self_correcting": (wrong * (shift < -EXPLORATORY_BAND)).sum() / count,
        }


def correction(kind: str | None, clip_max: float | None, clip_min: float | None) -> SamplingCorrection | None:
    """Build the sampling correction from a loss's keywords; None if `kind` is.

    Raises:
        ValueError: bounds without a correction, or anything that `SamplingCorrection` refuses.
    """
    if kind is not None:
        return SamplingCorrection(kind, clip_max, clip_min)
    if clip_max != SamplingCorrection.clip_max or clip_min is not None:
        raise ValueError("sampling_clip_max and sampling_clip_min are bounds of a sampling_correction, got none")
    return None


class LossOutput(NamedTuple):
    """What a loss returns.

    loss: 0-d, to call backward on.
    metrics: detached 0-d tensors on the device, explained in docs/metrics.md.
    per_token_logps: detached, shaped like completion_ids; 0 where masked, NaN where a row counts but was not scored because its
        rollout has no gradient (`score_inactive=False`).
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    per_token_logps: Tensor


def canonical(loss_type: str) -> str:
    """Return the name in AGGREGATIONS of a loss_type, translating verl's names.

    Raises:
        ValueError: an unknown name, or no name.
    """
    if not isinstance(loss_type, str) or loss_type not in (*AGGREGATIONS, *VERL_NAMES):
        raise ValueError(unknown_loss_type(loss_type, (*AGGREGATIONS, *VERL_NAMES)))
    return VERL_NAMES.get(loss_type, loss_type)


def _check_count(count: float | Tensor | None, aggregation: str, layout: Layout) -> float | Tensor | None:
    """Check num_items_in_batch; return a number or a 0-d tensor. 0 is accepted only if no token counts here either."""
    if count is None:
        return None
    if aggregation == "bnpo":
        raise ValueError(
            "num_items_in_batch does not go with loss_type='bnpo', which divides by the tokens at hand: use loss_type='dapo'"
        )
    if not isinstance(count, Tensor | int | float) or isinstance(count, bool):
        raise TypeError(f"num_items_in_batch must be a number or a tensor, got {count!r}")
    if isinstance(count, Tensor) and count.numel() != 1:
        raise ValueError(f"num_items_in_batch must be one number, got a tensor of shape {tuple(count.shape)}")
    if isinstance(count, Tensor):
        check_tensor("num_items_in_batch", count, floating=False)
        count = count.detach().reshape(())
    on_host = not isinstance(count, Tensor) or count.device.type == "cpu"
    counts = layout.rows if layout.mask is None else layout.mask.any()  # read only if the count is on the host
    if not torch.compiler.is_compiling() and on_host and not 0 < count < math.inf and (count != 0 or counts):
        unit = "active tokens" if aggregation == "dapo" else "rollouts"
        raise ValueError(f"num_items_in_batch must be > 0, the {unit} of the global batch, got {float(count):g}")
    return count
