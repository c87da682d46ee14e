"""One token's loss and its derivative with respect to the token's log-probability. No token sees another here.

    rho = exp(logp - old),   A' = A (1 + alpha f(c)) if A < 0 else A,   f = softplus | relu
    loss = -min(min(rho, delta) A', clip(rho, 1 - epsilon_low, 1 + epsilon_high) A') + beta KL(logp, ref)
    coef = dloss/dlogp

c, the rollout's confidence shift, is a constant to the derivative. Source: GRPO 2402.03300, DAPO 2503.14476
(clip-higher), INTELLECT-2 2505.07291 (delta), ACE 2602.21420 (A').
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from rlvr_kernels._triton import jit, tl
from rlvr_kernels.spec import PolicySpec


class TokenTerms(NamedTuple):
    """What a token contributes, each (n,); clipped_low and clipped_high are where the clip took the gradient away."""

    loss: torch.Tensor
    coef: torch.Tensor
    kl: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def asymmetric_weight(shift: torch.Tensor, spec: PolicySpec) -> torch.Tensor:
    """1 + alpha f(c): what a wrong rollout's advantage is multiplied by (ACE)."""
    return 1 + spec.alpha * (F.softplus(shift) if spec.shape == "softplus" else F.relu(shift))


def token_terms(
    logp: torch.Tensor,
    old: torch.Tensor | None,
    ref: torch.Tensor | None,
    advantage: torch.Tensor,
    weight: torch.Tensor | None,
    spec: PolicySpec,
) -> TokenTerms:
    """The PyTorch twin of `token_terms_kernel`; `weight` is what wrong tokens' advantages are multiplied by, (n,)."""
    if weight is not None:
        advantage = torch.where(advantage < 0, advantage * weight, advantage)
    # Without an advantage the ratio counts for nothing, and where exp overflows 0 * inf must not say otherwise.
    ratio = torch.ones_like(logp) if old is None else (logp - old).masked_fill(advantage == 0, 0).exp()
    clipped_low = (ratio < 1 - spec.epsilon_low) & (advantage < 0)
    clipped_high = (ratio > 1 + spec.epsilon_high) & (advantage > 0)
    capped = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    loss = -torch.minimum(capped * advantage, ratio.clamp(1 - spec.epsilon_low, 1 + spec.epsilon_high) * advantage)
    flat = clipped_low | clipped_high | (capped < ratio)
    coef = torch.where(flat, 0, -ratio * advantage)
    kl = torch.zeros_like(logp)
    if ref is not None:
        gap = ref - logp
        kl, slope = {"k1": _k1, "k2": _k2, "k3": _k3}[spec.kl_estimator](gap)
        if spec.beta > 0:
            loss = loss + spec.beta * kl
            coef = coef + spec.beta * slope
    return TokenTerms(loss, coef, kl, clipped_low, clipped_high)


def _k1(gap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return -gap, torch.ones_like(gap)


def _k2(gap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gap.square() / 2, -gap


def _k3(gap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gap.expm1() - gap, -gap.expm1()


def kernel_arguments(spec: PolicySpec) -> dict[str, float | bool | str]:
    """The Triton kernels' arguments for a spec. An int would be compiled for, as a type or, if 1, as a constant of its own."""
    return {
        "epsilon_low": float(spec.epsilon_low),
        "epsilon_high": float(spec.epsilon_high),
        "delta": float("inf" if spec.delta is None else spec.delta),
        "beta": float(spec.beta),
        "alpha": float(spec.alpha),
        "SHAPE": spec.shape,
        "KL": spec.kl_estimator,
    }


@jit
def asymmetric_weight_kernel(shift, alpha, SHAPE: tl.constexpr):
    """1 + alpha f(shift)."""
    if SHAPE == "softplus":
        return 1.0 + alpha * (tl.maximum(shift, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(shift))))
    return 1.0 + alpha * tl.maximum(shift, 0.0)


@jit
def kl_and_slope(gap, KL: tl.constexpr):
    """KL estimate and its derivative by logp, from gap = ref - logp."""
    if KL == "k1":
        return -gap, gap * 0.0 + 1.0
    if KL == "k2":
        return 0.5 * gap * gap, -gap
    return expm1(gap) - gap, -expm1(gap)


@jit
def expm1(x):
    """exp(x) - 1 without cancellation: a fifth-order series where |x| < 0.05, whose relative error there is below 1e-9."""
    series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * 0.0083333333))))
    return tl.where(tl.abs(x) < 0.05, series, tl.exp(x) - 1.0)


@jit
def token_terms_kernel(
    logp, old, ref, advantage, weight, epsilon_low, epsilon_high, delta, beta,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """(loss, coef, kl, clipped_low, clipped_high) of a block of tokens."""
    advantage = tl.where(advantage < 0, advantage * weight, advantage)
    ratio = logp * 0.0 + 1.0
    if HAS_OLD:
        ratio = tl.exp(tl.where(advantage == 0, 0.0, logp - old))  # 0 * inf would be NaN
    clipped_low = (ratio < 1.0 - epsilon_low) & (advantage < 0)
    clipped_high = (ratio > 1.0 + epsilon_high) & (advantage > 0)
    capped = tl.minimum(ratio, delta)
    loss = -tl.minimum(
        capped * advantage, tl.minimum(tl.maximum(ratio, 1.0 - epsilon_low), 1.0 + epsilon_high) * advantage
    )
    coef = tl.where(clipped_low | clipped_high | (capped < ratio), 0.0, -ratio * advantage)
    kl = logp * 0.0
    if HAS_REF:
        kl, slope = kl_and_slope(ref - logp, KL)
        loss += tl.where(beta > 0, beta * kl, 0.0)  # 0 * inf, where the policy has all but ruled a token out, is 0 here
        coef += tl.where(beta > 0, beta * slope, 0.0)
    return loss, coef, kl, clipped_low, clipped_high
