"""GDPO: several rewards a rollout, against numbers worked out by hand."""

import math

import pytest
import torch

from rlvr_ops import gdpo_advantages, group_advantages

CORRECT = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
BRIEF = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
BOTH = torch.stack([CORRECT, BRIEF], 1)


def check(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_each_reward_is_normalised_before_they_are_added():
    # in a pair a reward that differs becomes +-1/sqrt(2): 1 -1 | 0 0 over sqrt(2), whose sample variance is (1/2 + 1/2) / 3
    check(gdpo_advantages(BOTH, 2, eps=0.0), [math.sqrt(1.5), -math.sqrt(1.5), 0, 0])


def test_weights_multiply_the_normalised_rewards():
    # (1 -1 | 1 - 3, -1 + 3) / sqrt(2): sample variance (1 + 1 + 4 + 4) / 2 / 3 = 5/3
    got = gdpo_advantages(BOTH, 2, reward_weights=[1.0, 3.0], eps=0.0)
    check(got, [x / math.sqrt(2) / math.sqrt(5 / 3) for x in (1, -1, -2, 2)])


def test_eps_stands_beside_both_deviations():
    # the deviation of a pair that differs is 1/sqrt(2)
    x = 0.5 / (math.sqrt(0.5) + 0.1)
    deviation = math.sqrt(2 * x * x / 3) + 0.1
    check(gdpo_advantages(BOTH, 2, eps=0.1), [x / deviation, -x / deviation, 0, 0])


def test_with_lengths_a_rollout_counts_once_a_token():
    # sqrt(2) x is 1 -1 0 0 in 1 + 2 + 1 + 1 tokens: 1 -1 -1 0 0, mean -1/5, sample variance 7/10; so a group of 0 moves too
    got = gdpo_advantages(BOTH, 2, lengths=torch.tensor([1, 2, 1, 1]), eps=0.0)
    check(got, [x / math.sqrt(0.7) for x in (1.2, -0.8, 0.2, 0.2)])


def test_two_rollouts_of_one_sum_get_one_advantage_in_grpo_and_two_in_gdpo():
    r = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    summed = group_advantages(r.sum(1), 4)
    assert summed[0] == summed[1]
    decoupled = gdpo_advantages(r, 4)
    assert decoupled[0] != decoupled[1]


def test_the_scale_of_a_reward_does_not_reach_the_sum():
    scaled = BOTH * torch.tensor([100.0, 0.01])
    torch.testing.assert_close(gdpo_advantages(scaled, 2, eps=0.0), gdpo_advantages(BOTH, 2, eps=0.0))


def test_one_reward_is_grpo_normalised_over_the_batch():
    once = group_advantages(CORRECT, 2)
    torch.testing.assert_close(gdpo_advantages(CORRECT[:, None], 2), once / (once.std() + 1e-4))


def test_groups_may_be_ragged_and_in_any_order():
    r = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, order = torch.tensor([4, 4, 4, 9, 9, 9, 9]), torch.tensor([6, 0, 3, 5, 1, 2, 4])
    torch.testing.assert_close(
        gdpo_advantages(r[order], group_ids=ids[order]), gdpo_advantages(r, group_ids=ids)[order]
    )


@pytest.mark.parametrize("reward", [0.0, 0.1, 1e-30, -7.3])
def test_equal_rewards_get_exactly_zero_whatever_rounding_does_to_a_mean(reward):
    r = torch.full((14, 2), reward)
    assert torch.equal(gdpo_advantages(r, 7, eps=0.0), torch.zeros(14))
    r[0, 1] = 1.0  # only the first group differs
    assert torch.equal(gdpo_advantages(r, 7, eps=0.0)[7:], torch.zeros(7))


def test_the_dtype_is_that_of_the_rewards_and_float32_for_whole_numbers():
    assert gdpo_advantages(BOTH.long(), 2).dtype == torch.float32
    assert torch.equal(gdpo_advantages(BOTH.bfloat16(), 2), gdpo_advantages(BOTH, 2).bfloat16())
    assert gdpo_advantages(torch.zeros(0, 2), 4).shape == (0,)
    assert not gdpo_advantages(BOTH.clone().requires_grad_(), 2).requires_grad


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"rewards must have shape \(B, K\), K rewards per rollout, got \(4,\)"):
        gdpo_advantages(CORRECT, 2)
    with pytest.raises(ValueError, match=r"rewards must have shape \(B, K\).*got \(4, 0\)"):
        gdpo_advantages(torch.zeros(4, 0), 2)
    with pytest.raises(ValueError, match=r"rewards must have a multiple of group_size = 3 entries.*got 4"):
        gdpo_advantages(BOTH, 3)
    with pytest.raises(ValueError, match=r"reward_weights must have K = 2 numbers, one per column of rewards, got 3"):
        gdpo_advantages(BOTH, 2, reward_weights=[1, 1, 1])
    with pytest.raises(ValueError, match="reward_weights must be finite numbers, got nan"):
        gdpo_advantages(BOTH, 2, reward_weights=[1.0, float("nan")])
    with pytest.raises(ValueError, match=r"reward_weights must be finite numbers, got tensor\(1\.\)"):
        gdpo_advantages(BOTH, 2, reward_weights=torch.ones(2))
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        gdpo_advantages(BOTH, 2, eps=-1.0)
    with pytest.raises(ValueError, match="lengths must not be negative, got -1 for rollout 3"):
        gdpo_advantages(BOTH, 2, lengths=torch.tensor([1, 1, 1, -1]))
    unread = BOTH.clone()
    unread[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"rewards\[:, 1\] must be finite, got nan for rollout 2 \(group 1\): did its"):
        gdpo_advantages(unread, 2)
