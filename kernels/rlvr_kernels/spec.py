"""PolicySpec: the numbers that say how log-probabilities become a loss. Validated once, shared by kernels and twins."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

SHAPES = ("softplus", "relu")
CONFIDENCES = ("current", "old")
REDUCTIONS = ("mean", "sum")
KL_ESTIMATORS = ("k1", "k2", "k3")


def choose(argument: str, given: object, known: Iterable[str]) -> None:
    """Raise a ValueError that names the argument, what came, what is known and the nearest name, unless `given` is known."""
    known = tuple(known)
    if given in known:
        return
    near = difflib.get_close_matches(str(given).lower().replace("-", "_"), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {given!r}{hint}")


@dataclass(frozen=True)
class PolicySpec:
    """A clipped surrogate with an asymmetric, confidence-aware weight and a KL penalty.

    The names and the formulas are those of `rlvr_ops.policy_loss`.

    Raises:
        ValueError: a number is outside its range, or a name is unknown.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    alpha: float = 0.0
    shape: str = "softplus"
    confidence: str = "current"
    confidence_reduction: str = "mean"

    def __post_init__(self) -> None:
        for name in ("epsilon_low", "epsilon_high", "delta", "alpha", "beta"):
            if not isinstance(getattr(self, name), int | float) and (name, self.delta) != ("delta", None):
                raise TypeError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("epsilon_low", "epsilon_high"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        if self.epsilon_low > 1:
            raise ValueError(f"epsilon_low must be <= 1, since a ratio is never negative, got {self.epsilon_low}")
        if self.delta is not None and not 1 + self.epsilon_high < self.delta < math.inf:
            raise ValueError(f"delta must be > 1 + epsilon_high = {1 + self.epsilon_high:g} or None, got {self.delta}")
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        choose("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        choose("shape", self.shape, SHAPES)
        choose("confidence", self.confidence, CONFIDENCES)
        choose("confidence_reduction", self.confidence_reduction, REDUCTIONS)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probabilities."""
        return self.alpha > 0 or self.beta > 0
