"""Sampling correction: the engine that samples a rollout seldom agrees to the last bit with the one that trains.

    w_t = exp(old_t - sampling_t), or the product of those over the rollout

is a constant that multiplies the surrogate, not the KL term. Truncation clamps it to clip_min and clip_max. Masking sets it
to 0 outside of them. Sources: truncated importance sampling as in TRL and verl; masking as in IcePop 2510.18855.
"""

import math
from dataclasses import dataclass

import torch
from rlvr_kernels.checks import choose
from torch import Tensor

from rlvr_ops.rollouts import Layout

CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SMALLEST = 1e-10  # added to a weight before its logarithm: a weight may be 0


@dataclass(frozen=True)
class SamplingCorrection:
    """Which weights to use, and their bounds; None means no bound.

    Raises:
        ValueError: an unknown name, or bounds that allow no weight.
    """

    kind: str
    clip_max: float | None = 3.0
    clip_min: float | None = None

    def __post_init__(self) -> None:
        choose("sampling_correction", self.kind, CORRECTIONS)
        for name, value in (("sampling_clip_max", self.clip_max), ("sampling_clip_min", self.clip_min)):
            if not isinstance(value, int | float | None):
                raise TypeError(f"{name} must be a number, or None for no bound, got {value!r}")
        low, high = self.bounds
        if not high > 0:
            raise ValueError(f"sampling_clip_max must be > 0, got {self.clip_max}")
        if not 0 <= low <= high:
            raise ValueError(
                f"sampling_clip_min must lie between 0 and sampling_clip_max = {high}, got {self.clip_min}"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest weight."""
        return (
            0.0 if self.clip_min is None else self.clip_min,
            math.inf if self.clip_max is None else self.clip_max,
        )

    @property
    def per_rollout(self) -> bool:
        """Whether a rollout's tokens share one weight."""
        return self.kind.startswith("sequence")

    def weights(self, old: Tensor, sampling: Tensor, layout: Layout) -> Tensor:
        """w (R,), from constants (R,). Where sampling is NaN, the token counts as sampled by old."""
        gap = (old - sampling).nan_to_num(nan=0.0)
        gap = gap if layout.mask is None else gap.masked_fill(~layout.mask, 0)
        ratio = (layout.per_rollout(gap)[layout.rollout()] if self.per_rollout else gap).exp()
        low, high = (torch.zeros_like(ratio[:1]) + bound for bound in self.bounds)  # data to a compiler
        if self.kind.endswith("truncate"):
            return ratio.clamp(low, high)
        return ratio.masked_fill((ratio < low) | (ratio > high), 0)


def geometric_mean(weights: Tensor, layout: Layout) -> Tensor:
    """The geometric mean (R,) of weights (R,) over each rollout, for GMPO, whose ratio is one as well."""
    logs = (weights + SMALLEST).log()
    logs = logs if layout.mask is None else logs.masked_fill(~layout.mask, 0)
    return (layout.per_rollout(logs) / layout.tokens().clamp(min=1))[layout.rollout()].exp()


def sampling_metrics(weights: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Mean, least and largest weight of the tokens that count."""
    if not weights.shape[0]:
        return {}
    active = torch.ones_like(weights, dtype=torch.bool) if layout.mask is None else layout.mask
    name = "sampling/importance_sampling_ratio"
    return {
        f"{name}/mean": weights.masked_fill(~active, 0).sum() / active.sum().clamp(min=1),
        f"{name}/min": torch.where(active.any(), weights.masked_fill(~active, float("inf")).amin(), 0),
        f"{name}/max": weights.masked_fill(~active, 0).amax(),
    }
