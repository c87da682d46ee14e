"""What a token's loss is made of: a surrogate, ACE's weight, and a KL penalty.

    A' = A (1 + alpha f(c)) where A < 0                      ACE (2602.21420): c, the confidence shift, is the rollout's
    loss = surrogate(x, A') + beta KL(logp, ref)             mean or sum of logp - ref, a constant to the gradient

KL(policy || reference) is estimated from one token's log-probabilities. With d = ref - logp, or old - logp if the penalty is
against the policy that sampled:

    k1 = -d,   k2 = d^2 / 2,   k3 = exp(d) - d - 1      (Schulman's three), each differentiated as written.

Averaged over tokens that the policy itself sampled, the gradient of k2 is the reverse KL's, that of k1 is 0, and that of k3
is the forward KL's.

Bias correction multiplies the estimate by the token's ratio r = exp(logp - old). The derivative is then r (logp - ref) for
all three: the reverse KL's gradient, whichever policy sampled (DeepSeek-V3.2 2512.02556, section 3.1). For k3 it is the
derivative of r k3; for k1 it leaves out a term of mean 0; for k2 it is the derivative of sg[r] k2.

r may underflow where k overflows, and vice versa. So r k3 is computed as exp(ref - old) - r (d + 1), and every product with
r adds exponents before exp.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rlvr_kernels._triton import expm1, jit, tl
from rlvr_kernels.checks import check_number, choose
from rlvr_kernels.surrogates import Surrogate

ESTIMATORS = ("k1", "k2", "k3")
AGAINST = ("reference", "old")
LARGEST_EXPONENT = 60.0  # of a ratio that is formed before it multiplies; float32 overflows at 88
SHAPES = ("softplus", "relu")
CONFIDENCES = ("current", "old")
REDUCTIONS = ("mean", "sum")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")


@dataclass(frozen=True)
class Ace:
    """The strength and form of ACE's weight 1 + alpha f(c). alpha=0 is the plain loss, bit for bit.

    confidence: whose log-probabilities give c, those of the policy in training ("current") or of the sampler ("old").
    reduction: "mean" divides c by the rollout's tokens; "sum" does not.
    shape: f, "softplus" or "relu".
    """

    alpha: float = 1.0
    confidence: str = "current"
    reduction: str = "mean"
    shape: str = "softplus"

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, zero=True)
        choose("confidence", self.confidence, CONFIDENCES)
        choose("confidence_reduction", self.reduction, REDUCTIONS)
        choose("shape", self.shape, SHAPES)

    def shift(self, total: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """c (B,) from each rollout's sum of logp - ref and its number of tokens."""
        return total / tokens.clamp(min=1) if self.reduction == "mean" else total

    def weight(self, shift: torch.Tensor) -> torch.Tensor:
        """1 + alpha f(c), in the shape of c. Twin of `weight_kernel`."""
        return 1 + self.alpha * (F.softplus(shift) if self.shape == "softplus" else F.relu(shift))

    def kernel_arguments(self) -> dict[str, float | str | bool]:
        """The Triton kernels' arguments."""
        return {"alpha": float(self.alpha), "SHAPE": self.shape, "MEAN": self.reduction == "mean"}


@dataclass(frozen=True)
class KL:
    """beta times an estimate of KL(policy || reference), or of KL(policy || old), aggregated like the loss.

    estimator: "k1", "k2" or "k3".
    beta: 0, the default, is no KL term.
    bias_correction: multiply by the token's ratio exp(logp - old). The gradient is then the reverse KL's, whoever sampled.
    against: "reference", or "old", the policy that sampled; on policy that is the policy itself, held fixed.
    """

    estimator: str = "k3"
    beta: float = 0.0
    bias_correction: bool = False
    against: str = "reference"

    def __post_init__(self) -> None:
        check_number("beta", self.beta, zero=True)
        choose("kl_estimator", self.estimator, ESTIMATORS)
        if not isinstance(self.bias_correction, bool):
            raise TypeError(f"use_bias_correction_kl must be a bool, got {self.bias_correction!r}")
        if self.against not in AGAINST:
            choose("kl_against", self.against, AGAINST)

    def penalty(self, logp: torch.Tensor, old: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
        """The published formula (n,) against `ref`, to be differentiated by autograd; the reference uses it."""
        log_ratio = logp - ref
        if self.estimator == "k1":
            estimate = log_ratio
        elif self.estimator == "k2":
            estimate = log_ratio**2 / 2
        else:
            estimate = torch.expm1(-log_ratio) + log_ratio
        if not self.bias_correction:
            return estimate
        ratio = torch.exp(logp - old)
        slope = (ratio * log_ratio).detach()
        return (ratio * estimate).detach() + slope * (logp - logp.detach())

    def terms(
        self, logp: torch.Tensor, old: torch.Tensor | None, ref: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimate against `ref` and its derivative by logp, both (n,); old=None: on policy. Twin of `divergence_kernel`."""
        gap = ref - logp
        if self.estimator == "k1":
            kl, slope = -gap, torch.ones_like(gap)
        elif self.estimator == "k2":
            kl, slope = gap.square() / 2, -gap
        else:
            kl, slope = gap.expm1() - gap, -gap.expm1()
        if not self.bias_correction:
            return kl, slope
        if old is None:
            return kl, -gap
        log_ratio = logp - old
        if self.estimator == "k3":
            far = (ref - old).exp() - times_ratio(log_ratio, gap + 1)
            kl = torch.where(gap > 1, far, times_ratio(log_ratio, kl.where(gap <= 1, 0)))
        else:
            kl = times_ratio(log_ratio, kl)
        return kl, times_ratio(log_ratio, -gap)

    def kernel_arguments(self) -> dict[str, float | bool | str]:
        """The Triton kernels' arguments."""
        flags = {"CORRECTED": bool(self.bias_correction), "TO_OLD": self.against == "old"}
        return {"beta": float(self.beta), "KL": self.estimator, **flags}


def times_ratio(log_ratio: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """exp(log_ratio) * values, (n,). Adds exponents first where exp alone would leave the range; 0 stays 0."""
    ordinary = log_ratio.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp() * values
    extreme = values.sign() * (log_ratio + values.abs().log()).exp()
    impossible = (log_ratio == -float("inf")) | (values == 0)
    return torch.where(log_ratio.abs() < LARGEST_EXPONENT, ordinary, extreme.masked_fill(impossible, 0))


@dataclass(frozen=True)
class Entropy:
    """The entropy bonus, and which tokens to train on.

    coef: weight of the bonus, aggregated like the loss; 0, the default, is none.
    top_quantile: the share of this call's tokens, by highest entropy, that get a surrogate and a bonus (2506.01939). Below 1
        it needs two passes.
    """

    coef: float = 0.0
    top_quantile: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.coef, int | float):
            raise TypeError(f"entropy_coef must be a number, got {self.coef!r}")
        if not 0 <= self.coef < float("inf"):
            raise ValueError(f"entropy_coef must be >= 0 and finite, got {self.coef}")
        if not isinstance(self.top_quantile, int | float) or not 0 < self.top_quantile <= 1:
            raise ValueError(
                f"top_entropy_quantile must lie in (0, 1], the share of tokens that are kept, got {self.top_quantile!r}"
            )

    @property
    def wanted(self) -> bool:
        """Whether the loss reads the tokens' entropies."""
        return self.coef > 0 or self.top_quantile < 1


@dataclass(frozen=True)
class TokenObjective:
    """How log-probabilities become each token's loss and coefficient: surrogate, ACE, KL and the off-policy mask."""

    surrogate: Surrogate
    ace: Ace
    kl: KL
    importance_sampling_level: str = "token"
    off_policy_mask_threshold: float | None = None

    def __post_init__(self) -> None:
        choose("importance_sampling_level", self.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
        if self.off_policy_mask_threshold is not None:
            check_number("off_policy_mask_threshold", self.off_policy_mask_threshold, zero=True)

    @property
    def level(self) -> str:
        """Which log ratio the surrogate sees: the token's own, or its rollout's mean, sum, or mean of clipped ones."""
        return getattr(self.surrogate, "level", "") or self.importance_sampling_level  # a user's function has none

    @property
    def spreads(self) -> bool:
        """Whether the derivative by the rollout's log ratio is spread over its tokens."""
        return self.level == "geometric" or (self.level == "sequence" and not self.surrogate.by_logp)

    def weighs_current(self, has_old: bool) -> bool:
        """Whether ACE's weight depends on the current log-probabilities, not on the sampler's alone."""
        return self.ace.alpha > 0 and not (self.ace.confidence == "old" and has_old)

    def is_token_local(self, has_old: bool) -> bool:
        """Whether each token's coefficient depends on its own log-probability alone."""
        return not self.weighs_current(has_old) and self.level == "token" and self.off_policy_mask_threshold is None


@jit
def divergence_kernel(logp, old, ref, KL: tl.constexpr, CORRECTED: tl.constexpr):
    """The KL estimate and its derivative by logp for a block of tokens. On policy, `old` is logp."""
    gap = ref - logp
    if KL == "k1":
        kl, slope = -gap, tl.zeros_like(gap) + 1.0
    elif KL == "k2":
        kl, slope = 0.5 * gap * gap, -gap
    else:
        kl, slope = expm1(gap) - gap, -expm1(gap)
    if CORRECTED:
        log_ratio = logp - old
        if KL == "k3":
            far = tl.exp(ref - old) - times_ratio_kernel(log_ratio, gap + 1.0)
            kl = tl.where(gap > 1.0, far, times_ratio_kernel(log_ratio, tl.where(gap > 1.0, 0.0, kl)))
        else:
            kl = times_ratio_kernel(log_ratio, kl)
        slope = times_ratio_kernel(log_ratio, -gap)
    return kl, slope


@jit
def times_ratio_kernel(log_ratio, values):
    """exp(log_ratio) * values, see `times_ratio`."""
    ordinary = tl.exp(tl.minimum(tl.maximum(log_ratio, -60.0), 60.0)) * values
    size = tl.exp(log_ratio + tl.log(tl.abs(values)))
    extreme = tl.where((log_ratio == -float("inf")) | (values == 0), 0.0, tl.where(values < 0, -size, size))
    return tl.where(tl.abs(log_ratio) < 60.0, ordinary, extreme)


@jit
def weight_kernel(shift, alpha, SHAPE: tl.constexpr):
    """1 + alpha f(shift)."""
    if SHAPE == "softplus":
        return 1.0 + alpha * (tl.maximum(shift, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(shift))))
    return 1.0 + alpha * tl.maximum(shift, 0.0)
