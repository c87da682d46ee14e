"""Every estimator against numbers worked out by hand."""

import itertools
import math

import pytest
import torch

from rlvr_ops.advantages import estimators, group_advantages
from rlvr_ops.advantages.groups import make_groups


def check(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def rewards(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_lite_ppo_divides_by_the_deviation_of_the_batch():
    # the batch 3 1 | 5 3: mean 3, sample variance (0 + 4 + 4 + 0) / 3 = 8/3; the groups' means are 2 and 4
    deviation = math.sqrt(8 / 3) + 0.1
    got = group_advantages(rewards(3, 1, 5, 3), 2, "lite_ppo", eps=0.1)
    check(got, [1 / deviation, -1 / deviation, 1 / deviation, -1 / deviation])


def test_gpg_makes_up_for_the_groups_without_a_gradient():
    # 2 of 6 rollouts are in a group that differs: 6/2 (r - mean)
    check(group_advantages(rewards(1, 1, 1, 0, 0, 0), 2, "gpg"), [0, 0, 1.5, -1.5, 0, 0])


def test_gpg_is_dr_grpo_where_every_group_differs():
    r = rewards(3, 1, 2, 5, 2, 0)
    check(group_advantages(r, 3, "gpg"), group_advantages(r, 3, "dr_grpo").tolist())


def test_grpo_passk_credits_the_best_rollout_with_its_lead():
    # std of 4 1 0 3 is sqrt((4 + 1 + 4 + 1) / 3); the best leads by 4 - 3
    lead = 1 / (math.sqrt(10 / 3) + 0.1)
    check(group_advantages(rewards(4, 1, 0, 3), 4, "grpo_passk", eps=0.1), [lead, 0, 0, 0])


def test_grpo_passk_gives_nothing_where_two_are_best():
    check(group_advantages(rewards(4, 1, 4, 3), 4, "grpo_passk"), [0, 0, 0, 0])


def test_maxrl_divides_by_the_pass_rate():
    # p = 1/4: (1 - 1/4) / (1/4) = 3 and -1; all right and all wrong groups get 0
    r = rewards(1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0)
    check(group_advantages(r, 4, "maxrl"), [3, -1, -1, -1] + [0] * 8)


@pytest.mark.parametrize("p", [0.1, 1 / 3, 0.9])
def test_maxrl_follows_the_first_terms_of_the_log_pass_rate(p):
    # log p = -sum_k (1 - p)^k / k, with the derivative sum_k (1 - p)^(k - 1). Over all outcomes of G = 4 answers, right with
    # probability p, the policy gradient is the first 3 terms of it: a fourth would need a gradient where all are wrong.
    total = 0.0
    for drawn in itertools.product((1.0, 0.0), repeat=4):
        r = rewards(*drawn)
        slope = r / p - (1 - r) / (1 - p)  # of each answer's log-probability by p
        likelihood = (r * p + (1 - r) * (1 - p)).prod()
        total += float(likelihood * (group_advantages(r, 4, "maxrl") * slope).mean())
    assert total == pytest.approx(1 + (1 - p) + (1 - p) ** 2, rel=1e-12)


def test_remax_compares_with_the_greedy_completion():
    baselines = rewards(1, 1, 0.25, 0.25)
    check(group_advantages(rewards(1, 0, 1, 0), 2, "remax", reward_baselines=baselines), [0, -1, 0.75, -0.25])


def test_opo_weighs_the_baseline_by_length():
    # (10 1 + 30 0 + 20 1 + 40 0) / 100 = 3/10
    check(
        group_advantages(rewards(1, 0, 1, 0), 4, "opo", lengths=torch.tensor([10, 30, 20, 40])), [0.7, -0.3, 0.7, -0.3]
    )


def test_opo_with_equal_lengths_is_dr_grpo():
    r = rewards(3, 1, 2, 0)
    check(group_advantages(r, 4, "opo", lengths=torch.full((4,), 7)), group_advantages(r, 4, "dr_grpo").tolist())


def test_a_group_without_a_token_counts_its_rollouts_alike():
    got = group_advantages(rewards(1, 0, 1, 0), 2, "opo", lengths=torch.tensor([0, 0, 3, 1]))
    check(got, [0.5, -0.5, 0.25, -0.75])


def test_oblr_weighs_the_baseline_by_the_squared_gradient():
    # (1 3 + 2 1 + 1 2) / 4 = 7/4
    got = group_advantages(rewards(3, 1, 2), 3, "oblr", squared_gradient_norms=rewards(1, 2, 1))
    check(got, [1.25, -0.75, 0.25])


def test_the_oblr_baseline_has_the_least_second_moment():
    generator = torch.Generator().manual_seed(0)
    r, w = torch.rand(2, 8, dtype=torch.float64, generator=generator)
    best = r - group_advantages(r, 8, "oblr", squared_gradient_norms=w)
    moments = [(w * (r - best - shift).square()).sum() for shift in (-1e-3, 0.0, 1e-3)]
    assert moments[1] < moments[0]
    assert moments[1] < moments[2]


def test_bnpo_divides_by_the_density_of_the_batch_of_pass_rates():
    # rates 1/4 1/2 3/4: mean 1/2, sample variance 1/16, so a0 + b0 = (1/4) / (1/16) - 1 = 3, a0 = b0 = 3/2 and
    # a = b = 1 + (3/2) / 3 = 3/2: density 8 / pi sqrt(p (1 - p)), which is 2 sqrt(3) / pi at 1/4, 4 / pi at 1/2
    r = rewards(1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0)
    quarter, half = math.pi / (2 * math.sqrt(3)), math.pi / 4
    easy_and_hard = [0.75 * quarter] + [-0.25 * quarter] * 3, [0.25 * quarter] * 3 + [-0.75 * quarter]
    check(group_advantages(r, 4, "bnpo"), easy_and_hard[0] + [half / 2] * 2 + [-half / 2] * 2 + easy_and_hard[1])


def test_the_bnpo_density_is_torchs():
    rates = torch.tensor([0.1, 0.3, 0.35, 0.8], dtype=torch.float64)
    a, b = estimators.beta_of_rates(rates)
    # moments of Beta(a0, b0) with a0 = 3 (a - 1), b0 = 3 (b - 1) are those of the rates
    prior = torch.distributions.Beta(3 * (a - 1), 3 * (b - 1))
    torch.testing.assert_close(prior.mean, rates.mean())
    torch.testing.assert_close(prior.variance, rates.var())
    r = (torch.arange(20) < (20 * rates)[:, None].round()).double().reshape(-1)
    density = torch.distributions.Beta(a, b).log_prob(rates).exp().repeat_interleave(20)
    torch.testing.assert_close(group_advantages(r, 20, "bnpo"), (r - rates.repeat_interleave(20)) / density)


@pytest.mark.parametrize("r", [(1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)])
def test_bnpo_of_pass_rates_that_do_not_vary_only_centres(r):
    check(group_advantages(rewards(*r), 3, "bnpo"), group_advantages(rewards(*r), 3, "dr_grpo").tolist())


def test_bnpo_of_pass_rates_spread_wider_than_any_beta_distribution_only_centres():
    # rates 0 1 1/4: mean 5/12, variance 13/48 > 35/144 = mean (1 - mean), so a0 and b0 would be negative
    r = rewards(0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0)
    check(group_advantages(r, 4, "bnpo"), [0.0] * 8 + [0.75, -0.25, -0.25, -0.25])


def test_bnpo_bounds_its_scale_as_the_published_code_does():
    # 30 groups at 1/2 and one at 1/100: the density at 1/100 is below 1e-6
    r = torch.cat([(torch.arange(100) < 50).double().repeat(30), (torch.arange(100) < 1).double()])
    last = group_advantages(r, 100, "bnpo")[-100:]
    check(last[:2], [0.99e6, -0.01e6])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("psr", [1.0, 0.0, 1.0]), ("nsr", [0.0, -1.0, 0.0]), ("w_reinforce", [0.1, -1.0, 0.1])],
)
def test_psr_nsr_and_their_weighted_sum(estimator, expected):
    check(group_advantages(rewards(1, 0, 1), 3, estimator), expected)


def test_w_reinforce_is_weighted_psr_plus_nsr():
    r = rewards(1, 0, 1)
    both = 0.3 * group_advantages(r, 3, "psr") + group_advantages(r, 3, "nsr")
    check(group_advantages(r, 3, "w_reinforce", positive_weight=0.3), both.tolist())


def test_paired_normalises_over_both_prompts():
    # u = 1 -1 1 1: mean 1/2, sample variance (1/4 + 9/4 + 1/4 + 1/4) / 3 = 1
    got = group_advantages(
        rewards(1, 0, 1, 1), 2, "paired", pair_ids=torch.tensor([5, 5, 5, 5]), lambda_neg=1.0, eps=0.25
    )
    check(got, [0.4, -1.2, 0.4, 0.4])


def test_one_lambda_neg_for_both_prompts_cancels():
    r, pair = rewards(1, 0, 1, 1), torch.zeros(4, dtype=torch.long)
    small, large = (group_advantages(r, 2, "paired", pair_ids=pair, lambda_neg=x, eps=0.0) for x in (0.5, 3.0))
    torch.testing.assert_close(small, large)
    torch.testing.assert_close(small, group_advantages(r, 4, "grpo", eps=0.0))


def test_a_lambda_neg_for_each_rollout_does_not_cancel():
    # u = 1 0 1 -2: mean 0, sample variance 6 / 3 = 2
    got = group_advantages(
        rewards(1, 0, 1, 0),
        2,
        "paired",
        pair_ids=torch.ones(4, dtype=torch.long),
        lambda_neg=rewards(0, 0, 2, 2),
        eps=0.0,
    )
    check(got, [x / math.sqrt(2) for x in (1, 0, 1, -2)])


def test_pairs_do_not_reach_each_other():
    r = rewards(1, 0, 1, 1, 0, 0, 1, 0)
    pair_ids = torch.tensor([1, 1, 2, 2, 1, 1, 2, 2])
    got = group_advantages(r, 2, "paired", pair_ids=pair_ids, lambda_neg=1.0)
    alone = group_advantages(r[pair_ids == 2], 2, "paired", pair_ids=torch.zeros(4, dtype=torch.long), lambda_neg=1.0)
    assert torch.equal(got[pair_ids == 2], alone)


def test_reinforce_plus_plus_normalises_over_the_batch():
    # mean 2, sample variance 4/3, and 1e-8 under the root
    deviation = math.sqrt(4 / 3 + 1e-8)
    got = group_advantages(rewards(3, 1, 1, 3), 2, "reinforce_plus_plus")
    check(got, [1 / deviation, -1 / deviation, -1 / deviation, 1 / deviation])


def test_reinforce_plus_plus_counts_a_rollout_once_a_token():
    # four tokens 1 0 0 0: mean 1/4, sample variance 1/4; the 1e-8 under the root takes 2e-8 of it
    got = group_advantages(rewards(1, 0), 2, "reinforce_plus_plus", lengths=torch.tensor([1, 3]))
    check(got, [1.5 / math.sqrt(1 + 4e-8), -0.5 / math.sqrt(1 + 4e-8)])


def test_reinforce_plus_plus_of_a_batch_without_a_token_counts_its_rollouts_alike():
    r = rewards(3, 1, 1, 3)
    got = group_advantages(r, 2, "reinforce_plus_plus", lengths=torch.zeros(4, dtype=torch.long))
    check(got, group_advantages(r, 2, "reinforce_plus_plus").tolist())


def test_reinforce_plus_plus_baseline_normalises_what_the_groups_mean_leaves():
    # centred 1 -1 | 2 -2: sample variance 10/3, and 1e-8 under the root
    deviation = math.sqrt(10 / 3 + 1e-8)
    got = group_advantages(rewards(3, 1, 9, 5), 2, "reinforce_plus_plus_baseline")
    check(got, [1 / deviation, -1 / deviation, 2 / deviation, -2 / deviation])


def test_reinforce_plus_plus_baseline_counts_a_rollout_once_a_token():
    # centred 1 -1 | 0 0 in 1 + 2 + 2 tokens: 1 -1 -1 0 0, mean -1/5, sample variance (36 + 16 + 16 + 1 + 1) / 25 / 4 = 7/10
    got = group_advantages(rewards(3, 1, 2, 2), 2, "reinforce_plus_plus_baseline", lengths=torch.tensor([1, 2, 2, 0]))
    check(got, [x / math.sqrt(0.7 + 1e-8) for x in (1.2, -0.8, 0.2, 0.2)])


def test_reinforce_plus_plus_baseline_over_rollouts_leaves_groups_without_a_difference_alone():
    got = group_advantages(rewards(0.7, 0.1, 0.3, 1, 1, 1), 3, "reinforce_plus_plus_baseline")
    assert torch.equal(got[3:], torch.zeros(3, dtype=torch.float64))


def test_lens_calibrates_wrong_answers_by_their_confidence():
    # mixed: G / sum(r / p) = 4 / 2 = 2 > 2 max p = 1, so D = 2: -(1/4) (1/4) / (7/4) = -1/28, -(1/4) (1/8) / (15/8) = -1/60
    r, p = rewards(1, 0, 0, 0), rewards(0.5, 0.25, 0.25, 0.125)
    check(estimators.lens_rewards(r, make_groups("r", r, 4, None), p), [1, -1 / 28, -1 / 28, -1 / 60])
    # the wrong answer is the surest: 3 / 4 < 2 max p = 9/5, so D - p = p and it gets -1/3
    r, p = rewards(1, 1, 0), rewards(0.5, 0.5, 0.9)
    check(estimators.lens_rewards(r, make_groups("r", r, 3, None), p), [1, 1, -1 / 3])


def test_lens_is_grpo_of_the_calibrated_rewards_in_mixed_groups():
    r, p = rewards(1, 0, 0, 0), rewards(0.5, 0.25, 0.25, 0.125)
    calibrated = rewards(1, -1 / 28, -1 / 28, -1 / 60)
    got = group_advantages(r, 4, "lens", confidences=p, eps=0.1)
    torch.testing.assert_close(got, group_advantages(calibrated, 4, "grpo", eps=0.1))


def test_lens_pushes_down_the_surest_of_a_group_that_is_all_wrong():
    # D = 2 max p = 1: calibrated -(1/2) 1 = -1/2 and -(1/2) (1/4) / (3/4) = -1/6, mean -1/3
    r, p = rewards(0, 0), rewards(0.5, 0.25)
    check(group_advantages(r, 2, "lens", confidences=p), [-1 / 24, 1 / 24])
    check(group_advantages(r, 2, "lens", confidences=p, negative_group_weight=1.0), [-1 / 6, 1 / 6])


def test_lens_leaves_groups_alone_that_are_all_right_or_all_as_sure():
    got = group_advantages(rewards(1, 1, 0, 0), 2, "lens", confidences=rewards(0.3, 0.9, 0.4, 0.4))
    assert torch.equal(got, torch.zeros(4, dtype=torch.float64))
