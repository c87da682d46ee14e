"""Ragged groups, what has nothing to compare, dtypes, and every wrong argument."""

import itertools

import pytest
import torch
from advantage_cases import CENTRED, extras, permuted

from rlvr_ops.advantages import ESTIMATORS, easy_but_brittle, group_advantages, informative_groups
from rlvr_ops.advantages.groups import make_groups


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_group_ids_in_any_order_are_the_same_groups(estimator):
    r = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.float64)
    inputs = extras(estimator, 8)
    expected = group_advantages(r, 4, estimator, **inputs)
    order = torch.tensor([5, 0, 7, 2, 1, 4, 6, 3])
    ids = torch.tensor([40, 40, 40, 40, -3, -3, -3, -3], dtype=torch.int32)
    got = group_advantages(r[order], group_ids=ids[order], estimator=estimator, **permuted(inputs, order))
    torch.testing.assert_close(got, expected[order], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "estimator", ["grpo", "dr_grpo", "rloo", "grpo_passk", "maxrl", "remax", "opo", "oblr", "lens", "psr"]
)
def test_a_ragged_batch_is_its_groups_one_by_one(estimator):
    r = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0, 0], dtype=torch.float64)
    ids = torch.tensor([2, 9, 9, 2, 7, 9, 7, 7, 7])
    inputs = extras(estimator, 9)
    got = group_advantages(r, group_ids=ids, estimator=estimator, **inputs)
    for group in (2, 7, 9):
        rows = ids == group
        alone = group_advantages(r[rows], int(rows.sum()), estimator, **permuted(inputs, rows))
        torch.testing.assert_close(got[rows], alone, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("estimator", [*CENTRED, "grpo_passk"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e-30, -7.3])
def test_equal_rewards_get_exactly_zero(estimator, reward):
    if estimator in ("bnpo", "maxrl", "paired", "lens") and reward not in (0.0, 1.0):
        reward = 1.0
    inputs = extras(estimator, 14)
    if estimator == "lens":
        inputs["confidences"] = torch.full((14,), 0.3)
    got = group_advantages(torch.full((14,), reward), 7, estimator, eps=0.0, **inputs)
    assert torch.equal(got, torch.zeros(14))


@pytest.mark.parametrize("estimator", [e for e in CENTRED if e != "rloo"])
def test_one_rollout_alone_gets_zero(estimator):
    count = 2 if estimator == "paired" else 1  # the smallest pair is two groups of one
    got = group_advantages(torch.ones(count), 1, estimator, **extras(estimator, count))
    assert torch.equal(got, torch.zeros(count))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_rollouts_give_no_advantages_whatever_the_estimator(estimator):
    for groups in ({"group_size": 4}, {"group_ids": torch.zeros(0, dtype=torch.long)}):
        got = group_advantages(torch.zeros(0), estimator=estimator, **groups, **extras(estimator, 0))
        assert got.shape == (0,)
        assert got.dtype == torch.float32


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_half_precision_is_the_rounding_of_float32_and_float64_stays(estimator):
    r = torch.tensor([1, 0, 0, 1, 0, 0])
    double = group_advantages(r.double(), 3, estimator, **extras(estimator, 6))
    assert double.dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = group_advantages(r.to(dtype), 3, estimator, **extras(estimator, 6))
        assert got.dtype == dtype
        assert torch.equal(got, double.to(dtype))
    assert torch.equal(group_advantages(r, 3, estimator, **extras(estimator, 6)), double.float())


def test_advantages_carry_no_gradient():
    r = torch.tensor([1.0, 0.0], requires_grad=True)
    weights = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not group_advantages(r, 2, "oblr", squared_gradient_norms=weights).requires_grad


def test_tiny_rewards_are_told_apart():
    got = group_advantages(torch.tensor([1e-30, 0.0]), 2, eps=0.0)
    torch.testing.assert_close(got, torch.tensor([0.5**0.5, -(0.5**0.5)]))


def test_group_statistics_are_those_of_each_group():
    values, ids = torch.tensor([1.0, 4.0, 3.0, -2.0]).double(), torch.tensor([6, 2, 6, 2])
    groups = make_groups("values", values, None, ids)
    assert groups.count == 2
    assert groups.size().tolist() == [2, 2, 2, 2]
    assert groups.mean(values).tolist() == [2.0, 1.0, 2.0, 1.0]
    torch.testing.assert_close(groups.std(values), values[[0, 1, 0, 1]].new_tensor([2, 18, 2, 18]).sqrt())
    assert groups.min_each(values).tolist() == [-2.0, 1.0]
    assert groups.max(values).tolist() == [3.0, 4.0, 3.0, 4.0]
    assert groups.weighted_mean(values, torch.tensor([1.0, 0.0, 3.0, 0.0]).double()).tolist() == [2.5, 1.0, 2.5, 1.0]
    assert make_groups("values", values, 1, None).std(values).tolist() == [0.0] * 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_are_finite_and_no_zero_is_negative_whatever_rewards_and_weights_are_zero(estimator):
    given = {
        "remax": {"reward_baselines": torch.tensor([0.0, -0.0, 1.0, -1.0])},
        "opo": {"lengths": torch.tensor([0, 0, 1, 2])},
        "oblr": {"squared_gradient_norms": torch.tensor([-0.0, 0.0, 1e-30, 2.0])},
        "paired": {"pair_ids": torch.zeros(4, dtype=torch.long), "lambda_neg": 0.0},
        "lens": {
            "confidences": torch.tensor([0.1, 1.0, 1e-300, 5e-324], dtype=torch.float64),
            "negative_group_weight": 0.0,
        },
        "w_reinforce": {"positive_weight": 0.0},
    }.get(estimator, {})
    for r in itertools.product([-0.0, 0.0, 1.0], repeat=4):
        got = group_advantages(torch.tensor(r), 2, estimator, eps=0.0, **given)
        assert bool(got.isfinite().all())
        assert not bool((got.signbit() & (got == 0)).any())


def test_the_groups_must_be_given_once():
    r, ids = torch.zeros(4), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"group_size .* or group_ids .* is needed, got neither"):
        group_advantages(r)
    with pytest.raises(ValueError, match=r"group_size .* or group_ids .* is needed, got both"):
        group_advantages(r, 2, group_ids=ids)
    with pytest.raises(ValueError, match=r"group_size .* or group_ids .* is needed, got neither"):
        informative_groups(r)


def test_wrong_group_ids_are_named():
    r = torch.zeros(4)
    with pytest.raises(ValueError, match=r"group_ids must have shape \(B,\) = \(4,\) like rewards, got \(3,\)"):
        group_advantages(r, group_ids=torch.zeros(3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"group_ids must have a whole-number dtype, got torch.float32"):
        group_advantages(r, group_ids=torch.zeros(4))
    with pytest.raises(TypeError, match=r"group_ids must be a torch.Tensor, got list"):
        group_advantages(r, group_ids=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="group_ids must be on cpu like rewards, got meta"):
        group_advantages(r, group_ids=torch.zeros(4, dtype=torch.long, device="meta"))
    with pytest.raises(TypeError, match=r"group_size must be a whole number, got 2\.0"):
        group_advantages(r, 2.0)
    with pytest.raises(TypeError, match=r"rewards must be a torch.Tensor, got list"):
        group_advantages([0.0, 1.0], 2)


def test_a_nan_reward_in_a_ragged_batch_names_rollout_and_group():
    r = torch.tensor([1.0, 0.0, float("nan"), 0.0])
    with pytest.raises(ValueError, match=r"rewards must be finite, got nan for rollout 2 \(group 31\)"):
        group_advantages(r, group_ids=torch.tensor([30, 30, 31, 31]))


@pytest.mark.parametrize("estimator", ["rloo", "grpo_passk"])
def test_a_ragged_group_of_one_is_refused_where_others_are_needed(estimator):
    with pytest.raises(ValueError, match=rf"'{estimator}'.*every group needs 2 or more, group 8 has 1"):
        group_advantages(torch.zeros(3), group_ids=torch.tensor([5, 8, 5]), estimator=estimator)


@pytest.mark.parametrize(
    ("estimator", "function"), [("GDPO", "gdpo_advantages"), ("tir_optimal_token_baseline", "otb_advantages")]
)
def test_what_has_a_function_of_its_own_is_pointed_to(estimator, function):
    with pytest.raises(ValueError, match=f"estimator must be one of .* got '{estimator}': use {function}"):
        group_advantages(torch.zeros(4), 2, estimator)


@pytest.mark.parametrize(
    ("estimator", "missing"),
    [
        ("opo", "lengths"),
        ("remax", "reward_baselines"),
        ("oblr", "squared_gradient_norms"),
        ("lens", "confidences"),
        ("paired", "pair_ids"),
        ("paired", "lambda_neg"),
    ],
)
def test_what_an_estimator_needs_is_asked_for(estimator, missing):
    inputs = extras(estimator, 4)
    del inputs[missing]
    with pytest.raises(ValueError, match=f"{missing} is needed by estimator '{estimator}'"):
        group_advantages(torch.zeros(4), 2, estimator, **inputs)


@pytest.mark.parametrize(
    ("given", "users"),
    [
        ({"lengths": torch.ones(4)}, "opo or reinforce_plus_plus or reinforce_plus_plus_baseline"),
        ({"reward_baselines": torch.ones(4)}, "remax"),
        ({"squared_gradient_norms": torch.ones(4)}, "oblr"),
        ({"confidences": torch.ones(4)}, "lens"),
        ({"pair_ids": torch.zeros(4, dtype=torch.long)}, "paired"),
        ({"lambda_neg": 1.0}, "paired"),
        ({"positive_weight": 0.1}, "w_reinforce"),
        ({"negative_group_weight": 0.25}, "lens"),
    ],
)
def test_what_an_estimator_would_ignore_is_refused(given, users):
    (name,) = given
    with pytest.raises(ValueError, match=f"{name} is for estimator {users}, not grpo: drop it"):
        group_advantages(torch.zeros(4), 2, **given)


@pytest.mark.parametrize("estimator", ["maxrl", "bnpo", "psr", "nsr", "w_reinforce", "paired", "lens"])
def test_shaped_rewards_are_refused_where_right_or_wrong_is_meant(estimator):
    r = torch.tensor([1.0, 0.0, -0.5, 0.0])
    with pytest.raises(ValueError, match=f"rewards must hold only 0 and 1: estimator '{estimator}' needs"):
        group_advantages(r, 2, estimator, **extras(estimator, 4))


@pytest.mark.parametrize(
    ("estimator", "changed", "error", "message"),
    [
        ("opo", {"lengths": torch.ones(3)}, ValueError, r"lengths must have shape \(B,\) = \(4,\) like rewards, got \(3,\)"),
        ("opo", {"lengths": torch.tensor([1, -2, 1, 1])}, ValueError, "lengths must not be negative, got -2 for rollout 1"),
        ("opo", {"lengths": [1, 1, 1, 1]}, TypeError, "lengths must be a torch.Tensor, got list"),
        ("remax", {"reward_baselines": 0.5}, TypeError, "reward_baselines must be a torch.Tensor, got float"),
        (
            "remax",
            {"reward_baselines": torch.tensor([1.0, float("nan"), 1.0, 1.0])},
            ValueError,
            "reward_baselines must be finite, got nan for rollout 1",
        ),
        (
            "oblr",
            {"squared_gradient_norms": torch.tensor([1.0, 1.0, float("inf"), 1.0])},
            ValueError,
            "squared_gradient_norms must be finite, got inf for rollout 2",
        ),
        (
            "lens",
            {"confidences": torch.tensor([0.5, 0.0, 0.5, 0.5])},
            ValueError,
            "confidences must be probabilities above 0, got 0.0 for rollout 1",
        ),
        (
            "lens",
            {"confidences": torch.tensor([0.5, 0.5, 0.5, 1.5])},
            ValueError,
            "confidences must be probabilities above 0, got 1.5 for rollout 3",
        ),
        ("lens", {"negative_group_weight": -1.0}, ValueError, "negative_group_weight must be a number of at least 0, got -1.0"),
        ("lens", {"negative_group_weight": torch.ones(4)}, TypeError, "negative_group_weight must be a number, got a tensor"),
        ("paired", {"lambda_neg": "1"}, ValueError, "lambda_neg must be a number of at least 0, got '1'"),
        ("paired", {"pair_ids": torch.ones(4)}, TypeError, "pair_ids must have a whole-number dtype, got torch.float32"),
        (
            "paired",
            {"pair_ids": torch.tensor([6, 7, 6, 7])},
            ValueError,
            "pair_ids must be equal for all rollouts of a group, got a group in two pairs",
        ),
        (
            "paired",
            {"pair_ids": torch.tensor([6, 6, 7, 7])},
            ValueError,
            "pair_ids must give every pair two groups, got 1 for pair 6",
        ),
    ],
)  # fmt: skip
def test_wrong_inputs_of_estimators_are_named(estimator, changed, error, message):
    with pytest.raises(error, match=message):
        group_advantages(torch.zeros(4), 2, estimator, **{**extras(estimator, 4), **changed})


def test_informative_groups_may_be_ragged_and_come_in_the_order_of_their_ids():
    correct = torch.tensor([1, 0, 1, 0, 1, 1])
    ids = torch.tensor([9, 4, 9, 4, 4, 2])
    assert informative_groups(correct, group_ids=ids).tolist() == [False, True, False]
    assert informative_groups(torch.zeros(0), 3).tolist() == []


def test_easy_but_brittle_prompts_fail_once_to_c_times():
    # 8 rollouts with 0 to 8 failures; [1 - c/8, 1 - 1/8] is 1 to c failures
    correct = (torch.arange(8) >= torch.arange(9)[:, None]).reshape(-1)
    assert easy_but_brittle(correct, 8, c=1).tolist() == [False, True] + [False] * 7
    assert easy_but_brittle(correct.long(), 8, c=2.5).tolist() == [False, True, True] + [False] * 6
    ids = torch.tensor([3, 1, 3, 1, 1])
    assert easy_but_brittle(torch.tensor([1, 1, 1, 0, 1]), group_ids=ids, c=1).tolist() == [True, False]
    with pytest.raises(ValueError, match="c must be at least 1, the failures a group may have, got 0"):
        easy_but_brittle(correct, 8, c=0)
    with pytest.raises(ValueError, match="correct must hold only 0 and 1"):
        easy_but_brittle(torch.tensor([0.5, 1.0]), 2, c=1)
