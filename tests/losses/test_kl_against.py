"""A KL term against the policy that sampled, by hand; with REINFORCE and k2 it is DRO."""

import math

import pytest
import torch
from loss_cases import policy_loss_from_logps

K = {
    "k1": (lambda d: d, lambda d: 1),
    "k2": (lambda d: d * d / 2, lambda d: d),
    "k3": (lambda d: math.exp(-d) + d - 1, lambda d: 1 - math.exp(-d)),
}
"""Value and derivative, with d = logp - old."""


def one_token(advantage, **given):
    """(loss, dL/dlogp, metrics) of a token with logp = -1 and old = -1.5."""
    logp = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    out = policy_loss_from_logps(
        logp, torch.tensor([advantage], dtype=torch.float64), old_per_token_logps=torch.tensor([[-1.5]]).double(), **given
    )  # fmt: skip
    return out.loss.item(), torch.autograd.grad(out.loss, logp)[0].item(), out.metrics


@pytest.mark.parametrize("estimator", K)
@pytest.mark.parametrize("corrected", [False, True])
def test_the_estimator_is_of_policy_and_sampler(estimator, corrected):
    value, slope = (f(0.5) for f in K[estimator])
    if corrected:
        value, slope = math.exp(0.5) * value, math.exp(0.5) * 0.5
    given = {"beta": 0.3, "kl_estimator": estimator, "use_bias_correction_kl": corrected, "kl_against": "old"}
    loss, coef, metrics = one_token(0.0, **given)
    assert loss == pytest.approx(0.3 * value, rel=1e-12)
    assert coef == pytest.approx(0.3 * slope, rel=1e-12)
    assert metrics["kl"].item() == pytest.approx(value, rel=1e-12)


def test_with_reinforce_and_k2_it_is_dro():
    """-(A logp - beta / 2 (logp - old)^2) = -(2 * -1 - 0.3 / 2 * 0.25)."""
    loss, coef, _ = one_token(2.0, surrogate="reinforce", beta=0.3, kl_estimator="k2", kl_against="old")
    assert loss == pytest.approx(2.0375, rel=1e-12)
    assert coef == pytest.approx(-2 + 0.3 * 0.5, rel=1e-12)


def test_ace_still_compares_with_the_reference():
    """c = logp - ref = ln 2, so A' = -2 (1 + ln 3)."""
    ref = torch.tensor([[-1 - math.log(2)]], dtype=torch.float64)
    given = {"surrogate": "reinforce", "beta": 0.3, "kl_estimator": "k2", "kl_against": "old"}
    _, coef, metrics = one_token(-2.0, alpha=1.0, ref_per_token_logps=ref, **given)
    assert coef == pytest.approx(2 * (1 + math.log(3)) + 0.3 * 0.5, rel=1e-12)
    assert metrics["ace/shift/mean"].item() == pytest.approx(math.log(2))
    assert metrics["kl"].item() == pytest.approx(0.125)


@pytest.mark.parametrize(("estimator", "slope"), [("k1", 0.3), ("k2", 0.0), ("k3", 0.0)])
def test_on_policy_it_is_0(estimator, slope):
    logp = torch.tensor([[-1.0]], requires_grad=True)
    out = policy_loss_from_logps(logp, torch.zeros(1), beta=0.3, kl_estimator=estimator, kl_against="old")
    assert out.loss.item() == out.metrics["kl"].item() == 0
    assert torch.autograd.grad(out.loss, logp)[0].item() == pytest.approx(slope)
