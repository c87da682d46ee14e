"""Sums over long rollouts, large groups and many answers are as precise as float32 can say, however many they add up."""

import math

import pytest
import torch

import rlvr_ops

COUNTS = [131_072, 10**6]
PLACES = ["packed", "padded"]
long = pytest.mark.parametrize("count", COUNTS)


def numbers(count, low, high):
    """Float32 numbers: half of them one constant, whose rounding adds up, then drawn ones."""
    generator = torch.Generator().manual_seed(count)
    drawn = low + (high - low) * torch.rand(count, generator=generator)
    return torch.where(torch.arange(count) < count // 2, torch.tensor(low + 0.31 * (high - low)), drawn)


def within(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=0)


def rollouts(values, place):
    """One long rollout and a short one: packed (N,), or as two rows."""
    short = values[:7]
    if place == "packed":
        return torch.cat([values, short]), {"cu_seqlens": torch.tensor([0, len(values), len(values) + 7])}
    padded = torch.zeros(2, len(values))
    padded[0], padded[1, :7] = values, short
    mask = torch.ones(2, len(values))
    mask[1, 7:] = 0
    return padded, {"completion_mask": mask}


@long
@pytest.mark.parametrize("place", PLACES)
def test_mean_self_certainty(count, place):
    values = numbers(count, 0.0, 20.0)
    given, where = rollouts(values, place)
    got = rlvr_ops.mean_self_certainty(given, **where)
    within(got, torch.stack([values.double().mean(), values[:7].double().mean()]))


@long
@pytest.mark.parametrize("place", PLACES)
def test_mean_token_probability_and_crew_reward(count, place):
    logps = numbers(count, -3.0, 0.0)
    given, where = rollouts(logps, place)
    expected = torch.stack([logps.double().exp().mean(), logps[:7].double().exp().mean()])
    within(rlvr_ops.mean_token_probability(given, **where), expected)
    answer = where.pop("completion_mask", torch.ones_like(given))
    within(rlvr_ops.crew_reward(given, answer, **where), expected)


@long
@pytest.mark.parametrize("place", PLACES)
def test_squared_gradient_norms(count, place):
    p = numbers(count, 0.1, 0.6)
    logps, squares = p.log(), p.square()
    token = 1 - 2 * logps.double().exp() + squares.double()
    given, where = rollouts(logps, place)
    got = rlvr_ops.squared_gradient_norms(given, rollouts(squares, place)[0], **where)
    within(got, torch.stack([token.sum(), token[:7].sum()]))


@long
def test_otb_advantages(count):
    p = torch.stack([numbers(count, 0.1, 0.6), numbers(count, 0.2, 0.5).flip(0)])
    logps, squares = p.log(), p.square()
    spent = (1 - 2 * logps.double().exp() + squares.double()).cumsum(1)
    got = rlvr_ops.otb_advantages(torch.tensor([1.0, 0.0]), logps, squares, group_size=2)
    within(got, torch.stack([spent[1], -spent[0]]) / spent.sum(0))


@long
def test_arm_advantages(count):
    logps = numbers(count, -3.0, 0.0).expand(2, -1)
    got = rlvr_ops.arm_advantages(
        torch.zeros(2),
        logps,
        prompt_logps=torch.zeros(2, 1),
        correct=torch.ones(2),
        group_size=2,
        alpha=1.0,
        fraction=1.0,
    )
    within(got, 1 - logps.double().mean(1).exp())


@long
def test_trust_grpo_reward(count):
    thinking = numbers(count, 0.0, 1.0)
    outcome = (torch.arange(count) % 3 == 0).float()
    given = {"step": 0, "total_steps": 1}
    for groups in ({"group_size": count}, {"group_ids": torch.zeros(count, dtype=torch.long)}):
        got = rlvr_ops.trust_grpo_reward(outcome, thinking, **given, **groups)
        gap = thinking[outcome == 1].double().mean() - thinking[outcome == 0].double().mean()
        within(got, outcome.double() + 0.3 * gap.clamp(max=0).exp() * thinking.double())


@long
def test_ppo_c_reward(count):
    rewards = numbers(count, 0.0, 20.0)
    got = rlvr_ops.ppo_c_reward(rewards, torch.full((count,), 0.5), 0.0, ema=1.0)
    within(got.running_mean, rewards.double().mean())


@long
@pytest.mark.parametrize(
    "estimator", ["grpo", "dr_grpo", "rloo", "lite_ppo", "gpg", "opo", "oblr", "reinforce_plus_plus"]
)
def test_group_advantages(count, estimator):
    rewards, weights = numbers(count, 0.0, 20.0), numbers(count, 1.0, 9.0)
    given = {"opo": {"lengths": weights}, "oblr": {"squared_gradient_norms": weights}}.get(estimator, {})
    got = rlvr_ops.group_advantages(rewards, count, estimator, **given)
    r, w = rewards.double(), weights.double()
    expected = r - ((w * r).sum() / w.sum() if given else r.mean())
    scale = {
        "grpo": r.std() + 1e-4,
        "lite_ppo": r.std() + 1e-4,
        "reinforce_plus_plus": (r.var() + 1e-8).sqrt(),
        "rloo": (count - 1) / count,
    }
    torch.testing.assert_close(got.double(), expected / scale.get(estimator, 1.0), rtol=1e-5, atol=1e-9)


@long
def test_brier_score_and_calibration(count):
    q = numbers(count, 0.0, 1.0)
    y = (torch.arange(count) % 5 != 0).float()
    within(rlvr_ops.brier_score(q, y), (q.double() - y.double()).square().mean())
    got = rlvr_ops.reliability_bins(q, y, bins=1)
    within(got.confidence[0], q.double().mean())
    within(got.accuracy[0], y.double().mean())
    within(rlvr_ops.expected_calibration_error(q, y, bins=1), (q.double().mean() - y.double().mean()).abs())


@long
@pytest.mark.parametrize("wrong", [100, 50_000])
def test_auroc(count, wrong):
    # Wrong answers hold every (count / wrong)-th place: each is below the right ones after it.
    step = count // wrong
    y = torch.ones(count)
    y[::step] = 0
    below = torch.cumsum(1 - y.double(), 0)[y == 1].sum()
    expected = below / ((y == 1).sum().double() * (y == 0).sum())
    within(rlvr_ops.auroc(torch.arange(count).double() / count, y), expected)
    within(rlvr_ops.auroc(torch.arange(count).float() / 2**24, y), expected)


@long
def test_tokenised_brier_loss(count):
    z, y = numbers(count, -3.0, 3.0), (torch.arange(count) % 2).float()
    got = rlvr_ops.tokenised_brier_loss(z[:, None], torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]), y)
    within(got, (torch.where(y == 1, 1 - z.double().sigmoid(), z.double().sigmoid())).mean())


@long
def test_bootstrap_interval(count):
    low, high = rlvr_ops.bootstrap_interval(torch.full((count,), 0.1), resamples=2)
    assert low == pytest.approx(0.1, rel=1e-7)
    assert high == pytest.approx(0.1, rel=1e-7)


@pytest.mark.parametrize("k", [1000, 30_000])
def test_pass_at_k(k):
    n = 10**6
    assert rlvr_ops.pass_at_k(n, 1, k) == pytest.approx(k / n, rel=1e-9)
    assert rlvr_ops.pass_at_k(n, 2, k) == pytest.approx(1 - (n - k) * (n - k - 1) / (n * (n - 1)), rel=1e-9)


def test_borda_vote():
    count = 131_072
    got = rlvr_ops.borda_vote(["a"] * count, torch.zeros(count))
    assert got.votes["a"] == pytest.approx(math.fsum(i**0.5 for i in range(1, count + 1)), rel=1e-12)
