"""DPPO and IPO: -A sg[M min(r, ratio_max)] logp, a trust region on the token's probability and not on its ratio.

M is 0 where the token has moved away from the sampler by more than a threshold: in the direction of its advantage (DPPO, arXiv
2602.04879), or in either (IPO). With p the policy's probability of the token and q the sampler's, the distance is

    tv    |q - p|
    kl    q log(q / p) + (1 - q) log((1 - q) / (1 - p))

the binary forms (equations 12 to 14), lower bounds of the distributions' own. The ratio clip of PPO lets a rare token move by a
billionth and stops it there; this lets it move, and stops a likely one.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlvr_kernels._triton import expm1, jit, tl
from rlvr_kernels.checks import check_number, choose
from rlvr_kernels.surrogates.base import Bounds, Surrogate, SurrogateTerms, slope_by_logp

THRESHOLDS = {"tv": 0.15, "kl": 0.05}
SMALLEST = 1e-8  # added to 1 - p, as verl does, so that a certain token has a logarithm


class TrustRegion(Surrogate):
    """-A sg[M min(rho, ratio_max)] logp."""

    divergence: str
    symmetric: ClassVar[bool] = False  # whether M also leaves out a token that moved against its advantage
    by_logp: ClassVar[bool] = True

    @property
    def form(self) -> str:  # type: ignore[override]
        """The Triton branch."""
        return f"{'ipo' if self.symmetric else 'dppo'}_{self.divergence}"

    def distance(self, x: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
        """How far the policy's probability (n,) of each token is from the sampler's, log q = logp - x."""
        old = logp - x
        if self.divergence == "tv":
            return (old.exp() - logp.exp()).abs()
        others = (SMALLEST - old.expm1()).log() - (SMALLEST - logp.expm1()).log()
        return -old.exp() * x - old.expm1() * others

    def outside(
        self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that M leaves out: those that became too unlikely, and those that became too likely."""
        (threshold, _), _ = self.numbers
        far = self.distance(x, logp) > threshold
        below, above = far & (x < 0), far & (x > 0)
        return (below, above) if self.symmetric else (below & (advantage < 0), above & (advantage > 0))

    def loss(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        """The masked, bounded ratio, a constant, times the advantage and the log-probability."""
        below, above = self.outside(x.detach(), logp.detach(), advantage)
        kept = (~(below | above)).to(logp.dtype)
        return -(kept * x.exp().clamp(max=self.numbers[0][1])).detach() * advantage * logp

    def terms(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> SurrogateTerms:
        """The slope is by logp."""
        x = x.masked_fill(advantage == 0, 0)  # where exp overflows, 0 * inf must not be NaN
        below, above = self.outside(x, logp, advantage)
        slope = torch.where(below | above, 0, -advantage * x.exp().clamp(max=self.numbers[0][1]))
        return slope_by_logp(slope, logp, below, above)


@dataclass(frozen=True)
class Dppo(TrustRegion):
    """-A sg[M min(rho, ratio_max)] logp; M = 0 where (A > 0 and rho > 1, or A < 0 and rho < 1) and the distance > threshold.

    divergence: "tv" or "kl". threshold: None means 0.15 for tv and 0.05 for kl, those of the paper's stability study.
    ratio_max: None, no bound, is the paper's method; its scaling runs use 5, verl's default is 3.

    rho and the distance are taken against `old_per_token_logps`. Give the sampling engine's log-probabilities there: the paper
    found that a recomputed old policy makes training collapse. Formula and thresholds are from the paper's text, and agree with
    verl 0.9.1 (dppo_tv, dppo_kl). The top-K form needs more than a token's own log-probabilities and is not here.
    """

    divergence: str = "tv"
    threshold: float | None = None
    ratio_max: float | None = None
    token_only: ClassVar[str] = "whose trust region is each token's own (dppo)"

    def __post_init__(self) -> None:
        choose("divergence", self.divergence, THRESHOLDS)
        if self.threshold is not None:
            check_number("threshold", self.threshold)
        if self.ratio_max is not None:
            check_number("ratio_max", self.ratio_max)

    @property
    def numbers(self) -> tuple[Bounds, Bounds]:
        """The threshold and the ratio's bound, the same for either sign."""
        threshold = THRESHOLDS[self.divergence] if self.threshold is None else self.threshold
        numbers = threshold, math.inf if self.ratio_max is None else self.ratio_max
        return numbers, numbers


@dataclass(frozen=True)
class Ipo(TrustRegion):
    """-A sg[M rho] logp; M = 0 where |q - p| > threshold, whichever way the token moved: prime-rl's `ipo` loss.

    rho and the distance are taken against `old_per_token_logps`: give the sampling engine's log-probabilities there. prime-rl
    adds 0.001 (logp - old)^2, which is beta=0.002 with kl_estimator="k2" and kl_against="old". Formula and numbers are from its
    code; no paper is named there.
    """

    threshold: float = 0.1
    divergence: ClassVar[str] = "tv"  # type: ignore[misc]
    symmetric: ClassVar[bool] = True
    token_only: ClassVar[str] = "whose trust region is each token's own (ipo)"

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)

    @property
    def numbers(self) -> tuple[Bounds, Bounds]:
        """The threshold and no bound on the ratio, the same for either sign."""
        return ((self.threshold, math.inf),) * 2


@jit
def dppo_kernel(x, logp, advantage, threshold, ratio_max, KL: tl.constexpr, SYMMETRIC: tl.constexpr):
    """(loss, slope by logp, below, above) of a block of tokens."""
    old = logp - x
    if KL:
        others = tl.log(1e-8 - expm1(old)) - tl.log(1e-8 - expm1(logp))
        distance = -tl.exp(old) * x - expm1(old) * others
    else:
        distance = tl.abs(tl.exp(old) - tl.exp(logp))
    below = (distance > threshold) & (x < 0)
    above = (distance > threshold) & (x > 0)
    if not SYMMETRIC:
        below = below & (advantage < 0)
        above = above & (advantage > 0)
    slope = tl.where(below | above, 0.0, -advantage * tl.minimum(tl.exp(x), ratio_max))
    return tl.where(slope == 0, 0.0, slope * logp), slope, below, above
