"""The surrogates: from the log of an importance ratio and an advantage to a token's loss and its slope.

With r = exp(x) and two numbers (a, b) that depend on the sign of A:

    clip     -A clip(r, a, b)                        PPO, GRPO, DAPO; GSPO at the level of rollouts
    sapo     -A (4 / a) sigmoid(a (r - 1))
    gmpo     -A r                                    a, b clip each token's log ratio before the mean is taken
    weight   -A sg[clip(r, a, b)] logp               CISPO, DISPO; REINFORCE with a = b = 1
    vespo    -A sg[r^a exp(b (1 - r))] logp

The slope is the derivative by x in the first three, by logp in the last two. For A > 0, PPO's min(r A, clip(r) A) is
A clip(r, 0, 1 + epsilon_high), and for A < 0 it is A clip(r, 1 - epsilon_low, delta): one clip, other bounds.
Sources: 2402.03300 (GRPO), 2503.14476 (clip-higher), 2505.07291 (delta), 2507.18071 (GSPO), 2511.20347 (SAPO),
2507.20673 (GMPO), 2506.13585 (CISPO), 2602.00983 (DISPO), 2602.10693 (VESPO).
"""

from typing import NamedTuple

import torch

from rlvr_kernels._triton import jit, tl
from rlvr_kernels.spec import Surrogate


class SurrogateTerms(NamedTuple):
    """A token's loss and slope, and where the ratio was below or above its bounds, all (n,)."""

    loss: torch.Tensor
    slope: torch.Tensor
    below: torch.Tensor
    above: torch.Tensor


def numbers(surrogate: Surrogate, advantage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two numbers (a, b) that go with the sign of each advantage (n,)."""
    right, scalar = advantage > 0, advantage.new_tensor  # torch.where of two floats would round them to float32
    pairs = zip(surrogate.positive, surrogate.negative, strict=True)
    a, b = (torch.where(right, scalar(p), scalar(n)) for p, n in pairs)
    return a, b


def surrogate_terms(
    x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor, surrogate: Surrogate
) -> SurrogateTerms:
    """The PyTorch twin of `surrogate_kernel`."""
    # Without an advantage the ratio counts for nothing, and where exp overflows 0 * inf must not say otherwise.
    x = x.masked_fill(advantage == 0, 0)
    a, b = numbers(surrogate, advantage)
    ratio = x.exp()
    clipped = ratio.clamp(a, b)
    bounded = a < b if surrogate.form in ("clip", "weight") else x != x  # no ratio is outside of REINFORCE's (1, 1)
    below, above = (ratio < a) & bounded, (ratio > b) & bounded
    match surrogate.form:
        case "clip":
            return SurrogateTerms(-advantage * clipped, torch.where(below | above, 0, -advantage * ratio), below, above)
        case "sapo":
            gate = torch.sigmoid(a * (ratio - 1))
            closed = torch.sigmoid(a * (1 - ratio))  # 1 - gate, which would cancel
            slope = -4 * advantage * gate * closed * x.clamp(max=20).exp()  # closed is 0 long before that
            return SurrogateTerms(-4 * advantage * gate / a, slope, below, above)
        case "gmpo":
            return SurrogateTerms(-advantage * ratio, -advantage * ratio, below, above)
        case "weight":
            slope = -advantage * clipped
        case "vespo":
            slope = -advantage * torch.exp(a * x + b * (1 - ratio))
    return SurrogateTerms(torch.where(slope == 0, 0, slope * logp), slope, below, above)


@jit
def surrogate_kernel(x, logp, advantage, a, b, FORM: tl.constexpr):
    """(loss, slope, below, above) of a block of tokens; a and b are those of each advantage's sign."""
    x = tl.where(advantage == 0, 0.0, x)  # 0 * inf would be NaN
    ratio = tl.exp(x)
    clipped = tl.minimum(tl.maximum(ratio, a), b)
    below = ratio < 0  # nowhere
    above = below
    if FORM == "clip":
        below = ratio < a
        above = ratio > b
    elif FORM == "weight":
        below = (ratio < a) & (a < b)  # no ratio is outside of REINFORCE's (1, 1)
        above = (ratio > b) & (a < b)
    if FORM == "clip":
        loss = -advantage * clipped
        slope = tl.where(below | above, 0.0, -advantage * ratio)
    elif FORM == "sapo":
        gate = 1.0 / (1.0 + tl.exp(-a * (ratio - 1.0)))
        loss = -4.0 * advantage * gate / a
        closed = 1.0 / (1.0 + tl.exp(a * (ratio - 1.0)))
        slope = -4.0 * advantage * gate * closed * tl.exp(tl.minimum(x, 20.0))
    elif FORM == "gmpo":
        loss = -advantage * ratio
        slope = -advantage * ratio
    elif FORM == "weight":
        slope = -advantage * clipped
        loss = tl.where(slope == 0, 0.0, slope * logp)
    else:  # vespo
        slope = -advantage * tl.exp(a * x + b * (1.0 - ratio))
        loss = tl.where(slope == 0, 0.0, slope * logp)
    return loss, slope, below, above
