"""Clip-Cov and KL-Cov: hold back the few tokens that cost the policy most of its entropy (arXiv 2505.22617).

A token's covariance is (A - mean A) (logp - mean logp), the means over this call's tokens: large where a likely token is
rewarded, or an unlikely one punished. The paper derives that entropy falls with it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from rlvr_kernels.checks import check_number
from rlvr_kernels.surrogates import Clip
from torch import Tensor

if TYPE_CHECKING:
    from rlvr_ops.objectives.custom import SurrogateRows


@dataclass(frozen=True)
class ClipCov:
    """PPO's clip without a share of the tokens, drawn from those of covariance between `low` and `high`.

    share: how many tokens are left out, of all in the call, at least one. They are drawn uniformly from the candidates, of which
        PPO's clip takes its own out first.
    epsilon_low, epsilon_high: PPO's clip; epsilon_high=None means epsilon_low.
    seed: of the draw, which depends on it and on the number of tokens alone. Give another one in each step.

    Formula and numbers are those of the paper's code and of verl 0.9.1 (clip_cov).
    """

    share: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    seed: int = 0
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("share", self.share)
        if not self.low < self.high:
            raise ValueError(f"low must be below high = {self.high}, got {self.low}")
        Clip(self.epsilon_low, self.epsilon_high)

    def __call__(self, per_token_logps: Tensor, rows: "SurrogateRows") -> Tensor:
        """Each token's loss (n,)."""
        logp, old, advantages = per_token_logps.detach(), rows.old_per_token_logps, rows.advantages
        clip = Clip(self.epsilon_low, self.epsilon_high)
        below, above = clip.outside(torch.where(advantages == 0, 0, logp - old), logp, advantages)
        found = covariance(logp, advantages)
        candidates = (found > self.low) & (found < self.high) & ~(below | above)
        generator = torch.Generator(logp.device).manual_seed(self.seed)
        order = torch.rand(logp.shape, generator=generator, device=logp.device).masked_fill(~candidates, -1)
        left_out = among_largest(order, self.share) & candidates
        return clip.of_tokens(per_token_logps, old, advantages).masked_fill(left_out, 0)


@dataclass(frozen=True)
class KLCov:
    """-A rho, with a penalty of coef |logp - old| on the share of tokens with the largest covariance.

    share: how many tokens are held back, of all in the call, at least one. The authors' script for 32 billion parameters has
        2e-4, that for 7 billion 2e-3.
    coef: the penalty's weight.

    There is no clip. On policy the penalty has no gradient. Formula and numbers are those of the paper's code and of verl 0.9.1
    (kl_cov).
    """

    share: float = 2e-4
    coef: float = 1.0
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("share", self.share)
        check_number("coef", self.coef)

    def __call__(self, per_token_logps: Tensor, rows: "SurrogateRows") -> Tensor:
        """Each token's loss (n,)."""
        x = per_token_logps - rows.old_per_token_logps
        held = among_largest(covariance(per_token_logps.detach(), rows.advantages), self.share)
        ratio = x.masked_fill(rows.advantages == 0, 0).exp()  # 0 * inf would be NaN
        return torch.where(held, self.coef * x.abs(), 0) - rows.advantages * ratio


def covariance(logp: Tensor, advantages: Tensor) -> Tensor:
    """(A - mean A) (logp - mean logp) of n tokens, (n,)."""
    return (advantages - advantages.mean()) * (logp - logp.mean())


def among_largest(values: Tensor, share: float) -> Tensor:
    """Which of the values (n,) are among the share * n largest, rounded down, of which there is at least one."""
    count = min(max(int(share * values.shape[0]), 1), values.shape[0])
    return torch.zeros_like(values, dtype=torch.bool).index_fill_(0, values.topk(count).indices, True)
