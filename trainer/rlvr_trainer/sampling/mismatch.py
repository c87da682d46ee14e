"""How far the sampler's log-probabilities are from the trainer's own, and what the correction made of that."""

import torch
from torch import Tensor

from rlvr_ops import SamplingCorrection


class Mismatch:
    """Adds up the micro-batches of a step. One token counts as much as any other."""

    def __init__(self, correction: SamplingCorrection | None) -> None:
        self.correction = correction
        self.gaps: list[Tensor] = []
        self.log_ratios: list[Tensor] = []
        self.tokens = 0

    def add(self, old: Tensor, sampling: Tensor, mask: Tensor) -> None:
        """`old` and `sampling` (B, T), log-probabilities by trainer and sampler, NaN where the sampler gave none."""
        known = mask.bool() & ~sampling.isnan()
        gap = (old - sampling).masked_fill(~known, 0)
        ratio = gap.sum(1, keepdim=True).expand_as(gap) if self.correction and self.correction.per_rollout else gap
        self.gaps.append(gap[known].abs())
        self.log_ratios.append(ratio[mask.bool()].double())
        self.tokens += int(mask.sum())

    def metrics(self) -> dict[str, float]:
        """`sampling/*`, explained in docs/metrics.md; nothing where there was no token."""
        if not self.tokens:
            return {}
        gaps, log_ratios = torch.cat(self.gaps), torch.cat(self.log_ratios)
        found = {"sampling/frac_without_logp": 1 - len(gaps) / self.tokens}
        if len(gaps):
            found["sampling/sampling_logp_difference/mean"] = float(gaps.mean())
            found["sampling/sampling_logp_difference/max"] = float(gaps.max())
        if self.correction is not None:
            low, high = log_ratios.new_tensor(self.correction.bounds).log()
            outside = (log_ratios < low) | (log_ratios > high)
            masked = log_ratios.masked_fill(outside, -torch.inf)
            logs = log_ratios.clamp(low, high) if self.correction.kind.endswith("truncate") else masked
            found["sampling/frac_truncated"] = float(outside.float().mean())
            weights = (
                logs - logs.amax().clamp(min=-1e300)
            ).exp()  # a common factor changes nothing, and cannot overflow
            found["sampling/effective_sample_size"] = (
                float(weights.sum() ** 2 / weights.square().sum().clamp(min=1)) / self.tokens
            )
        return found
