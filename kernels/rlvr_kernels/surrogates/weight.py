"""CISPO and its kin: -A sg[clip(r, a, b)] logp. No token loses its gradient; REINFORCE has a = b = 1."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlvr_kernels._triton import jit, tl
from rlvr_kernels.checks import check_number
from rlvr_kernels.surrogates.base import Bounds, Surrogate, SurrogateTerms, slope_by_logp


class Weighted(Surrogate):
    """-A sg[clip(rho, a, b)] logp: a clipped ratio that is a constant to the gradient."""

    form: ClassVar[str] = "weight"
    by_logp: ClassVar[bool] = True

    def loss(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        """The clipped ratio, a constant, times the advantage and the log-probability."""
        return -x.exp().clamp(*self.by_sign(advantage)).detach() * advantage * logp

    def terms(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> SurrogateTerms:
        """The slope is the derivative by logp."""
        x = x.masked_fill(advantage == 0, 0)  # where exp overflows, 0 * inf must not be NaN
        clipped = x.exp().clamp(*self.by_sign(advantage))
        return slope_by_logp(-advantage * clipped, logp, *self.outside(x, logp, advantage))


@dataclass(frozen=True)
class Cispo(Weighted):
    """-sg[min(rho, ratio_max)] A logp: CISPO with an upper bound alone (2506.13585), TRL's convention."""

    ratio_max: float = 5.0

    def __post_init__(self) -> None:
        check_number("ratio_max", self.ratio_max)

    @property
    def numbers(self) -> tuple[Bounds, Bounds]:
        """One bound for either sign."""
        return (0.0, self.ratio_max), (0.0, self.ratio_max)


@dataclass(frozen=True)
class CispoTwoSided(Weighted):
    """-sg[clip(rho, 1 - epsilon_low, 1 + epsilon_high)] A logp: CISPO (2506.13585), verl's convention."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2

    def __post_init__(self) -> None:
        check_number("epsilon_low", self.epsilon_low)
        check_number("epsilon_high", self.epsilon_high)

    @property
    def numbers(self) -> tuple[Bounds, Bounds]:
        """The same bounds for either sign."""
        bounds = _around_one((self.epsilon_low, self.epsilon_high))
        return bounds, bounds


@dataclass(frozen=True)
class Dispo(Weighted):
    """-sg[clip(rho, 1 - low, 1 + high)] A logp with (low, high) = `positive` where A > 0, `negative` elsewhere (2602.00983).

    The formula is from a reading note of the paper. The default numbers are not verified.
    """

    positive: Bounds = (0.2, 10.0)
    negative: Bounds = (1.0, 100.0)

    def __post_init__(self) -> None:
        for name, bounds in (("positive", self.positive), ("negative", self.negative)):
            pair = isinstance(bounds, tuple | list) and len(bounds) == 2
            if not pair or not all(isinstance(e, int | float) and 0 <= e < math.inf for e in bounds):
                raise ValueError(f"{name} must be (low, high), both >= 0 and finite, got {bounds}")
            object.__setattr__(self, name, (bounds[0], bounds[1]))

    @property
    def numbers(self) -> tuple[Bounds, Bounds]:
        """Separate bounds for right and wrong tokens."""
        return _around_one(self.positive), _around_one(self.negative)


@dataclass(frozen=True)
class Reinforce(Weighted):
    """-A logp: no importance ratio at all."""

    token_only: ClassVar[str] = "whose weight is 1 whatever the ratio (reinforce)"

    @property
    def numbers(self) -> tuple[Bounds, Bounds]:
        """A ratio of 1."""
        return (1.0, 1.0), (1.0, 1.0)


def _around_one(bounds: Bounds) -> Bounds:
    low, high = bounds
    return max(1.0 - low, 0.0), 1.0 + high


@jit
def weight_kernel(x, logp, advantage, a, b):
    """(loss, slope by logp, below, above) of a block of tokens."""
    ratio = tl.exp(x)
    below = (ratio < a) & (a < b)  # no ratio is outside REINFORCE's (1, 1)
    above = (ratio > b) & (a < b)
    slope = -advantage * tl.minimum(tl.maximum(ratio, a), b)
    return tl.where(slope == 0, 0.0, slope * logp), slope, below, above
