"""The hyper-parameters of a policy loss, resolved and checked once: what both `policy_loss` and its _from_logps read."""

import math
from dataclasses import dataclass

from rlvr_kernels.spec import PolicySpec, Surrogate

from rlvr_ops.custom import SurrogateFunction
from rlvr_ops.sampling import SamplingCorrection
from rlvr_ops.surrogates import resolve

SurrogateLike = str | Surrogate | SurrogateFunction


@dataclass(frozen=True)
class Hyperparameters:
    """A spec for the kernels and what stands around it; `function` is a surrogate of the user's own.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """

    spec: PolicySpec
    function: SurrogateFunction | None = None
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    sampling: SamplingCorrection | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.entropy_coef, int | float):
            raise TypeError(f"entropy_coef must be a number, got {self.entropy_coef!r}")
        if not 0 <= self.entropy_coef < math.inf:
            raise ValueError(f"entropy_coef must be >= 0 and finite, got {self.entropy_coef}")
        if not isinstance(self.top_entropy_quantile, int | float) or not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(
                f"top_entropy_quantile must lie in (0, 1], the share of tokens that are kept, got {self.top_entropy_quantile!r}"
            )
        if self.sampling is not None and self.spec.surrogate.form == "vespo" and self.function is None:
            self._check_vespo(self.sampling)
        if self.top_entropy_quantile < 1 and self.spec.surrogate.form == "gmpo":
            raise ValueError(
                "top_entropy_quantile < 1 does not go with surrogate gmpo, whose ratio is made of all of a rollout's tokens"
            )
        if self.function is not None and self.spec.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.spec.importance_sampling_level!r} does not go with a surrogate function, "
                "which makes its own ratios: see SurrogateRows.rollout_mean"
            )

    def _check_vespo(self, sampling: SamplingCorrection) -> None:
        """VESPO's ratio is the rollout's product, and the correction enters it through old_per_token_logps."""
        if sampling.per_rollout:
            raise ValueError(
                f"sampling_correction={sampling.kind!r} does not go with surrogate vespo, whose ratio is the rollout's product "
                "already: use token_truncate or token_mask"
            )
        for name, on in (
            ("confidence='old'", self.spec.confidence == "old"),
            ("use_bias_correction_kl", self.spec.use_bias_correction_kl),
        ):
            if on:
                raise ValueError(
                    f"{name} does not go with surrogate vespo and a sampling_correction, which changes the old_per_token_logps "
                    "that both read"
                )

    @property
    def wants_entropy(self) -> bool:
        """Whether the loss reads the tokens' entropies."""
        return self.entropy_coef > 0 or self.top_entropy_quantile < 1

    def is_token_local(self, has_old: bool) -> bool:
        """Whether a row's coefficient needs no other row's log-probability under the current policy."""
        return self.function is None and self.spec.is_token_local(has_old)


def make_hyperparameters(
    *,
    surrogate: SurrogateLike,
    importance_sampling_level: str,
    epsilon_low: float,
    epsilon_high: float | None,
    delta: float | None,
    alpha: float,
    confidence: str,
    confidence_reduction: str,
    shape: str,
    beta: float,
    kl_estimator: str,
    use_bias_correction_kl: bool,
    entropy_coef: float,
    top_entropy_quantile: float,
    off_policy_mask_threshold: float | None,
    sampling_correction: str | None,
    sampling_clip_max: float | None,
    sampling_clip_min: float | None,
) -> Hyperparameters:
    """What a loss's keywords mean."""
    spec = PolicySpec(
        surrogate=resolve(surrogate, epsilon_low, epsilon_high, delta),
        importance_sampling_level=importance_sampling_level,
        off_policy_mask_threshold=off_policy_mask_threshold,
        beta=beta,
        kl_estimator=kl_estimator,
        use_bias_correction_kl=use_bias_correction_kl,
        alpha=alpha,
        shape=shape,
        confidence=confidence,
        confidence_reduction=confidence_reduction,
    )
    if sampling_correction is None and (
        sampling_clip_max != SamplingCorrection.clip_max or sampling_clip_min is not None
    ):
        raise ValueError("sampling_clip_max and sampling_clip_min are bounds of a sampling_correction, got none of it")
    sampling = (
        None
        if sampling_correction is None
        else SamplingCorrection(sampling_correction, sampling_clip_max, sampling_clip_min)
    )
    function = None if isinstance(surrogate, str | Surrogate) else surrogate
    return Hyperparameters(spec, function, entropy_coef, top_entropy_quantile, sampling)
