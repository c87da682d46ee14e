"""PPO's clip: -A clip(r, a, b). For A > 0 the bounds are (0, 1 + epsilon_high), for A < 0 (1 - epsilon_low, delta)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlvr_kernels._triton import jit, tl
from rlvr_kernels.checks import check_number
from rlvr_kernels.surrogates.base import Bounds, Surrogate, SurrogateTerms


@dataclass(frozen=True)
class Clip(Surrogate):
    """-min(min(rho, delta) A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A) (GRPO 2402.03300, DAPO 2503.14476).

    epsilon_high=None means epsilon_low. delta, above 1 + epsilon_high, bounds the ratio of wrong tokens (2505.07291);
    verl's dual clip with the constant c is delta=c.
    """

    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    form: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        check_number("epsilon_low", self.epsilon_low)
        if self.epsilon_high is not None:
            check_number("epsilon_high", self.epsilon_high)
        if self.epsilon_low > 1:
            raise ValueError(f"epsilon_low must be <= 1, since a ratio is never negative, got {self.epsilon_low}")
        if self.delta is not None:
            if not isinstance(self.delta, int | float):
                raise TypeError(f"delta must be a number, got {self.delta!r}")
            if not self.high < self.delta < math.inf:
                raise ValueError(f"delta must be > 1 + epsilon_high = {self.high:g} or None, got {self.delta}")

    @property
    def high(self) -> float:
        """The ratio's upper bound, 1 + epsilon_high."""
        return 1 + (self.epsilon_low if self.epsilon_high is None else self.epsilon_high)

    @property
    def numbers(self) -> tuple[Bounds, Bounds]:
        """For A > 0 the minimum is A clip(r, 0, high), for A < 0 it is A clip(r, low, delta)."""
        return (0.0, self.high), (1 - self.epsilon_low, math.inf if self.delta is None else self.delta)

    def loss(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        """PPO's minimum of the ratio and the clipped ratio."""
        ratio = x.exp()
        clipped = ratio.clamp(1 - self.epsilon_low, self.high)
        return -torch.min(ratio.clamp(max=self.delta or math.inf) * advantage, clipped * advantage)

    def terms(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> SurrogateTerms:
        """One clip, with bounds by the sign of A; the slope outside them is 0."""
        x = x.masked_fill(advantage == 0, 0)  # where exp overflows, 0 * inf must not be NaN
        (a, b), ratio = self.by_sign(advantage), x.exp()
        below, above = ratio < a, ratio > b
        slope = torch.where(below | above, 0, -advantage * ratio)
        return SurrogateTerms(-advantage * ratio.clamp(a, b), slope, below, above)


@jit
def clip_kernel(x, logp, advantage, a, b):
    """(loss, slope by x, below, above) of a block of tokens."""
    ratio = tl.exp(x)
    below = ratio < a
    above = ratio > b
    loss = -advantage * tl.minimum(tl.maximum(ratio, a), b)
    return loss, tl.where(below | above, 0.0, -advantage * ratio), below, above
