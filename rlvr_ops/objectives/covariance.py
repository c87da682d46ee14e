"""Clip-Cov and KL-Cov: hold back the few tokens that cost the policy most of its entropy (arXiv 2505.22617).

A token's covariance is (A - mean A) (logp - mean logp), the means over this call's tokens: large where a likely token is
rewarded, or an unlikely one punished. The paper derives that entropy falls with it. A token of probability 0 is in neither
mean and has no covariance.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from rlvr_kernels.checks import check_number
from rlvr_kernels.surrogates import Clip
from torch import Tensor

if TYPE_CHECKING:
    from rlvr_ops.objectives.custom import SurrogateRows


HASH = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as a signed number: neighbours get far apart


@dataclass(frozen=True)
class ClipCov:
    """PPO's clip without a share of the tokens, drawn from those of covariance between `low` and `high`.

    share: how many tokens are left out, of all in the call, at least one. They are drawn uniformly from the candidates, of which
        PPO's clip takes its own out first.
    epsilon_low, epsilon_high: PPO's clip; epsilon_high=None means epsilon_low.
    seed: of the draw, which also depends on old_per_token_logps: other rollouts get another draw, the same ones the same.

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
        _check_share(self.share)
        for name in ("low", "high"):
            if not isinstance(getattr(self, name), int | float):
                raise TypeError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {self.seed!r}")
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
        order = drawn(self.seed, old).masked_fill(~candidates, -1)
        left_out = among_largest(order, self.share) & candidates
        return clip.of_tokens(per_token_logps, old, advantages).masked_fill(left_out, 0)


@dataclass(frozen=True)
class KLCov:
    """-A rho, with a penalty of coef |logp - old| on the share of tokens with the largest covariance.

    share: how many tokens are held back, of all in the call, at least one. The authors' script for 32 billion parameters has
        2e-4, that for 7 billion 2e-3.
    coef: the penalty's weight.

    There is no clip. On policy the penalty has no gradient. A token without an advantage, or whose advantage a mask or a sampling
    correction has set to 0, is never held back. Formula and numbers are those of the paper's code and of verl 0.9.1
    (kl_cov).
    """

    share: float = 2e-4
    coef: float = 1.0
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share(self.share)
        check_number("coef", self.coef)

    def __call__(self, per_token_logps: Tensor, rows: "SurrogateRows") -> Tensor:
        """Each token's loss (n,)."""
        advantages, nothing = rows.advantages, rows.advantages == 0
        x = (per_token_logps - rows.old_per_token_logps).masked_fill(nothing, 0)  # 0 * inf would be NaN
        found = covariance(per_token_logps.detach(), advantages).masked_fill(nothing, -math.inf)
        held = among_largest(found, self.share) & (found > -math.inf)
        return torch.where(held, self.coef * x.abs(), 0) - advantages * x.exp()


def covariance(logp: Tensor, advantages: Tensor) -> Tensor:
    """(A - mean A) (logp - mean logp) of n tokens, (n,); -inf, and in neither mean, where logp is not finite."""
    finite = logp.isfinite()
    count = finite.sum().clamp(min=1)
    a, b = (x - x.masked_fill(~finite, 0).sum() / count for x in (advantages, logp))
    return (a * b).masked_fill(~finite, -math.inf)


def drawn(seed: int, values: Tensor) -> Tensor:
    """A number in [0, 1) for each value (n,), from the seed, its place and its bits: the same today and tomorrow."""
    generator = torch.Generator(values.device).manual_seed(seed)
    by_place = torch.rand(values.shape, generator=generator, device=values.device)
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).long()
    hashed = (bits * HASH >> 40) & 0xFFFFFF
    return (by_place + hashed / 2**24) % 1


def among_largest(values: Tensor, share: float) -> Tensor:
    """Which of the values (n,) are among the share * n largest, rounded down, of which there is at least one."""
    count = min(max(int(share * values.shape[0]), 1), values.shape[0])
    return torch.zeros_like(values, dtype=torch.bool).index_fill_(0, values.topk(count).indices, True)


def _check_share(share: float) -> None:
    check_number("share", share)
    if share > 1:
        raise ValueError(f"share must be at most 1, the share of all tokens, got {share}")
