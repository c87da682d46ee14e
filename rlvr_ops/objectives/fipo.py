"""FIPO: PPO's clip, each token weighted by how the tokens after it have moved since they were sampled (arXiv 2603.19835)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rlvr_kernels.checks import check_number
from rlvr_kernels.surrogates import Clip
from torch import Tensor

if TYPE_CHECKING:
    from rlvr_ops.objectives.custom import SurrogateRows


@dataclass(frozen=True)
class Fipo:
    """PPO's clip times sg[clip(exp(F_t), *influence)], F_t = sum over k >= t of 2^(-(k - t) / half_life) (logp_k - old_k).

    epsilon_low, epsilon_high, delta: PPO's clip, as in `Clip`. A token whose ratio is above delta adds nothing to any F, nor does
        one whose log ratio is not finite.
    half_life: after so many tokens a token counts half.
    influence: bounds of the weight. ms-swift takes (1.0, 1.2) by default, and (0.8, 1.2) with fipo_clip_high_only=False.
    safe_ratio: where A < 0 and the ratio is above it, the weight also stays within (0.8, 1.0). None: nowhere.

    Formula and numbers from ms-swift 4.6.0 (loss_type="fipo"), which recommends delta=10; the paper's own text was not read.
    """

    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    half_life: float = 32.0
    influence: tuple[float, float] = (1.0, 1.2)
    safe_ratio: float | None = 4.0

    def __post_init__(self) -> None:
        Clip(self.epsilon_low, self.epsilon_high, self.delta)
        check_number("half_life", self.half_life)
        bounds = tuple(self.influence) if isinstance(self.influence, tuple | list) else (self.influence,)
        object.__setattr__(self, "influence", bounds)
        if not all(isinstance(x, int | float) for x in bounds) or len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
            raise ValueError(f"influence must be (low, high) with 0 <= low <= high, got {self.influence}")
        if self.safe_ratio is not None:
            check_number("safe_ratio", self.safe_ratio)

    def __call__(self, per_token_logps: Tensor, rows: "SurrogateRows") -> Tensor:
        """Each token's loss (n,)."""
        old, advantages = rows.old_per_token_logps, rows.advantages
        moved = per_token_logps.detach() - old
        left_out = ~moved.isfinite() | (moved > math.log(self.delta or math.inf))
        shift = moved.masked_fill(left_out, 0)
        weight = discounted_future(shift, rows.rollout, 2 ** (-1 / self.half_life)).exp().clamp(*self.influence)
        if self.safe_ratio is not None:
            extreme = (advantages < 0) & (moved > math.log(self.safe_ratio))
            weight = torch.where(extreme, weight.clamp(0.8, 1.0), weight)
        clip = Clip(self.epsilon_low, self.epsilon_high, self.delta)
        return weight * clip.of_tokens(per_token_logps, old, advantages)


def discounted_future(values: Tensor, rollout: Tensor, gamma: float) -> Tensor:
    """sum over k >= t in t's rollout of gamma^(k - t) values_k, (n,). Twice as many terms per step, in log2(n) steps."""
    step, total = 1, values
    while step < values.shape[0]:
        together = rollout[:-step] == rollout[step:]
        later = torch.where(together, gamma**step * total[step:], 0)
        total = torch.cat([total[:-step] + later, total[-step:]])
        step *= 2
    return total
