"""Rewards from verdicts and confidences, against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlvr_ops
from rlvr_ops import crew_reward, ppo_c_reward, prompt4trust_reward, rlcr_reward, trust_grpo_reward

few = settings(max_examples=60, deadline=None, derandomize=True)
NAN = float("nan")


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_rlcr_is_correctness_minus_the_brier_score():
    # 1 - 0^2, 1 - (0.7 - 1)^2 = 0.91, 0 - 0.7^2, 0 - 0
    got = rlcr_reward(torch.tensor([1, 1, 0, 0]), doubles(1.0, 0.7, 0.7, 0.0))
    torch.testing.assert_close(got, doubles(1.0, 0.91, -0.49, 0.0))


@few
@given(p=st.integers(0, 100), q=st.integers(0, 100))
def test_no_stated_confidence_earns_more_rlcr_or_log_score_than_the_true_probability(p, q):
    """A proper scoring rule: the expectation over verdicts is largest at q = p."""

    def expected(reward, stated):
        right, wrong = reward(torch.tensor([1, 0]), doubles(stated / 100, stated / 100))
        return float(p / 100 * right + (1 - p / 100) * wrong)

    for reward in (rlcr_reward, prompt4trust_reward):
        assert expected(reward, p) >= expected(reward, q) - 1e-12


def test_an_unreadable_confidence_makes_rlcr_nan_and_group_advantages_says_so():
    confidences = rlvr_ops.stated_confidences(["<confidence>0.5</confidence>", "very sure"])
    reward = rlcr_reward(torch.tensor([1, 1]), confidences)
    assert reward[0] == 0.75
    assert bool(reward[1].isnan())
    with pytest.raises(ValueError, match=r"rewards must be finite, got nan for rollout 1"):
        rlvr_ops.group_advantages(reward, 2)
    assert reward.nan_to_num(nan=-1.0).tolist() == [0.75, -1.0]


def test_prompt4trust_is_the_log_score_less_one_where_wrong():
    got = prompt4trust_reward(torch.tensor([1, 0, 0]), doubles(0.25, 0.25, 0.0))
    torch.testing.assert_close(got, doubles(math.log(0.25), math.log(0.75) - 1, -1.0))


def test_nothing_readable_earns_less_prompt4trust_than_an_unreadable_confidence():
    worst = prompt4trust_reward(torch.tensor([1, 0, 1, 0]), doubles(0.0, 1.0, NAN, NAN))
    floor = math.log(1e-10)
    torch.testing.assert_close(worst, doubles(floor, floor - 1, math.log(1e-12), math.log(1e-12)))
    assert worst[:2].min() > worst[2:].max()


def test_crew_is_the_mean_probability_of_the_answer_tokens():
    logps = doubles(0.5, 0.2, 0.8, 0.1, 0.3, 0.9).log().reshape(2, 3)
    answer = torch.tensor([[0, 1, 1], [1, 0, 0]])
    torch.testing.assert_close(crew_reward(logps, answer), doubles(0.5, 0.1))
    packed = crew_reward(logps.flatten(), answer.flatten(), torch.tensor([0, 2, 6]))
    torch.testing.assert_close(packed, doubles(0.2, 0.45))  # 0.2 alone; (0.8 + 0.1) / 2


def test_crew_ignores_what_is_not_the_answer_and_is_nan_without_one():
    logps = torch.tensor([[NAN, -0.5, 7.0], [NAN, 1.0, NAN], [-math.inf, 0.0, NAN]])
    got = crew_reward(logps, torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 0]]))
    assert got[0] == pytest.approx(math.exp(-0.5))
    assert bool(got[1].isnan())
    assert got[2] == 0.5  # a token of probability 0 and one of 1


def test_trust_grpo_trusts_a_thinking_reward_that_prefers_correct_rollouts():
    # Means 0.8 (correct) and 0.3 (wrong): gamma 1; step 50 of 100 leaves 0.3 exp(-0.5) of the thinking reward.
    outcome, thinking = doubles(1.0, 1.0, 0.0, 0.0), doubles(0.9, 0.7, 0.4, 0.2)
    got = trust_grpo_reward(outcome, thinking, step=50, total_steps=100, group_size=4)
    torch.testing.assert_close(got, outcome + 0.3 * math.exp(-0.5) * thinking)


def test_trust_grpo_discounts_one_that_prefers_wrong_rollouts_group_by_group():
    # Group 7: means 0.2 and 0.9, gamma exp(-0.7). Group 3: equal means, gamma 1. In any order.
    outcome, thinking = doubles(1.0, 0.5, 0.0, 0.0), doubles(0.2, 0.6, 0.9, 0.6)
    got = trust_grpo_reward(outcome, thinking, step=0, total_steps=10, group_ids=torch.tensor([7, 3, 7, 3]), alpha=0.5)
    trusted = 0.5 * math.exp(-0.7)
    torch.testing.assert_close(got, doubles(1 + trusted * 0.2, 0.5 + 0.3, trusted * 0.9, 0.3))


def test_trust_grpo_leaves_out_a_thinking_reward_it_cannot_judge():
    outcome = doubles(1.0, 0.6, 0.0, 0.4)
    got = trust_grpo_reward(outcome, doubles(0.1, 0.9, 0.5, 0.3), step=0, total_steps=10, group_size=2)
    assert torch.equal(got, outcome)


def test_ppo_c_pays_confidence_above_the_running_mean_and_charges_it_below():
    # The mean takes this batch's 2 in first: 0.1 * 2 + 0.9 * 1 = 1.1. Above it 4 + 0.5 * 4 * 0.3 and 1.1 + 0.5 * 1.1 * -0.5;
    # below it -1 - 0.5 * 1 * 0.5 and 3.9 is above: 3.9 + 0.
    rewards = doubles(4.0, 1.1, -1.0, 3.9)
    got = ppo_c_reward(rewards, doubles(0.8, 0.0, 1.0, 0.5), 1.0)
    torch.testing.assert_close(got.running_mean, torch.tensor(1.1, dtype=torch.float64))
    torch.testing.assert_close(got.rewards, doubles(4.6, 0.825, -1.25, 3.9))


def test_ppo_c_keeps_no_state_of_its_own():
    rewards, confidences = doubles(1.0, 0.0), doubles(0.9, 0.9)
    first = ppo_c_reward(rewards, confidences, 5.0)
    again = ppo_c_reward(rewards, confidences, 5.0)
    assert torch.equal(first.rewards, again.rewards)
    second = ppo_c_reward(rewards, confidences, first.running_mean, ema=0.5)
    # 0.1 * 0.5 + 0.9 * 5 = 4.55; then 0.5 * 0.5 + 0.5 * 4.55 = 2.525
    assert (float(first.running_mean), float(second.running_mean)) == pytest.approx((4.55, 2.525))


def test_ppo_c_without_a_confidence_is_nan_but_counts_in_the_mean():
    got = ppo_c_reward(doubles(1.0, 3.0), doubles(NAN, 0.5), 0.0, ema=1.0)
    assert bool(got.rewards[0].isnan())
    assert (float(got.rewards[1]), float(got.running_mean)) == (3.0, 2.0)


def test_rewards_are_constants_in_float32_or_wider():
    logps = torch.full((1, 2), -0.5, requires_grad=True)
    assert not crew_reward(logps, torch.ones(1, 2)).requires_grad
    half = torch.tensor([0.5], dtype=torch.bfloat16)
    assert rlcr_reward(torch.tensor([True]), half).dtype == torch.float32
    assert trust_grpo_reward(half, half.double(), step=0, total_steps=1, group_size=1).dtype == torch.float32


def test_wrong_inputs_are_named():
    one, half = torch.tensor([1, 0]), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"confidences must lie in \[0, 1\], got 1.5 at 1"):
        rlcr_reward(one, torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"confidences must lie in \[0, 1\], got -0.1 at 0"):
        prompt4trust_reward(one, torch.tensor([-0.1, 0.5]))
    with pytest.raises(ValueError, match=r"confidences must have shape \(B,\), one per answer, got \(1, 2\)"):
        rlcr_reward(one, half[None])
    with pytest.raises(TypeError, match=r"confidences must have a floating dtype, got torch\.int64"):
        rlcr_reward(one, one)
    with pytest.raises(
        ValueError, match=r"correct must have shape \(2,\) like confidences, one verdict for each, got \(3,\)"
    ):
        rlcr_reward(torch.tensor([1, 0, 1]), half)
    with pytest.raises(ValueError, match=r"correct must hold only 0 and 1, got 0\.5: give what the verifier said"):
        prompt4trust_reward(torch.tensor([1.0, 0.5]), half)
    with pytest.raises(ValueError, match="correct must hold only 0 and 1, got nan"):
        rlcr_reward(torch.tensor([1.0, NAN]), half)


def test_wrong_inputs_of_crew_are_named():
    with pytest.raises(ValueError, match=r"answer_mask must have shape \(1, 2\) like per_token_logps, got \(1, 3\)"):
        crew_reward(torch.zeros(1, 2), torch.ones(1, 3))
    with pytest.raises(
        ValueError, match=r"per_token_logps must not be NaN where answer_mask is 1, got NaN at \(0, 1\)"
    ):
        crew_reward(torch.tensor([[0.0, NAN]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"must be at most 0, got 0.9 at \(0, 0\): give log-probabilities"):
        crew_reward(torch.tensor([[0.9]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"cu_seqlens is needed for packed rows \(N,\) = \(3,\)"):
        crew_reward(torch.zeros(3), torch.ones(3))


def test_wrong_inputs_of_trust_grpo_are_named():
    r = torch.tensor([1.0, 0.0])

    def call(outcome=r, thinking=r, **changed):
        return trust_grpo_reward(outcome, thinking, **{"step": 0, "total_steps": 1, "group_size": 2, **changed})

    with pytest.raises(ValueError, match=r"thinking_rewards must have shape \(B,\) = \(2,\) like outcome_rewards"):
        call(thinking=torch.zeros(3))
    with pytest.raises(ValueError, match=r"outcome_rewards must be finite, got nan at \(1,\)"):
        call(outcome=torch.tensor([1.0, NAN]))
    with pytest.raises(ValueError, match=r"group_size .* or group_ids .* is needed, got neither"):
        call(group_size=None)
    with pytest.raises(ValueError, match="alpha must be at least 0 and finite, got -1"):
        call(alpha=-1)
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        call(total_steps=0)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        call(step=-1)


def test_wrong_inputs_of_ppo_c_are_named():
    r, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"rewards must be finite, got inf at \(0,\)"):
        ppo_c_reward(torch.tensor([math.inf, 0.0]), q, 0.0)
    with pytest.raises(ValueError, match="rewards must hold at least one reward, got none"):
        ppo_c_reward(torch.zeros(0), torch.zeros(0), 0.0)
    with pytest.raises(ValueError, match=r"confidences must have shape \(B,\) = \(2,\) like rewards, got \(3,\)"):
        ppo_c_reward(r, torch.zeros(3), 0.0)
    with pytest.raises(ValueError, match="running_mean must be one finite number, got nan"):
        ppo_c_reward(r, q, NAN)
    with pytest.raises(ValueError, match=r"ema must lie in \[0, 1\], got 1.5"):
        ppo_c_reward(r, q, 0.0, ema=1.5)
    with pytest.raises(ValueError, match=r"weight must be at least 0 and finite, got -0\.5"):
        ppo_c_reward(r, q, 0.0, weight=-0.5)
