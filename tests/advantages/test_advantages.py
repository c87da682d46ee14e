import pytest
import torch

from rlvr_ops.advantages import group_advantages, informative_groups, overlong_penalty


def test_grpo_divides_by_the_sample_deviation_plus_eps():
    # r = 1 0 0 0: mean 1/4, sample variance ((3/4)^2 + 3 (1/4)^2) / 3 = 1/4, std 1/2
    got = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), 4, eps=0.1)
    expected = torch.tensor([0.75 / 0.6, -0.25 / 0.6, -0.25 / 0.6, -0.25 / 0.6], dtype=torch.float64)
    torch.testing.assert_close(got, expected)


def test_dr_grpo_only_centres():
    got = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), 3, "dr_grpo")
    torch.testing.assert_close(got, torch.tensor([2.0, -1.0, -1.0, 1.0, 1.0, -2.0]) / 3)


def test_rloo_compares_with_the_mean_of_the_others():
    r = torch.tensor([3.0, 1.0, 2.0, 0.0])
    # 3 - (1+2+0)/3, 1 - (3+2+0)/3, 2 - (3+1+0)/3, 0 - (3+1+2)/3
    torch.testing.assert_close(group_advantages(r, 4, "rloo"), torch.tensor([2.0, -2 / 3, 2 / 3, -2.0]))


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e-30, -7.3])
def test_a_group_of_equal_rewards_gets_exactly_zero_even_where_its_mean_is_rounded(estimator, reward):
    got = group_advantages(torch.full((14,), reward), 7, estimator, eps=0.0)
    assert torch.equal(got, torch.zeros(14))


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo"])
def test_a_group_of_one_gets_zero(estimator):
    assert torch.equal(group_advantages(torch.tensor([1.0, 0.0]), 1, estimator), torch.zeros(2))


def test_groups_do_not_reach_each_other():
    r = torch.tensor([1.0, 0.0, 5.0, 9.0])
    together = group_advantages(r, 2)
    assert torch.equal(together, torch.cat([group_advantages(r[:2], 2), group_advantages(r[2:], 2)]))


def test_the_dtype_is_that_of_the_rewards_and_float32_for_whole_numbers():
    assert group_advantages(torch.tensor([1, 0]), 2).dtype == torch.float32
    assert group_advantages(torch.tensor([True, False]), 2).dtype == torch.float32
    half = group_advantages(torch.tensor([1.0, 0.0, 0.0], dtype=torch.bfloat16), 3)
    assert half.dtype == torch.bfloat16
    single = group_advantages(torch.tensor([1.0, 0.0, 0.0]), 3)
    assert torch.equal(half, single.to(torch.bfloat16))


def test_no_rollouts_give_no_advantages():
    assert group_advantages(torch.zeros(0), 4).shape == (0,)


def test_a_nan_reward_is_an_error_that_names_the_rollout():
    with pytest.raises(ValueError, match=r"rewards must be finite, got nan for rollout 2 \(group 1\)"):
        group_advantages(torch.tensor([1.0, 0.0, float("nan"), 0.0]), 2)
    with pytest.raises(ValueError, match="got inf for rollout 0"):
        group_advantages(torch.tensor([float("inf"), 0.0]), 2)


def test_bad_arguments_are_named():
    r = torch.zeros(6)
    with pytest.raises(ValueError, match=r"rewards must have a multiple of group_size = 4 entries.*got 6"):
        group_advantages(r, 4)
    with pytest.raises(ValueError, match=r"rewards must have shape \(B,\).*got \(2, 3\)"):
        group_advantages(r.reshape(2, 3), 3)
    with pytest.raises(ValueError, match=r"estimator must be one of .*got 'drgrpo'. Did you mean 'dr_grpo'?"):
        group_advantages(r, 3, "drgrpo")
    with pytest.raises(ValueError, match="group_size must be 1 or more, got 0"):
        group_advantages(r, 0)
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        group_advantages(r, 3, eps=-1.0)
    with pytest.raises(ValueError, match=r"'rloo'.*group_size must be 2 or more, got 1"):
        group_advantages(r, 1, "rloo")


def test_informative_groups_are_neither_all_right_nor_all_wrong():
    correct = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0, 0])
    assert informative_groups(correct, 3).tolist() == [False, False, True]
    assert informative_groups(correct.bool(), 3).tolist() == [False, False, True]
    assert informative_groups(correct.float(), 9).tolist() == [True]
    with pytest.raises(ValueError, match="correct must hold only 0 and 1"):
        informative_groups(torch.tensor([0.5, 1.0]), 2)
    with pytest.raises(ValueError, match="correct must have a multiple of group_size = 2"):
        informative_groups(correct, 2)


def test_a_group_is_informative_exactly_when_it_has_an_advantage():
    correct = (torch.arange(256)[:, None] >> torch.arange(8) & 1).reshape(-1)
    moved = group_advantages(correct, 8).reshape(-1, 8).abs().amax(dim=1) > 0
    assert torch.equal(informative_groups(correct, 8), moved)


def test_the_overlong_penalty_falls_to_minus_one_over_the_cache():
    lengths = torch.tensor([0, 16384, 18432, 20480, 30000])
    # DAPO's own numbers: expected length 16384, cache 4096, generation limit 20480; 18432 is halfway down
    got = overlong_penalty(lengths, max_length=20480, cache=4096)
    assert got.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert overlong_penalty(torch.tensor([7, 8, 9]), max_length=8, cache=0).tolist() == [0.0, 0.0, -1.0]
    with pytest.raises(ValueError, match="cache must lie between 0 and max_length = 8, got 9"):
        overlong_penalty(lengths, max_length=8, cache=9)
    with pytest.raises(ValueError, match="lengths must not be negative, got -1"):
        overlong_penalty(torch.tensor([3, -1]), max_length=8, cache=2)


def test_the_overlong_penalty_is_exact_for_small_dtypes_and_refuses_nan():
    small = torch.tensor([95, 100, 250], dtype=torch.uint8)  # 90 - 95 would wrap around to 251
    assert overlong_penalty(small, max_length=100, cache=10).tolist() == [-0.5, -1.0, -1.0]
    lengths = torch.tensor([16384, 17408, 20480, 30000], dtype=torch.int16)  # the expected length of 16384 and more
    assert overlong_penalty(lengths, max_length=20480, cache=4096).tolist() == [0.0, -0.25, -1.0, -1.0]
    rounded = overlong_penalty(torch.tensor([1.0], dtype=torch.float16), max_length=10**9, cache=10**9)
    assert rounded.tolist() == [0.0]
    assert not bool(rounded.signbit().any())  # -1e-9 rounds to 0, not to -0
    with pytest.raises(ValueError, match="lengths must not be negative, got nan"):
        overlong_penalty(torch.tensor([3.0, float("nan")]), max_length=8, cache=2)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_rewards_of_any_scale_are_normalised(scale):
    # squares of these under- or overflow float64
    got = group_advantages(scale * torch.tensor([1.0, 0.0], dtype=torch.float64), 2, eps=0.0)
    torch.testing.assert_close(got, torch.tensor([0.5**0.5, -(0.5**0.5)], dtype=torch.float64))


def test_no_advantage_is_a_negative_zero():
    r = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    tiny = group_advantages((1e-60 * r).float(), 4, "dr_grpo")  # below float32's smallest number
    none = group_advantages(r * 0, 4, "lens", confidences=torch.rand(4), negative_group_weight=0.0)
    right = group_advantages(-0.0 * r, 4, "psr")
    for got in (tiny, none, right):
        assert not bool((got.signbit() & (got == 0)).any())
