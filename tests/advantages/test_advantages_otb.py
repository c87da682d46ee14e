"""The optimal token baseline, against numbers worked out by hand and a loop over tokens."""

import pytest
import torch

from rlvr_ops import (
    ace_advantages,
    ace_loss_from_logps,
    group_advantages,
    otb_advantages,
    squared_gradient_norms,
    token_logps,
)

B, T, V, H = 6, 5, 7, 4
IDS = torch.tensor([3, 8, 3, 8, 8, 3])
LENGTHS = torch.tensor([5, 2, 3, 4, 0, 1])
MASK = torch.arange(T) < LENGTHS[:, None]
HOLES = torch.tensor(
    [[1, 0, 0, 1, 1], [1, 1, 1, 0, 1], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]]
)
REWARDS = torch.tensor([1.0, 0.0, 0.25, 2.0, -1.0, 0.5], dtype=torch.float64)


def scores(seed=0):
    p = torch.rand(B, T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    return p[..., 0].log(), p.square().sum(-1)


def by_loop(rewards, logps, squares, mask, ids, ratio=None):
    """The definition, one token after the other, over the tokens that count."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    weights, returns, places = [], [], []
    for b in range(len(mask)):
        at = mask[b].nonzero()[:, 0].tolist()
        energy = [float(1 - 2 * logps[b, t].exp() + squares[b, t]) for t in at]
        energy = energy if ratio is None else [e * float(ratio[b, t]) ** 2 for e, t in zip(energy, at, strict=True)]
        per_token = rewards.ndim == 2
        places.append(at)
        weights.append([sum(energy[: i + 1]) for i in range(len(at))])
        returns.append(
            [sum(float(rewards[b, t]) for t in at[i:]) if per_token else float(rewards[b]) for i in range(len(at))]
        )
    for b, at in enumerate(places):
        for i, t in enumerate(at):
            peers = [c for c in range(len(mask)) if ids[c] == ids[b] and len(places[c]) > i]
            baseline = sum(weights[c][i] * returns[c][i] for c in peers) / sum(weights[c][i] for c in peers)
            out[b, t] = returns[b][i] - (baseline if len(peers) > 1 else 0.0)
    return out


def test_the_baseline_is_weighted_by_what_was_spent_so_far():
    # p = 1/2, 1/2 spends 1/2 a token, p = 1/4, 3/4 of the token with 1/4: 1 - 1/2 + 10/16 = 9/8
    logps = torch.tensor([[0.5, 0.5], [0.25, 0.5]], dtype=torch.float64).log()
    squares = torch.tensor([[0.5, 0.5], [0.625, 0.5]], dtype=torch.float64)
    got = otb_advantages(torch.tensor([1.0, 0.0], dtype=torch.float64), logps, squares, group_size=2)
    first, second = 0.5 / (0.5 + 1.125), 1.0 / (1.0 + 1.625)
    expected = torch.tensor([[1 - first, 1 - second], [-first, -second]], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mask", [MASK, HOLES, torch.ones(B, T)], ids=["padding", "holes", "full"])
@pytest.mark.parametrize("per_token", [False, True], ids=["outcome", "per-token"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "ratio"])
def test_it_is_its_definition(mask, per_token, weighted):
    logps, squares = scores()
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(B, T, dtype=torch.float64, generator=generator) if per_token else REWARDS
    ratio = 2 * torch.rand(B, T, dtype=torch.float64, generator=generator) if weighted else None
    got = otb_advantages(rewards, logps, squares, mask, group_ids=IDS, importance_sampling_ratio=ratio)
    torch.testing.assert_close(got, by_loop(rewards, logps, squares, mask, IDS, ratio), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mask", [MASK, HOLES], ids=["padding", "holes"])
def test_packed_rows_are_the_padded_ones(mask):
    logps, squares = scores()
    padded = otb_advantages(REWARDS, logps, squares, mask, group_ids=IDS)
    kept = torch.arange(T) < T - torch.tensor([0, 0, 1, 1, 5, 0])[:, None]  # masked tokens at the end need not be there
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), kept.sum(1).cumsum(0)])
    given = (logps[kept], squares[kept], mask[kept])
    packed = otb_advantages(REWARDS, *given, group_ids=IDS, cu_seqlens=cu_seqlens)
    assert torch.equal(packed, padded[kept])


def test_the_last_token_of_equally_long_rollouts_has_the_baseline_of_oblr():
    logps, squares = scores()
    got = otb_advantages(REWARDS, logps, squares, group_ids=IDS)[:, -1]
    norms = squared_gradient_norms(logps, squares)
    expected = group_advantages(REWARDS, group_ids=IDS, estimator="oblr", squared_gradient_norms=norms)
    torch.testing.assert_close(got, expected)


def test_the_scores_of_token_logps_are_what_it_takes():
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(B, T, H, generator=generator), torch.randn(V, H, generator=generator)
    ids = torch.randint(V, (B, T), generator=generator)
    found = token_logps(hidden, weight, ids, with_sum_p_squared=True)
    p = (hidden @ weight.T).softmax(-1)
    expected = by_loop(REWARDS, p.gather(-1, ids[..., None])[..., 0].log(), p.square().sum(-1), MASK, IDS)
    got = otb_advantages(REWARDS.float(), found.logps, found.sum_p_squared, MASK, group_ids=IDS)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-6)


def test_a_token_that_no_other_rollout_reaches_has_no_baseline():
    logps, squares = scores()
    got = otb_advantages(REWARDS, logps, squares, MASK, group_ids=IDS)
    assert got[0, 3:].tolist() == [1.0, 1.0]  # of its group only rollout 0 has more than 3 tokens
    alone = otb_advantages(REWARDS, logps, squares, MASK, group_size=1)
    assert torch.equal(alone, REWARDS[:, None] * MASK)


def test_the_ace_loss_weighs_every_negative_token():
    logps, squares = scores()
    ref = scores(seed=1)[0]
    advantages = otb_advantages(REWARDS, logps, squares, MASK, group_ids=IDS)
    given = {"ref_per_token_logps": ref, "completion_mask": MASK, "loss_type": "luspo", "num_items_in_batch": 1}
    got = ace_loss_from_logps(logps, advantages, **given, alpha=1.0)
    weighted = ace_advantages(advantages, logps, ref, MASK)
    torch.testing.assert_close(got.loss, ace_loss_from_logps(logps, weighted, **given, alpha=0.0).loss)
    assert got.loss > ace_loss_from_logps(logps, advantages, **given, alpha=0.0).loss


@pytest.mark.parametrize("reward", [0.0, 0.1, 1e-30, -7.3])
def test_tokens_that_are_worth_the_same_get_exactly_zero(reward):
    logps, squares = scores()
    got = otb_advantages(torch.full((B,), reward), logps, squares, group_size=3)
    assert torch.equal(got, torch.zeros(B, T))


def test_tokens_that_were_certain_count_alike():
    certain, ones = torch.zeros(2, 2), torch.ones(2, 2)
    got = otb_advantages(torch.tensor([1.0, 0.0]), certain, ones, torch.tensor([[1, 1], [1, 0]]), group_size=2)
    assert got.tolist() == [[0.5, 1.0], [-0.5, 0.0]]


def test_what_masked_tokens_hold_is_never_read():
    logps, squares = scores()
    rewards = REWARDS[:, None].expand(B, T)
    clean = otb_advantages(rewards, logps, squares, HOLES, group_ids=IDS)
    nan = torch.where(HOLES != 0, 0.0, float("nan"))
    assert torch.equal(otb_advantages(rewards + nan, logps + nan, squares + nan, HOLES, group_ids=IDS), clean)


def test_the_dtype_is_that_of_the_rewards_and_no_rollouts_are_allowed():
    logps, squares = scores()
    whole = otb_advantages(REWARDS.long(), logps, squares, MASK, group_ids=IDS)
    assert whole.dtype == torch.float32
    assert otb_advantages(REWARDS.bfloat16(), logps, squares, MASK, group_ids=IDS).dtype == torch.bfloat16
    assert not bool((whole.signbit() & (whole == 0)).any())
    empty = torch.zeros(0, T)
    assert otb_advantages(torch.zeros(0), empty, empty, group_size=4).shape == (0, T)
    learnt = REWARDS.clone().requires_grad_()
    assert not otb_advantages(learnt, logps, squares, group_size=3).requires_grad


def test_wrong_inputs_are_named():
    logps, squares = scores()
    with pytest.raises(
        ValueError, match=r"rewards must have one .* \(B,\) = \(6,\) or one per token = \(6, 5\), got \(5,\)"
    ):
        otb_advantages(REWARDS[:5], logps, squares, group_size=3)
    with pytest.raises(ValueError, match=r"sum_p_squared must have shape \(6, 5\) like per_token_logps, got \(6, 4\)"):
        otb_advantages(REWARDS, logps, squares[:, :4], group_size=3)
    with pytest.raises(
        ValueError, match=r"importance_sampling_ratio must have shape \(6, 5\) like per_token_logps, got \(6,\)"
    ):
        otb_advantages(REWARDS, logps, squares, group_size=3, importance_sampling_ratio=REWARDS)
    with pytest.raises(ValueError, match="rewards must have a multiple of group_size = 4 entries"):
        otb_advantages(REWARDS, logps, squares, group_size=4)
    with pytest.raises(ValueError, match=r"completion_mask must have shape \(B, T\) = \(6, 5\) like per_token_logps"):
        otb_advantages(REWARDS, logps, squares, MASK[:, :3], group_size=3)
    for name in ("rewards", "per_token_logps", "sum_p_squared", "importance_sampling_ratio"):
        given = {
            "rewards": REWARDS,
            "per_token_logps": logps,
            "sum_p_squared": squares,
            "importance_sampling_ratio": squares,
        }
        given[name] = given[name].masked_fill(given[name] == given[name].flatten()[0], float("nan"))
        with pytest.raises(ValueError, match=f"{name} must"):
            otb_advantages(**given, group_size=3)


def test_a_reward_that_is_nan_is_refused_by_its_rollout():
    logps, squares = scores()
    rewards = REWARDS.masked_fill(torch.arange(B) == 4, torch.nan)
    with pytest.raises(
        ValueError, match=r"rewards must be finite, got nan for rollout 4 \(group 1\): did its verifier"
    ):
        otb_advantages(rewards, logps, squares, group_size=3)
    per_token = torch.zeros(B, T).index_fill(0, torch.tensor([3]), torch.nan)
    with pytest.raises(
        ValueError, match=r"rewards must be finite, got nan for rollout 3 \(group 8\): did its verifier"
    ):
        otb_advantages(per_token, logps, squares, group_ids=IDS)
    masked = torch.arange(B)[:, None].expand(B, T) != 3
    assert otb_advantages(per_token, logps, squares, masked, group_ids=IDS).isfinite().all()


def test_what_no_policy_can_score_is_refused():
    logps, squares = scores()
    for call in (otb_advantages, squared_gradient_norms):
        given = {"group_size": 3, "rewards": REWARDS} if call is otb_advantages else {}
        with pytest.raises(ValueError, match=r"per_token_logps must be at most 0, got 3 at \(0, 0\)"):
            call(per_token_logps=torch.full((B, T), 3.0).to(logps), sum_p_squared=squares, **given)
        padded = torch.where(MASK.bool(), logps, 3.0)
        assert call(per_token_logps=padded, sum_p_squared=squares, completion_mask=MASK, **given).isfinite().all()
    ratio = torch.full((B, T), -0.5).to(logps)
    with pytest.raises(ValueError, match=r"importance_sampling_ratio must not be negative, got -0.5"):
        otb_advantages(REWARDS, logps, squares, group_size=3, importance_sampling_ratio=ratio)


def test_packed_with_as_many_tokens_as_rollouts_the_rewards_are_one_per_rollout():
    half = torch.full((2,), 0.5)
    given = {"cu_seqlens": torch.tensor([0, 2, 2]), "group_size": 2}
    assert otb_advantages(torch.tensor([1.0, 5.0]), half.log(), half, **given).tolist() == [1.0, 1.0]


def test_the_rollouts_of_a_group_that_has_only_been_certain_count_alike():
    certain = torch.zeros(2, 1), torch.ones(2, 1)
    assert otb_advantages(torch.tensor([1.0, 0.0]), *certain, group_size=2)[:, 0].tolist() == [0.5, -0.5]


def test_a_rollout_that_has_ended_is_in_no_baseline_of_a_group_that_was_certain():
    """Two of three reach the second token: their mean is 1/2, not 1/3."""
    certain, mask = (torch.zeros(3, 2), torch.ones(3, 2)), torch.tensor([[1, 1], [1, 1], [1, 0]])
    got = otb_advantages(torch.tensor([1.0, 0.0, 1.0]), *certain, mask, group_size=3)
    assert got[:, 1].tolist() == [0.5, -0.5, 0.0]
