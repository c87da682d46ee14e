"""One token's loss and its derivative with respect to the token's log-probability, once its rollout is known.

    A' = A (1 + alpha f(c)) if A < 0 else A,   f = softplus | relu          ACE, 2602.21420
    loss = surrogate(x, A') + beta KL(logp, ref)

x is the log ratio that the surrogate sees: the token's own or its rollout's. c, the rollout's confidence shift, is a
constant to the derivative.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from rlvr_kernels._triton import jit, tl
from rlvr_kernels.divergence import divergence, divergence_kernel
from rlvr_kernels.spec import PolicySpec
from rlvr_kernels.surrogate import surrogate_kernel, surrogate_terms


class TokenTerms(NamedTuple):
    """What a token contributes, each (n,).

    slope is the surrogate's derivative by x or by logp, direct the KL term's by logp; clipped_low and clipped_high are
    where the ratio was outside its bounds.
    """

    loss: torch.Tensor
    slope: torch.Tensor
    direct: torch.Tensor
    kl: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def asymmetric_weight(shift: torch.Tensor, spec: PolicySpec) -> torch.Tensor:
    """1 + alpha f(c): what a wrong rollout's advantage is multiplied by (ACE)."""
    return 1 + spec.alpha * (F.softplus(shift) if spec.shape == "softplus" else F.relu(shift))


def token_terms(
    logp: torch.Tensor,
    log_ratio: torch.Tensor | None,
    x: torch.Tensor | None,
    ref: torch.Tensor | None,
    advantage: torch.Tensor,
    weight: torch.Tensor | None,
    spec: PolicySpec,
) -> TokenTerms:
    """The PyTorch twin of `token_terms_kernel`; `weight` is what wrong tokens' advantages are multiplied by, (n,).

    log_ratio is the token's own, x what the surrogate sees; None means on policy, 0.
    """
    if weight is not None:
        advantage = torch.where(advantage < 0, advantage * weight, advantage)
    x = torch.zeros_like(logp) if x is None else x
    loss, slope, low, high = surrogate_terms(x, logp, advantage, spec.surrogate)
    kl, direct = torch.zeros_like(logp), torch.zeros_like(logp)
    if ref is not None:
        kl, by_logp = divergence(ref - logp, log_ratio, spec.kl_estimator, spec.use_bias_correction_kl)
        if spec.beta > 0:
            loss, direct = loss + spec.beta * kl, spec.beta * by_logp
    return TokenTerms(loss, slope, direct, kl, low, high)


def kernel_arguments(spec: PolicySpec) -> dict[str, float | bool | str]:
    """The Triton kernels' arguments for a spec. An int would be compiled for, as a type or, if 1, as a constant of its own."""
    names = ("positive_a", "positive_b", "negative_a", "negative_b")
    values = (*spec.surrogate.positive, *spec.surrogate.negative)
    return {
        **{name: float(value) for name, value in zip(names, values, strict=True)},
        "beta": float(spec.beta),
        "alpha": float(spec.alpha),
        "FORM": spec.surrogate.form,
        "SHAPE": spec.shape,
        "KL": spec.kl_estimator,
        "CORRECTED": bool(spec.use_bias_correction_kl),
    }


@jit
def asymmetric_weight_kernel(shift, alpha, SHAPE: tl.constexpr):
    """1 + alpha f(shift)."""
    if SHAPE == "softplus":
        return 1.0 + alpha * (tl.maximum(shift, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(shift))))
    return 1.0 + alpha * tl.maximum(shift, 0.0)


@jit
def token_terms_kernel(
    logp, log_ratio, x, ref, advantage, weight, positive_a, positive_b, negative_a, negative_b, beta,
    FORM: tl.constexpr, HAS_REF: tl.constexpr, KL: tl.constexpr, CORRECTED: tl.constexpr,
):  # fmt: skip
    """(loss, slope, direct, kl, clipped_low, clipped_high) of a block of tokens."""
    advantage = tl.where(advantage < 0, advantage * weight, advantage)
    a = tl.where(advantage > 0, positive_a, negative_a)
    b = tl.where(advantage > 0, positive_b, negative_b)
    loss, slope, low, high = surrogate_kernel(x, logp, advantage, a, b, FORM)
    kl = tl.zeros_like(loss)  # and not 0 * logp, which is NaN for a token that cannot be
    direct = kl
    if HAS_REF:
        kl, by_logp = divergence_kernel(ref - logp, log_ratio, KL, CORRECTED)
        loss += tl.where(beta > 0, beta * kl, 0.0)  # 0 * inf, where the policy has all but ruled a token out, is 0 here
        direct = tl.where(beta > 0, beta * by_logp, 0.0)
    return loss, slope, direct, kl, low, high
