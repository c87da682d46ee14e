"""How far the sampler's log-probabilities are from the trainer's own, and what the correction made of that."""

import torch
from torch import Tensor

from rlvr_ops import SamplingCorrection


class Mismatch:
    """Adds up the micro-batches of a step. One token counts as much as any other."""

    def __init__(self, correction: SamplingCorrection | None) -> None:
        self.correction = correction
        self.gaps: list[Tensor] = []
        self.ratios: list[Tensor] = []
        self.tokens = 0

    def add(self, old: Tensor, sampling: Tensor, mask: Tensor) -> None:
        """`old` and `sampling` (B, T), log-probabilities by trainer and sampler, NaN where the sampler gave none."""
        known = mask.bool() & ~sampling.isnan()
        gap = (old - sampling).masked_fill(~known, 0)
        ratio = gap.sum(1, keepdim=True).expand_as(gap) if self.correction and self.correction.per_rollout else gap
        self.gaps.append(gap[known].abs())
        self.ratios.append(ratio[mask.bool()].exp())
        self.tokens += int(mask.sum())

    def metrics(self) -> dict[str, float]:
        """`sampling/*`, explained in docs/metrics.md; nothing where there was no token."""
        if not self.tokens:
            return {}
        gaps, ratios = torch.cat(self.gaps), torch.cat(self.ratios)
        found = {"sampling/frac_without_logp": 1 - len(gaps) / self.tokens}
        if len(gaps):
            found["sampling/sampling_logp_difference/mean"] = float(gaps.mean())
            found["sampling/sampling_logp_difference/max"] = float(gaps.max())
        if self.correction is not None:
            low, high = self.correction.bounds
            outside = (ratios < low) | (ratios > high)
            masked = ratios.masked_fill(outside, 0)
            weights = ratios.clamp(low, high) if self.correction.kind.endswith("truncate") else masked
            found["sampling/frac_truncated"] = float(outside.float().mean())
            total = float(weights.sum())
            found["sampling/effective_sample_size"] = total**2 / (self.tokens * float(weights.square().sum()) or 1.0)
        return found
