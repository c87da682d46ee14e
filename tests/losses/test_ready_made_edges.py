"""Clip-Cov, KL-Cov, FIPO and REAL among masks, rollouts without tokens or labels, and tokens of probability 0."""

import math
from itertools import pairwise

import pytest
import torch
from loss_cases import READY_MADE, policy_loss_from_logps

from rlvr_ops import Real, surrogates

LN, INF = math.log, math.inf


def loss_and_coef(logps, old, advantages, surrogate, **given):
    """Loss and dL/dlogp (B, T), the sum over tokens."""
    logp, old, a = (torch.as_tensor(v, dtype=torch.float64) for v in (logps, old, advantages))
    logp = logp.clone().requires_grad_()
    given = {"loss_type": "luspo", "num_items_in_batch": 1, **given}
    out = policy_loss_from_logps(logp, a, old_per_token_logps=old, surrogate=surrogate, **given)
    return out.loss.item(), torch.autograd.grad(out.loss, logp)[0]


def left_out(old, seed=0, dtype=torch.float64):
    """Which token of (1, n) Clip-Cov leaves out, where all are candidates."""
    logp = old.to(dtype).requires_grad_()
    cov = surrogates.clip_cov(share=1e-9, low=-INF, high=INF, seed=seed)
    out = policy_loss_from_logps(logp, torch.ones(1, dtype=dtype), old_per_token_logps=logp.detach(), surrogate=cov)
    (place,) = (torch.autograd.grad(out.loss, logp)[0][0] == 0).nonzero()[:, 0].tolist()
    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_cov_leaves_out_other_places_in_another_batch_and_the_same_in_the_same(dtype):
    make = torch.Generator().manual_seed(0)
    batches = -torch.rand(400, 1, 8, generator=make)
    places = [left_out(batch, dtype=dtype) for batch in batches]
    assert places == [left_out(batch, dtype=dtype) for batch in batches]
    counts = torch.tensor(places).bincount(minlength=8)
    assert bool(((counts - 50).abs() < 30).all())  # four deviations and a half
    repeats = sum(a == b for a, b in pairwise(places))
    assert 20 < repeats < 80


def test_clip_cov_draws_by_seed_where_all_log_probabilities_are_equal():
    places = torch.tensor([left_out(torch.full((1, 8), -1.0), seed) for seed in range(400)])
    assert bool(((places.bincount(minlength=8) - 50).abs() < 30).all())


def test_a_token_without_an_advantage_is_a_candidate_of_clip_cov_however_it_has_moved():
    """Its ratio of 1/2 would be clipped if it had one, as it would not in the paper's code."""
    counted = set()
    for seed in range(20):
        cov = surrogates.clip_cov(share=1e-9, low=0.1, high=9.0, seed=seed)
        logps, old = [[-1.0, -1.0], [-3.0, -3.0]], [[-1.0, -1.0 + LN(2)], [-3.0, -3.0]]
        _, coef = loss_and_coef(logps, old, [[1.0, 0.0], [-1.0, -1.0]], cov)
        counted.add(int((coef != 0).sum()))
    assert counted == {2, 3}


DROPPED = {
    "a sampling correction": {
        "sampling_correction": "token_mask", "sampling_clip_max": 2.0, "sampling_per_token_logps": [[-9.0, -2.1], [-2.0, -1.0]],
    },
    "the off-policy mask": {"off_policy_mask_threshold": 0.1},
    "an entropy quantile": {"top_entropy_quantile": 0.5, "per_token_entropies": [[0.1, 1.0], [0.9, 0.2]]},
}  # fmt: skip


@pytest.mark.parametrize("how", DROPPED)
def test_kl_cov_penalises_no_token_that_is_dropped(how):
    given = {k: torch.tensor(v, dtype=torch.float64) if "per" in k else v for k, v in DROPPED[how].items()}
    logps, old = [[-1.0, -2.0], [-3.0, -2.5]], [[-1.3, -2.1], [-2.0, -1.0]]
    found = [loss_and_coef(logps, old, [1.0, -1.0], surrogates.kl_cov(share=1.0, coef=c), **given) for c in (0.5, 1.0)]
    (few, by_few), (many, by_many) = found
    dropped = by_few == 0
    assert bool(dropped.any())
    assert not bool(by_many[dropped].any())
    x = (torch.tensor(logps) - torch.tensor(old)).double().masked_fill(dropped, 0)
    torch.testing.assert_close(by_many - by_few, 0.5 * x.sign(), rtol=1e-12, atol=1e-12)
    assert many - few == pytest.approx(0.5 * x.abs().sum().item(), rel=1e-6)


def test_the_share_of_kl_cov_goes_to_tokens_with_an_advantage():
    """Of three, the one without an advantage has the largest covariance, (0 + 0.37) (-1 + 3.33)."""
    cov = surrogates.kl_cov(share=0.34, coef=0.5)
    _, coef = loss_and_coef([[-1.0], [-5.0], [-4.0]], [[-1.1], [-5.1], [-4.1]], [0.0, -0.5, -0.6], cov)
    ratio = math.exp(0.1)
    assert coef[:, 0].tolist() == pytest.approx([0.0, 0.5 * ratio + 0.5, 0.6 * ratio])


IMPOSSIBLE = {
    "to both, without an advantage": (-INF, -INF, 0.0),
    "to the sampler, without an advantage": (-1.0, -INF, 0.0),
    "now, wrong": (-INF, -1.0, -1.0),
    "now, right": (-INF, -1.0, 1.0),
}


@pytest.mark.parametrize("surrogate", READY_MADE, ids=str)
@pytest.mark.parametrize("which", IMPOSSIBLE)
def test_a_token_of_probability_0_leaves_the_others_their_gradient(surrogate, which):
    logp, old, advantage = IMPOSSIBLE[which]
    logps, olds = (
        [[-1.0, -2.0], [-0.5, -2.5], [logp, -1.0], [-2.0, -0.7]],
        [[-1.1, -1.8], [-0.6, -2.4], [old, -1.2], [-2.2, -0.7]],
    )
    loss, coef = loss_and_coef(logps, olds, [1.0, -1.0, advantage, -0.5], surrogate)
    assert math.isfinite(loss)
    assert bool(coef.isfinite().all())
    assert coef[2, 0] == 0
    assert bool(coef[:2].any())


def test_a_token_far_below_one_over_delta_still_adds_to_fipos_future():
    fipo = surrogates.fipo(half_life=1.0, influence=(0.0, 9.0), delta=2.0, safe_ratio=None)
    _, coef = loss_and_coef([[-1.0] * 2], [[-1.0, -1.0 + LN(3)]], [1.0], fipo)
    assert coef[0].tolist() == pytest.approx([-(3**-0.5), -1 / 9])


def test_fipo_still_punishes_an_extreme_token_at_eight_tenths():
    fipo = surrogates.fipo(half_life=1.0, influence=(0.0, 9.0))
    _, coef = loss_and_coef([[-1.0] * 2], [[-1.0 - LN(5), 9.0]], [-1.0], fipo)
    assert coef[0, 0].item() == pytest.approx(0.8 * 5)


@pytest.mark.parametrize(
    ("how", "share"),
    [
        ({"loss_type": "grpo"}, 2 / 3), ({"loss_type": "grpo", "num_items_in_batch": 2}, 1),
        ({"loss_type": "dapo", "num_items_in_batch": 3}, 1), ({"loss_type": "bnpo"}, 1),
    ],
)  # fmt: skip
def test_of_a_group_with_an_empty_rollout_real_is_the_others_loss_averaged_like_any_loss(how, share):
    """The loss of the two others is log(1 + 1) + log(1 + 1); grpo counts three rollouts unless it is told how many."""
    logps, mask = torch.full((3, 2), -1.0), torch.tensor([[1, 1], [1, 0], [0, 0]])
    given = {"completion_mask": mask, "num_items_in_batch": None, **how}
    loss, coef = loss_and_coef(logps, logps, [1.0, -1.0, -1.0], Real(3), **given)
    assert loss == pytest.approx(share * 2 * LN(2))
    assert not bool(coef[2].any())


@pytest.mark.parametrize("advantages", [[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0], [1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]])
def test_a_group_without_both_kinds_has_no_loss(advantages):
    loss, coef = loss_and_coef([[-1.0]] * 3, [[-1.1]] * 3, advantages, Real(3))
    assert loss == 0
    assert not bool(coef.any())


def test_a_rollout_without_a_label_is_in_neither_sum_of_real():
    old = [[-1.0]] * 3
    loss, coef = loss_and_coef([[-1.0], [-1.0], [-0.7]], old, [1.0, -1.0, 0.0], Real(3))
    assert loss == pytest.approx(3 * 2 * LN(2))
    assert coef[:, 0].tolist() == pytest.approx([-3.0, 3.0, 0.0])


def test_the_kl_to_the_old_policy_is_a_metric_even_where_it_has_no_weight():
    logp = torch.tensor([[-1.0, -2.0]])
    out = policy_loss_from_logps(logp, torch.ones(1), old_per_token_logps=logp - 0.1, kl_against="old", beta=0.0)
    assert out.metrics["kl"].item() > 0
