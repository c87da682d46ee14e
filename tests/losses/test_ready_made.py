"""Clip-Cov, KL-Cov, FIPO and REAL, which are functions of the tokens of a rollout or of the whole call: by hand."""

import math

import pytest
import torch
from loss_cases import READY_MADE, SMALL, make_batch, pack, policy_loss, policy_loss_from_logps, run

from rlvr_ops import Real, surrogates

LN = math.log


def loss_and_coef(logps, log_ratios, advantages, surrogate, **given):
    """Loss and dL/dlogp of rollouts (B, T), the sum over tokens."""
    logp, x, a = (torch.tensor(v, dtype=torch.float64) for v in (logps, log_ratios, advantages))
    logp.requires_grad_()
    given = {"loss_type": "luspo", "num_items_in_batch": 1, **given}
    out = policy_loss_from_logps(logp, a, old_per_token_logps=logp.detach() - x, surrogate=surrogate, **given)
    return out.loss.item(), torch.autograd.grad(out.loss, logp)[0].tolist()


LOGPS, ADVANTAGES = [[-1.0, -2.0], [-3.0, -2.0]], [1.0, -1.0]
"""Means -2 and 0: the covariances are 1 and 0 for the first rollout, 1 and 0 for the second."""


def test_clip_cov_leaves_out_what_lies_between_its_bounds():
    cov = surrogates.clip_cov(share=1.0, low=0.5, high=1.5)
    loss, coef = loss_and_coef(LOGPS, [[0.0, LN(1.1)], [0.0, 0.0]], ADVANTAGES, cov)
    assert loss == pytest.approx(-1.1 + 1)
    assert coef == [[0.0, pytest.approx(-1.1)], [0.0, pytest.approx(1.0)]]


def test_clip_cov_draws_among_the_tokens_that_the_clip_keeps():
    cov = surrogates.clip_cov(share=1.0, low=0.5, high=1.5)
    loss, coef = loss_and_coef(LOGPS, [[LN(2), 0.0], [0.0, 0.0]], ADVANTAGES, cov)
    assert loss == pytest.approx(-1.2 - 1 + 1)  # the first token counts, at the clip's bound
    assert coef == [[0.0, -1.0], [0.0, 1.0]]


def test_clip_cov_draws_as_many_as_its_share_of_all_tokens_and_another_seed_draws_others():
    logps, x = torch.linspace(-3, -1, 200).reshape(4, 50), torch.zeros(4, 50)
    drawn = []
    for seed in (0, 0, 1):
        cov = surrogates.clip_cov(share=0.05, low=-9.0, high=9.0, seed=seed)
        _, coef = loss_and_coef(logps.tolist(), x.tolist(), [1.0, -1.0, 0.5, -0.5], cov)
        drawn.append(torch.tensor(coef) == 0)
    assert [int(x.sum()) for x in drawn] == [10, 10, 10]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])


def test_kl_cov_penalises_the_largest_covariances():
    """Of four tokens the two with covariance 1: -A rho + 0.5 |log rho|, which pulls towards a ratio of 1."""
    cov = surrogates.kl_cov(share=0.5, coef=0.5)
    loss, coef = loss_and_coef(LOGPS, [[LN(2), LN(3)], [-LN(2), 0.0]], ADVANTAGES, cov)
    assert loss == pytest.approx((-2 + 0.5 * LN(2)) - 3 + (0.5 + 0.5 * LN(2)) + 1)
    assert coef == [[pytest.approx(-1.5), pytest.approx(-3.0)], [pytest.approx(0.5 - 0.5), pytest.approx(1.0)]]


def test_at_least_one_token_is_held():
    _, coef = loss_and_coef([[-1.0, -2.0, -3.0]], [[0.1, 0.1, 0.1]], [1.0], surrogates.kl_cov(share=1e-9, coef=0.5))
    plain = -math.exp(0.1)
    assert sorted(coef[0]) == [pytest.approx(plain), pytest.approx(plain), pytest.approx(plain + 0.5)]


def test_fipo_weighs_a_token_by_the_discounted_shift_of_those_that_follow():
    """half_life 1: F = (0.1 + 0.04 / 2 - 0.02 / 4, 0.04 - 0.02 / 2, -0.02), and the next rollout starts anew."""
    fipo = surrogates.fipo(half_life=1.0, influence=(0.0, 9.0))
    x = [[0.1, 0.04, -0.02], [0.05, 0.0, 0.0]]
    future = [[0.115, 0.03, -0.02], [0.05, 0.0, 0.0]]
    _, coef = loss_and_coef([[-1.0] * 3] * 2, x, [1.0, 1.0], fipo)
    for found, shifts, futures in zip(coef, x, future, strict=True):
        assert found == pytest.approx([-math.exp(a + b) for a, b in zip(shifts, futures, strict=True)], rel=1e-12)


def test_fipos_weight_is_bounded_and_never_punishes_an_extreme_token_harder():
    rising = [[0.1] * 3]
    assert loss_and_coef([[-1.0] * 3], rising, [1.0], surrogates.fipo())[1][0][0] == pytest.approx(-1.2 * math.exp(0.1))
    assert loss_and_coef([[-1.0] * 3], [[-0.1] * 3], [1.0], surrogates.fipo())[1][0] == pytest.approx(
        [-math.exp(-0.1)] * 3
    )
    extreme = loss_and_coef([[-1.0] * 2], [[LN(5), 0.1]], [-1.0], surrogates.fipo(influence=(0.0, 9.0)))[1][0]
    assert extreme == pytest.approx([5.0, math.exp(0.2)])  # the first token's weight is 1, not above


def test_a_token_beyond_delta_adds_nothing_to_the_future():
    fipo = surrogates.fipo(half_life=1.0, influence=(0.0, 9.0), delta=2.0)
    _, coef = loss_and_coef([[-1.0] * 2], [[0.1, LN(3)]], [1.0], fipo)
    assert coef[0] == pytest.approx([-math.exp(0.2), 0.0])


def test_real_is_a_softmax_over_the_groups_wrong_and_right_rollouts():
    """tau 0.5, s = ln 2 (right), 0 and ln 2 (wrong): log(1 + 1 + 4) + log(1 + 1/4); the other group is all right."""
    x = [[LN(4), 0.0], [0.0, 0.0], [LN(2), LN(2)], [0.3, 0.1], [0.2, 0.0], [0.0, 0.9]]
    advantages = [2 / 3, -1 / 3, -1 / 3, 0.0, 0.0, 0.0]
    given = {"loss_type": "grpo", "num_items_in_batch": None}
    loss, coef = loss_and_coef([[-1.0] * 2] * 6, x, advantages, Real(3), **given)
    assert loss == pytest.approx((LN(6) + LN(1.25)) / 2)
    # d/ds of the right one: -(1/4) / (5/4) / tau; of the wrong ones: (1, 4) / 6 / tau; each over 2 groups and 2 tokens
    slopes = [-0.4 / 4, (2 / 6) / 4, (8 / 6) / 4, 0, 0, 0]
    for found, slope in zip(coef, slopes, strict=True):
        assert found == pytest.approx([slope] * 2, rel=1e-12)


@pytest.mark.parametrize("surrogate", READY_MADE, ids=str)
def test_whatever_the_layout_it_is_what_it_is_from_log_probabilities(surrogate):
    """A workspace of a few rows, where a function of single rollouts would be called for some of them at a time."""
    padded = make_batch(SMALL, 17, 5)
    for batch in (padded, pack(padded)):
        given = {"surrogate": surrogate, "old_per_token_logps": batch.old, "workspace_bytes": 8 * 17 * max(SMALL)}
        out, grads = run(policy_loss, batch, **given)
        if getattr(surrogate, "whole_batch", False):
            assert out.metrics["head/single_pass"].item() == 0
        logps = out.per_token_logps.detach().requires_grad_()
        rest = {"completion_mask": batch.mask, "cu_seqlens": batch.cu_seqlens}
        del given["workspace_bytes"]
        whole = policy_loss_from_logps(logps, batch.advantages, **given, **rest)
        assert out.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
        assert bool(torch.autograd.grad(whole.loss, logps)[0].any())
        truth = run(policy_loss, batch, **given, schedule="two_pass")
        for a, b in zip(grads[:2], truth[1][:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("surrogate", READY_MADE, ids=str)
def test_an_empty_call_is_0(surrogate):
    batch = make_batch(SMALL, 17, 5, poison=False)
    logps = batch.old.clone().requires_grad_()
    out = policy_loss_from_logps(
        logps, batch.advantages, completion_mask=torch.zeros_like(batch.mask), old_per_token_logps=batch.old,
        surrogate=surrogate,
    )  # fmt: skip
    assert out.loss.item() == 0
    assert not bool(torch.autograd.grad(out.loss, logps)[0].any())


@pytest.mark.parametrize("surrogate", READY_MADE[:4], ids=str)
def test_a_ratio_beyond_float32_is_no_nan(surrogate):
    """Two rollouts of one token, clipped and without an advantage, beside an ordinary one."""
    logp = torch.tensor([[-1.0], [-1.0], [-1.0]], requires_grad=True)
    old = torch.tensor([[-101.0], [-101.0], [-1.0]])
    advantages = torch.tensor([0.0 if "KLCov" in str(surrogate) else 1.0, 0.0, -1.0])
    out = policy_loss_from_logps(logp, advantages, old_per_token_logps=old, surrogate=surrogate)
    assert bool(out.loss.isfinite())
    assert bool(torch.autograd.grad(out.loss, logp)[0].isfinite().all())


def test_a_single_pass_cannot_know_every_token_first():
    batch = make_batch(SMALL, 17, 5)
    with pytest.raises(
        ValueError, match=r"does not go with surrogate KLCov\(.*, which needs every token's log-probability"
    ):
        run(policy_loss, batch, surrogate="kl_cov", old_per_token_logps=batch.old, schedule="single_pass")
