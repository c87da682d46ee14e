"""What no estimator may depend on, over drawn groups. Rewards are small whole numbers, so that a shift is exact."""

import pytest
import torch
from advantage_cases import CENTRED, extras, permuted
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_ops.advantages import (
    ESTIMATORS,
    ace_advantages,
    easy_but_brittle,
    gdpo_advantages,
    group_advantages,
    informative_groups,
    otb_advantages,
)

SHIFTABLE = (
    "grpo", "dr_grpo", "rloo", "lite_ppo", "gpg", "grpo_passk", "opo", "oblr", "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
)  # fmt: skip
few = settings(max_examples=60, deadline=None, derandomize=True)
ragged = st.lists(st.integers(2, 6), min_size=1, max_size=4)
seeds = st.integers(0, 2**31 - 1)


def drawn(sizes, seed, high=2):
    """Rewards 0 to high - 1 and shuffled group ids of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) * 7 - 5
    r = torch.randint(high, (len(ids),), generator=generator).double()
    return r, ids[torch.randperm(len(ids), generator=generator)], generator


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@few
@given(ragged, seeds, st.sampled_from([e for e in ESTIMATORS if e != "paired"]))
def test_the_order_of_rollouts_does_not_matter(sizes, seed, estimator):
    r, ids, generator = drawn(sizes, seed)
    inputs = extras(estimator, len(r))
    order = torch.randperm(len(r), generator=generator)
    straight = group_advantages(r, group_ids=ids, estimator=estimator, **inputs)
    same(
        group_advantages(r[order], group_ids=ids[order], estimator=estimator, **permuted(inputs, order)),
        straight[order],
    )


@few
@given(ragged, seeds, st.sampled_from(ESTIMATORS))
def test_the_names_of_groups_do_not_matter(sizes, seed, estimator):
    sizes = [sizes[0]] * 2 if estimator == "paired" else sizes
    r, ids, generator = drawn(sizes, seed)
    inputs = extras(estimator, len(r))
    names = torch.randperm(99, generator=generator)
    renamed = group_advantages(r, group_ids=names[ids + 5], estimator=estimator, **inputs)
    same(renamed, group_advantages(r, group_ids=ids, estimator=estimator, **inputs))


@few
@given(ragged, seeds, st.integers(-9, 9), st.sampled_from(SHIFTABLE))
def test_a_shift_of_all_rewards_changes_nothing(sizes, seed, shift, estimator):
    r, ids, _ = drawn(sizes, seed, high=5)
    inputs = extras(estimator, len(r))
    straight = group_advantages(r, group_ids=ids, estimator=estimator, **inputs)
    same(group_advantages(r + shift, group_ids=ids, estimator=estimator, **inputs), straight)


@few
@given(ragged, seeds, st.integers(1, 9))
def test_without_eps_the_scale_of_rewards_does_not_reach_grpo(sizes, seed, scale):
    r, ids, _ = drawn(sizes, seed, high=5)
    same(group_advantages(scale * r, group_ids=ids, eps=0.0), group_advantages(r, group_ids=ids, eps=0.0))


@few
@given(ragged, seeds)
def test_rloo_is_dr_grpo_times_g_over_g_minus_one(sizes, seed):
    r, ids, _ = drawn(sizes, seed, high=5)
    g = (ids[:, None] == ids).sum(1)
    same(
        group_advantages(r, group_ids=ids, estimator="rloo"),
        group_advantages(r, group_ids=ids, estimator="dr_grpo") * g / (g - 1),
    )


@few
@given(ragged, seeds, st.sampled_from(("grpo", "dr_grpo", "rloo", "lite_ppo", "gpg", "maxrl", "bnpo", "lens")))
def test_what_is_centred_sums_to_zero_in_every_group(sizes, seed, estimator):
    r, ids, _ = drawn(sizes, seed)
    advantages = group_advantages(r, group_ids=ids, estimator=estimator, **extras(estimator, len(r)))
    scale = advantages.abs().max().clamp(min=1)
    for group in ids.unique():
        assert advantages[ids == group].sum().abs() < 1e-10 * scale


@few
@given(ragged, seeds, st.sampled_from([e for e in CENTRED if e not in ("paired", "lens", "reinforce_plus_plus")]))
def test_right_answers_are_pushed_up_and_wrong_ones_down_where_a_group_has_both(sizes, seed, estimator):
    r, ids, _ = drawn(sizes, seed)
    advantages = group_advantages(r, group_ids=ids, estimator=estimator, **extras(estimator, len(r)))
    informative = informative_groups(r, group_ids=ids)[torch.unique(ids, return_inverse=True)[1]]
    assert torch.equal(advantages.sign(), (2 * r - 1) * informative)


@few
@given(ragged, seeds)
def test_lens_keeps_the_sign_in_mixed_groups(sizes, seed):
    r, ids, _ = drawn(sizes, seed)
    advantages = group_advantages(r, group_ids=ids, estimator="lens", **extras("lens", len(r)))
    mixed = informative_groups(r, group_ids=ids)[torch.unique(ids, return_inverse=True)[1]]
    assert torch.equal(advantages.sign()[mixed], (2 * r - 1)[mixed])


@few
@given(ragged, seeds, st.integers(1, 6))
def test_easy_but_brittle_is_the_stated_interval_of_pass_rates(sizes, seed, c):
    correct, ids, _ = drawn(sizes, seed)
    expected = []
    for group in ids.unique():
        rows = correct[ids == group]
        g, solved = len(rows), int(rows.sum())
        expected.append(g - c <= solved <= g - 1)
    assert easy_but_brittle(correct, group_ids=ids, c=c).tolist() == expected


# --- ACE on top of them ---------------------------------------------------------------------------------------------

B, T = 8, 5
MASK = torch.arange(T) < torch.tensor([5, 3, 1, 4, 2, 5, 5, 3])[:, None]
CORRECT = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0], dtype=torch.float64)


def advantages_of(estimator):
    """Advantages of two groups, by an estimator or a function of its own."""
    p = torch.rand(B, T, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    if estimator == "otb":
        return otb_advantages(CORRECT, p[..., 0].log(), p.square().sum(-1), MASK, group_size=4)
    if estimator == "gdpo":
        return gdpo_advantages(torch.stack([CORRECT, p[:, 0, 0]], 1), 4)
    return group_advantages(CORRECT, 4, estimator, **extras(estimator, B))


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "gdpo", "otb"])
def test_ace_multiplies_the_negative_advantages_of_every_estimator_and_leaves_the_others(estimator):
    generator = torch.Generator().manual_seed(1)
    old, ref = -torch.rand(2, B, T, dtype=torch.float64, generator=generator)
    plain = advantages_of(estimator)
    weighted = ace_advantages(plain, old, ref, MASK, alpha=2.0)
    confidence = ((old - ref) * MASK).sum(1) / MASK.sum(1)
    weight = 1 + 2 * torch.nn.functional.softplus(confidence)
    weight = weight if plain.ndim == 1 else weight[:, None]
    same(weighted, torch.where(plain < 0, plain * weight, plain))
    assert torch.equal(weighted[plain >= 0], plain[plain >= 0])
    assert bool((plain < 0).any()) == (estimator not in ("psr", "grpo_passk"))
