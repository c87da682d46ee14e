"""GMPO: -A r with r the geometric mean of the rollout's clipped ratios."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlvr_kernels._triton import jit, tl
from rlvr_kernels.checks import check_number
from rlvr_kernels.surrogates.base import Bounds, Surrogate, SurrogateTerms, nowhere


@dataclass(frozen=True)
class Gmpo(Surrogate):
    """-exp(mean over tokens of the clipped log rho) A: the rollout's geometric mean (GMPO 2507.20673).

    A token's log ratio is clipped from above at epsilon_high where A > 0, from below at -epsilon_low where A < 0.
    """

    epsilon_low: float = 0.4
    epsilon_high: float = 0.4
    form: ClassVar[str] = "gmpo"
    level: ClassVar[str] = "geometric"

    def __post_init__(self) -> None:
        check_number("epsilon_low", self.epsilon_low)
        check_number("epsilon_high", self.epsilon_high)

    @property
    def numbers(self) -> tuple[Bounds, Bounds]:
        """The log ratio's bounds, one for either sign."""
        return (-math.inf, self.epsilon_high), (-self.epsilon_low, math.inf)

    def loss(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        """x is the mean of the clipped log ratios."""
        return -advantage * x.exp()

    def terms(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> SurrogateTerms:
        """The slope by x is the loss itself."""
        loss = -advantage * x.masked_fill(advantage == 0, 0).exp()
        return SurrogateTerms(loss, loss, *nowhere(x))


@jit
def gmpo_kernel(x, logp, advantage, a, b):
    """(loss, slope by x, below, above) of a block of tokens; x is the mean of log ratios clipped by `weigh`."""
    ratio = tl.exp(x)
    return -advantage * ratio, -advantage * ratio, ratio < 0, ratio < 0
