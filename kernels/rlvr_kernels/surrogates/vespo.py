"""VESPO: -A sg[W^k exp(lambda (1 - W))] logp with W the product of the rollout's ratios."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlvr_kernels._triton import jit, tl
from rlvr_kernels.checks import check_number
from rlvr_kernels.surrogates.base import Bounds, Surrogate, SurrogateTerms, nowhere, slope_by_logp


@dataclass(frozen=True)
class Vespo(Surrogate):
    """-sg[W^k exp(lambda (1 - W))] A logp, W the product of the rollout's ratios (VESPO 2602.10693)."""

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0
    form: ClassVar[str] = "vespo"
    level: ClassVar[str] = "product"
    by_logp: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("k_positive", "lambda_positive", "k_negative", "lambda_negative"):
            check_number(name, getattr(self, name))

    @property
    def numbers(self) -> tuple[Bounds, Bounds]:
        """k and lambda."""
        return (self.k_positive, self.lambda_positive), (self.k_negative, self.lambda_negative)

    def loss(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        """The soft weight of the whole ratio, a constant, times the advantage and the log-probability."""
        (k, lam), w = self.by_sign(advantage), x.exp()
        return -(w**k * torch.exp(lam * (1 - w))).detach() * advantage * logp

    def terms(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> SurrogateTerms:
        """Both exponents are combined before exp."""
        x = x.masked_fill(advantage == 0, 0)
        k, lam = self.by_sign(advantage)
        return slope_by_logp(-advantage * torch.exp(k * x + lam * (1 - x.exp())), logp, *nowhere(x))


@jit
def vespo_kernel(x, logp, advantage, k, lam):
    """(loss, slope by logp, below, above) of a block of tokens."""
    ratio = tl.exp(x)
    slope = -advantage * tl.exp(k * x + lam * (1.0 - ratio))
    return tl.where(slope == 0, 0.0, slope * logp), slope, ratio < 0, ratio < 0
