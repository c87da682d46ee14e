"""DPPO and IPO by hand: a token is left out where its probability has moved too far from the sampler's."""

import math

import pytest
import torch
from loss_cases import policy_loss_from_logps

from rlvr_ops import Dppo, Ipo


def one_token(p, q, advantage, surrogate):
    """(loss, coefficient, clip ratios) of a token of probability p under the policy and q under the sampler."""
    logp, old = (torch.tensor([[math.log(x)]], dtype=torch.float64) for x in (p, q))
    logp.requires_grad_()
    out = policy_loss_from_logps(
        logp, torch.tensor([advantage], dtype=torch.float64), old_per_token_logps=old, surrogate=surrogate
    )
    clipped = tuple(out.metrics[f"clip_ratio/{side}_mean"].item() for side in ("low", "high"))
    return out.loss.item(), torch.autograd.grad(out.loss, logp)[0].item(), clipped


@pytest.mark.parametrize(
    ("p", "q", "advantage", "ratio", "clipped"),
    [
        (0.5, 0.4, 1.0, 1.25, (0, 0)),  # moved by 0.1
        (0.6, 0.4, 1.0, 0, (0, 1)),  # by 0.2, the way of its advantage
        (0.4, 0.6, 1.0, 2 / 3, (0, 0)),  # the other way: it may come back
        (0.4, 0.6, -2.0, 0, (1, 0)),
        (0.6, 0.4, -2.0, 1.5, (0, 0)),
        (0.1, 0.001, 1.0, 100.0, (0, 0)),  # PPO would have stopped at 1.2
    ],
)
def test_total_variation_is_the_difference_of_the_probabilities(p, q, advantage, ratio, clipped):
    loss, coef, sides = one_token(p, q, advantage, Dppo("tv", 0.15))
    assert coef == pytest.approx(-ratio * advantage, rel=1e-12)
    assert loss == pytest.approx(-ratio * advantage * math.log(p), rel=1e-12)
    assert sides == clipped


def kl(q, p):
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


@pytest.mark.parametrize(("p", "q"), [(0.6, 0.4), (0.3, 0.2), (0.05, 0.001), (0.999, 0.9)])
def test_the_divergence_is_from_the_sampler_to_the_policy(p, q):
    for factor, kept in ((1.01, True), (0.99, False)):
        _, coef, _ = one_token(p, q, 1.0, Dppo("kl", kl(q, p) * factor))
        assert coef == pytest.approx(-p / q if kept else 0.0, rel=1e-9)


def test_the_defaults_are_the_papers_and_the_ratio_can_be_bounded():
    assert Dppo("tv").numbers == ((0.15, math.inf),) * 2
    assert Dppo("kl").numbers == ((0.05, math.inf),) * 2
    assert one_token(0.1, 0.001, 1.0, Dppo("tv", ratio_max=5.0))[1] == pytest.approx(-5.0)


@pytest.mark.parametrize("advantage", [1.0, -2.0])
@pytest.mark.parametrize(
    ("p", "q", "clipped"), [(0.5, 0.405, (0, 0)), (0.52, 0.4, (0, 1)), (0.4, 0.52, (1, 0)), (0.1, 0.001, (0, 0))]
)
def test_ipo_leaves_a_token_out_whichever_way_it_moved(p, q, clipped, advantage):
    loss, coef, sides = one_token(p, q, advantage, Ipo())
    wanted = 0 if any(clipped) else -p / q * advantage
    assert coef == pytest.approx(wanted, rel=1e-12)
    assert loss == pytest.approx(wanted * math.log(p), rel=1e-12)
    assert sides == clipped


@pytest.mark.parametrize("surrogate", [Dppo("tv", 0.2), Ipo(0.1)])
def test_with_a_squared_penalty_it_is_prime_rls_loss(surrogate):
    """-M A rho + 0.001 (logp - old)^2, whose gradient is -M A rho + 0.002 (logp - old)."""
    for p, q in ((0.45, 0.4), (0.9, 0.4)):
        logp, old = (torch.tensor([[math.log(x)]], dtype=torch.float64) for x in (p, q))
        logp.requires_grad_()
        out = policy_loss_from_logps(
            logp, torch.ones(1, dtype=torch.float64), old_per_token_logps=old, surrogate=surrogate, beta=0.002,
            kl_estimator="k2", kl_against="old",
        )  # fmt: skip
        wanted = (-p / q if p - q < 0.1 else 0) + 0.002 * math.log(p / q)
        assert torch.autograd.grad(out.loss, logp)[0].item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_certain_tokens_are_not_nan(divergence):
    logp = torch.zeros(1, 3, requires_grad=True)
    old = torch.tensor([[0.0, -1e-9, -30.0]])
    for advantage in (1.0, -1.0):
        out = policy_loss_from_logps(
            logp, torch.tensor([advantage]), old_per_token_logps=old, surrogate=Dppo(divergence)
        )
        (coef,) = torch.autograd.grad(out.loss, logp)
        assert bool(coef.isfinite().all())
        assert coef[0, 0].item() == pytest.approx(-advantage / 3)
