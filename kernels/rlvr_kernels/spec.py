"""PolicySpec: the numbers that say how log-probabilities become a loss. Validated once, shared by kernels and twins."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

SHAPES = ("softplus", "relu")
CONFIDENCES = ("current", "old")
REDUCTIONS = ("mean", "sum")
KL_ESTIMATORS = ("k1", "k2", "k3")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")
FORMS = ("clip", "weight", "sapo", "vespo", "gmpo")
OWN_LEVEL = {"vespo": "product", "gmpo": "geometric"}


def choose(argument: str, given: object, known: Iterable[str]) -> None:
    """Raise a ValueError that names the argument, what came, what is known and the nearest name, unless `given` is known."""
    known = tuple(known)
    if given in known:
        return
    near = difflib.get_close_matches(str(given).lower().replace("-", "_"), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {given!r}{hint}")


@dataclass(frozen=True)
class Surrogate:
    """How an importance ratio and an advantage become a loss: a form, and two numbers for either sign of the advantage.

    The forms are written out in `rlvr_kernels.surrogate`. The numbers are the ratio's lower and upper bound for clip
    and weight, the log ratio's for gmpo, tau (and nothing) for sapo, and k and lambda for vespo. `rlvr_ops.surrogates`
    makes the published ones.

    Raises:
        ValueError: the form is unknown, or a number is NaN.
    """

    form: str
    positive: tuple[float, float]
    negative: tuple[float, float]

    def __post_init__(self) -> None:
        choose("form", self.form, FORMS)
        if any(math.isnan(number) for number in (*self.positive, *self.negative)):
            raise ValueError(f"the numbers of a surrogate must not be NaN, got {self.positive} and {self.negative}")
        bounded = self.form in ("clip", "weight", "gmpo")
        if bounded and not (self.positive[0] <= self.positive[1] and self.negative[0] <= self.negative[1]):
            raise ValueError(f"bounds must be (lower, upper), got {self.positive} and {self.negative}")


PPO_CLIP = Surrogate("clip", positive=(0.0, 1.2), negative=(0.8, math.inf))


@dataclass(frozen=True)
class PolicySpec:
    """A surrogate with an asymmetric, confidence-aware weight, a mask of stale rollouts and a KL penalty.

    The names and the formulas are those of `rlvr_ops.policy_loss`.

    Raises:
        TypeError: a number is none.
        ValueError: a number is outside its range, a name is unknown, or a combination makes no sense.
    """

    surrogate: Surrogate  # no default: torch 2.11's compiler does not trace a field's default of such a type
    importance_sampling_level: str = "token"
    off_policy_mask_threshold: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = False
    alpha: float = 0.0
    shape: str = "softplus"
    confidence: str = "current"
    confidence_reduction: str = "mean"

    def __post_init__(self) -> None:
        threshold = 0.0 if self.off_policy_mask_threshold is None else self.off_policy_mask_threshold
        for name, value in (("alpha", self.alpha), ("beta", self.beta), ("off_policy_mask_threshold", threshold)):
            if not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        choose("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        choose("shape", self.shape, SHAPES)
        choose("confidence", self.confidence, CONFIDENCES)
        choose("confidence_reduction", self.confidence_reduction, REDUCTIONS)
        choose("importance_sampling_level", self.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
        self._check_level()

    def _check_level(self) -> None:
        form, level = self.surrogate.form, self.importance_sampling_level
        if form in OWN_LEVEL and level != "token":
            raise ValueError(
                f"importance_sampling_level={level!r} does not go with surrogate {form}, which has a ratio of its own for the "
                "whole rollout: leave it at 'token'"
            )
        numbers = (*self.surrogate.positive, *self.surrogate.negative)
        if form == "weight" and level != "token" and len(set(numbers)) == 1:
            raise ValueError(
                f"importance_sampling_level={level!r} does not go with a surrogate whose weight is {numbers[0]:g} whatever the "
                "ratio (reinforce): leave it at 'token'"
            )
        if form == "weight" and level == "sequence_token":
            raise ValueError(
                "importance_sampling_level='sequence_token' does not go with a surrogate whose ratio is a constant to the "
                "gradient (cispo, dispo, reinforce): 'sequence' is the same there"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probabilities."""
        return self.alpha > 0 or self.beta > 0

    @property
    def level(self) -> str:
        """Whose log ratio the surrogate sees: the token's own, or its rollout's mean, sum or mean of clipped ones."""
        return OWN_LEVEL.get(self.surrogate.form, self.importance_sampling_level)

    @property
    def spreads(self) -> bool:
        """Whether the derivative by the rollout's log ratio is spread over its tokens."""
        return self.level == "geometric" or (self.level == "sequence" and self.surrogate.form != "weight")

    def is_token_local(self, has_old: bool) -> bool:
        """Whether a row's coefficient needs no other row's log-probability under the current policy."""
        known_weight = self.alpha == 0 or (self.confidence == "old" and has_old)
        return known_weight and self.level == "token" and self.off_policy_mask_threshold is None
