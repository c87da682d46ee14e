"""SAPO: -A (4 / tau) sigmoid(tau (r - 1)), a soft gate instead of the clip."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlvr_kernels._triton import jit, tl
from rlvr_kernels.checks import check_number
from rlvr_kernels.surrogates.base import Bounds, Surrogate, SurrogateTerms, nowhere


@dataclass(frozen=True)
class Sapo(Surrogate):
    """-(4 / tau) sigmoid(tau (rho - 1)) A: a soft gate instead of the clip, tau by the sign of A (SAPO 2511.20347)."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    form: ClassVar[str] = "sapo"

    def __post_init__(self) -> None:
        check_number("tau_positive", self.tau_positive)
        check_number("tau_negative", self.tau_negative)

    @property
    def numbers(self) -> tuple[Bounds, Bounds]:
        """tau; the second number is not used."""
        return (self.tau_positive, 0.0), (self.tau_negative, 0.0)

    def loss(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        """The gate of the ratio."""
        tau, _ = self.by_sign(advantage)
        return -4 / tau * torch.sigmoid(tau * (x.exp() - 1)) * advantage

    def terms(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> SurrogateTerms:
        """sigmoid' = gate (1 - gate), the second factor computed without cancellation."""
        x = x.masked_fill(advantage == 0, 0)
        (tau, _), ratio = self.by_sign(advantage), x.exp()
        gate, closed = torch.sigmoid(tau * (ratio - 1)), torch.sigmoid(tau * (1 - ratio))
        slope = -4 * advantage * gate * closed * x.clamp(max=20).exp()  # `closed` is 0 long before x = 20
        return SurrogateTerms(-4 * advantage * gate / tau, slope, *nowhere(x))


@jit
def sapo_kernel(x, logp, advantage, tau, unused):
    """(loss, slope by x, below, above) of a block of tokens."""
    ratio = tl.exp(x)
    gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
    closed = 1.0 / (1.0 + tl.exp(tau * (ratio - 1.0)))
    slope = -4.0 * advantage * gate * closed * tl.exp(tl.minimum(x, 20.0))
    return -4.0 * advantage * gate / tau, slope, ratio < 0, ratio < 0
