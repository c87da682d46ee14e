"""Estimates of KL(policy || reference) from one token's log-probabilities, and their derivative by logp.

With d = ref - logp:   k1 = -d,   k2 = d^2 / 2,   k3 = exp(d) - d - 1   (Schulman's three), each differentiated as
written. What that means for tokens that the policy itself sampled: k2's gradient is the reverse KL's, k1's is 0 on
average, k3's is the forward KL's.

Corrected by the token's ratio r = exp(logp - old), the value is r k and the derivative is r (logp - ref) for all
three: the reverse KL's gradient, whichever policy sampled. For k3 that is what differentiating r k3 gives; for k1 it is
r k1's without the term r, whose mean is 0; for k2 it is sg[r] k2's. Source: DeepSeek-V3.2 2512.02556, section 3.1.
"""

import torch

from rlvr_kernels._triton import jit, tl


def divergence(
    gap: torch.Tensor, log_ratio: torch.Tensor | None, estimator: str, corrected: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The PyTorch twin of `divergence_kernel`; log_ratio None means on policy, a ratio of 1."""
    kl, slope = {"k1": _k1, "k2": _k2, "k3": _k3}[estimator](gap)
    if not corrected:
        return kl, slope
    return (kl, -gap) if log_ratio is None else (log_ratio.exp() * kl, -log_ratio.exp() * gap)


def _k1(gap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return -gap, torch.ones_like(gap)


def _k2(gap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gap.square() / 2, -gap


def _k3(gap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gap.expm1() - gap, -gap.expm1()


@jit
def divergence_kernel(gap, log_ratio, KL: tl.constexpr, CORRECTED: tl.constexpr):
    """KL estimate and its derivative by logp, from gap = ref - logp."""
    if KL == "k1":
        kl, slope = -gap, tl.zeros_like(gap) + 1.0
    elif KL == "k2":
        kl, slope = 0.5 * gap * gap, -gap
    else:
        kl, slope = expm1(gap) - gap, -expm1(gap)
    if CORRECTED:
        ratio = tl.exp(log_ratio)
        kl, slope = ratio * kl, -ratio * gap
    return kl, slope


@jit
def expm1(x):
    """exp(x) - 1 without cancellation: a fifth-order series where |x| < 0.05, whose relative error there is below 1e-9."""
    series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * 0.0083333333))))
    return tl.where(tl.abs(x) < 0.05, series, tl.exp(x) - 1.0)
