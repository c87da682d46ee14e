"""Advantages against verl's own functions, on the same rewards, groups and lengths."""

import numpy as np
import pytest
import torch

from rlvr_ops import gdpo_advantages, group_advantages, otb_advantages, squared_gradient_norms

pytestmark = pytest.mark.parity

B, T = 11, 9
IDS = torch.tensor([3, 8, 3, 5, 8, 3, 5, 8, 8, 3, 3])  # groups of 5, 2 and 4, mixed
LENGTHS = torch.tensor([9, 2, 5, 1, 7, 3, 9, 4, 6, 8, 2])
MASK = (torch.arange(T) < LENGTHS[:, None]).float()
BINARY = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1])  # group 5 is all right
SHAPED = torch.tensor([0.3, -1.2, 0.0, 2.5, 0.9, 0.9, -0.4, 1.0, 0.1, 0.3, -2.0])
AS_TEXT = np.array([f"prompt-{int(i)}" for i in IDS], dtype=object)

both = pytest.mark.parametrize("rewards", [BINARY, SHAPED], ids=["binary", "shaped"])


@pytest.fixture(autouse=True, scope="module")
def verl():
    """Import verl with the first test: it takes seconds, and every run of other tests collects this file."""
    global core_algos
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")


def at_the_last_token(rewards, lengths=LENGTHS, width=T):
    return torch.zeros(len(rewards), width).scatter(1, lengths[:, None] - 1, rewards[:, None])


def per_rollout(advantages, mask=MASK):
    """verl's one advantage per rollout, from its (B, T) where the mask is 1 and 0 elsewhere."""
    assert torch.equal(advantages, advantages[:, :1] * mask)
    return advantages[:, 0]


def check(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("function", ["compute_grpo_outcome_advantage", "compute_grpo_vectorized_outcome_advantage"])
def test_grpo(rewards, function):
    theirs, _ = getattr(core_algos, function)(at_the_last_token(rewards), MASK, AS_TEXT)
    check(group_advantages(rewards, group_ids=IDS, eps=1e-6), per_rollout(theirs))


@both
def test_dr_grpo_is_grpo_not_divided(rewards):
    theirs, _ = core_algos.compute_grpo_outcome_advantage(
        at_the_last_token(rewards), MASK, AS_TEXT, norm_adv_by_std_in_grpo=False
    )
    check(group_advantages(rewards, group_ids=IDS, estimator="dr_grpo"), per_rollout(theirs))


@both
@pytest.mark.parametrize("function", ["compute_rloo_outcome_advantage", "compute_rloo_vectorized_outcome_advantage"])
def test_rloo(rewards, function):
    theirs, _ = getattr(core_algos, function)(at_the_last_token(rewards), MASK, AS_TEXT)
    check(group_advantages(rewards, group_ids=IDS, estimator="rloo"), per_rollout(theirs))


@both
def test_opo(rewards):
    theirs, _ = core_algos.compute_opo_outcome_advantage(at_the_last_token(rewards), MASK, AS_TEXT)
    check(group_advantages(rewards, group_ids=IDS, estimator="opo", lengths=LENGTHS), per_rollout(theirs))


@both
def test_reinforce_plus_plus_whitens_over_tokens(rewards):
    config = core_algos.AlgoConfig(gamma=1.0)
    theirs, _ = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        at_the_last_token(rewards), MASK, config=config
    )
    ours = group_advantages(rewards, group_ids=IDS, estimator="reinforce_plus_plus", lengths=LENGTHS)
    check(ours, per_rollout(theirs))


@both
def test_reinforce_plus_plus_over_rollouts_is_verls_where_all_have_one_token(rewards):
    one = torch.ones(B, 1)
    config = core_algos.AlgoConfig(gamma=1.0)
    theirs, _ = core_algos.compute_reinforce_plus_plus_outcome_advantage(rewards[:, None], one, config=config)
    check(group_advantages(rewards, group_ids=IDS, estimator="reinforce_plus_plus"), per_rollout(theirs, one))


@both
def test_reinforce_plus_plus_baseline(rewards):
    theirs, _ = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
        at_the_last_token(rewards), MASK, AS_TEXT
    )
    estimator = "reinforce_plus_plus_baseline"
    check(group_advantages(rewards, group_ids=IDS, estimator=estimator, lengths=LENGTHS), per_rollout(theirs))


@both
def test_remax(rewards):
    greedy = torch.tensor([0.0, 1.0, 0.5])[torch.unique(IDS, return_inverse=True)[1]]
    theirs, _ = core_algos.compute_remax_outcome_advantage(at_the_last_token(rewards), greedy, MASK)
    ours = group_advantages(rewards, group_ids=IDS, estimator="remax", reward_baselines=greedy)
    check(ours, per_rollout(theirs))


@both
def test_grpo_passk(rewards):
    def theirs(**config):
        return per_rollout(
            core_algos.compute_grpo_passk_outcome_advantage(at_the_last_token(rewards), MASK, AS_TEXT, config=config)[0]
        )

    ours = group_advantages(rewards, group_ids=IDS, estimator="grpo_passk", eps=1e-6)
    check(ours, theirs())
    deviations = torch.stack([rewards[i == IDS].std() for i in IDS])
    check(ours * (deviations + 1e-6), theirs(norm_adv_by_std_in_grpo=False))


@both
def test_verls_gpg_counts_nonzero_rewards_and_ours_the_rollouts_that_have_a_gradient(rewards):
    for r in (rewards, 1 - rewards):
        theirs, _ = core_algos.compute_gpg_outcome_advantage(at_the_last_token(r), MASK, AS_TEXT)
        differ = sum(bool(r[i == IDS].unique().numel() > 1) for i in IDS)  # the paper's B - M
        ours = group_advantages(r, group_ids=IDS, estimator="gpg")
        check(ours * differ / int(r.count_nonzero()), per_rollout(theirs))


@pytest.mark.parametrize("weights", [None, [2.0, 0.5]], ids=["equal", "weighted"])
def test_gdpo_is_whitened_over_tokens(weights):
    rewards = torch.stack([BINARY, SHAPED], 1)
    config = core_algos.AlgoConfig(gdpo_reward_keys=["right", "brief"], gdpo_reward_weights=weights)
    attention = torch.cat([torch.ones(B, 2), MASK], 1)
    theirs, _ = core_algos.compute_gdpo_outcome_advantage(
        at_the_last_token(SHAPED), MASK, AS_TEXT, config=config,
        non_tensor_batch={"right": BINARY.numpy(), "brief": SHAPED.numpy()},
        batch={"prompts": torch.ones(B, 2), "attention_mask": attention.long()},
    )  # fmt: skip
    ours = gdpo_advantages(rewards, group_ids=IDS, reward_weights=weights, lengths=LENGTHS, eps=1e-6)
    check(ours, per_rollout(theirs))


# --- a baseline for each token --------------------------------------------------------------------------------------

HOLES = MASK * (torch.arange(T) % 3 != torch.arange(B)[:, None] % 3)  # what a tool wrote lies somewhere else in each
BASELINES = {
    "one turn": "compute_optimal_token_baseline_advantage",
    "several turns": "compute_multi_turn_optimal_token_baseline_advantage",
}


def scores():
    probabilities = torch.rand(B, T, 13, generator=torch.Generator().manual_seed(0)).softmax(-1)
    return probabilities[..., 0].log(), probabilities.square().sum(-1)


@both
@pytest.mark.parametrize("function", BASELINES.values(), ids=list(BASELINES))
@pytest.mark.parametrize("weighted", [False, True], ids=["", "ratio"])
def test_optimal_token_baseline(rewards, function, weighted):
    ratio = 2 * torch.rand(B, T, generator=torch.Generator().manual_seed(1)) if weighted else None
    given = (at_the_last_token(rewards), MASK, AS_TEXT, *scores())
    theirs, _ = getattr(core_algos, function)(*given, rollout_is_weights=ratio)
    ours = otb_advantages(rewards, *scores(), MASK, group_ids=IDS, importance_sampling_ratio=ratio)
    check(ours, theirs)
    check(otb_advantages(given[0], *scores(), MASK, group_ids=IDS, importance_sampling_ratio=ratio), theirs)


@both
def test_what_a_tool_wrote_moves_no_baseline_here_and_in_verls_form_for_several_turns(rewards):
    per_token = torch.randn(B, T, generator=torch.Generator().manual_seed(2)) + rewards[:, None]
    given = (per_token, HOLES, AS_TEXT, *scores())
    one, several = (getattr(core_algos, function)(*given)[0] for function in BASELINES.values())
    ours = otb_advantages(per_token, *scores(), HOLES, group_ids=IDS)
    check(ours, several)
    assert (ours - one).abs().max() > 0.1


def test_verl_can_give_a_tail_that_nobody_else_reaches_its_own_return_for_a_baseline():
    given = (at_the_last_token(SHAPED), MASK, AS_TEXT, *scores())
    theirs, _ = core_algos.compute_optimal_token_baseline_advantage(*given, handle_zero_tail=False)
    others = torch.stack([MASK[i == IDS].sum(0) for i in IDS]) - 1
    ours = otb_advantages(SHAPED, *scores(), MASK, group_ids=IDS)
    assert int(((others == 0) * MASK).sum()) > 0
    check(torch.where(others == 0, 0.0, ours), theirs)


def test_verl_has_no_baseline_where_every_token_was_certain():
    rewards, ones = torch.tensor([1.0, 0.0]), torch.ones(2, 1)
    index = np.array(["one"] * 2, dtype=object)
    theirs, _ = core_algos.compute_optimal_token_baseline_advantage(rewards[:, None], ones, index, ones * 0, ones)
    assert theirs.flatten().tolist() == [1.0, 0.0]  # 0 / (0 + 1e-8)
    assert otb_advantages(rewards, ones * 0, ones, group_size=2).flatten().tolist() == [0.5, -0.5]


def test_every_estimator_of_verls_registry_is_compared_here_or_needs_a_critic():
    names = {"grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "remax", "gpg", "grpo_passk", "gdpo"}
    names |= {"reinforce_plus_plus", "reinforce_plus_plus_baseline"}
    names |= {"optimal_token_baseline", "tir_optimal_token_baseline"}
    assert {estimator.value for estimator in core_algos.AdvantageEstimator} == names | {"gae"}


@both
def test_oblr_is_the_optimal_token_baseline_at_the_last_token_of_equally_long_rollouts(rewards):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(B, T, 13, generator=generator).softmax(-1)
    logps, squares = probabilities[..., 0].log(), probabilities.square().sum(-1)
    full, lengths = torch.ones(B, T), torch.full((B,), T)
    theirs, _ = core_algos.compute_optimal_token_baseline_advantage(
        at_the_last_token(rewards, lengths), full, AS_TEXT, logps, squares
    )
    weights = squared_gradient_norms(logps, squares)
    ours = group_advantages(rewards, group_ids=IDS, estimator="oblr", squared_gradient_norms=weights)
    check(ours, theirs[:, -1])


def test_verl_rewards_a_group_of_one_where_we_have_nothing_to_compare():
    reward, mask, index = torch.tensor([[2.0]]), torch.ones(1, 1), np.array(["alone"], dtype=object)
    one = torch.tensor([2.0])
    lengths = torch.ones(1, dtype=torch.long)

    def verl(name):
        return float(getattr(core_algos, f"compute_{name}_outcome_advantage")(reward, mask, index)[0])

    assert verl("grpo") == pytest.approx(2 / (1 + 1e-6))  # its mean is taken as 0 and its deviation as 1
    assert verl("rloo") == 2.0
    assert verl("opo") == 2.0
    assert verl("rloo_vectorized") == 0.0  # and its two versions of one estimator differ
    assert float(group_advantages(one, 1, eps=1e-6)) == 0.0
    assert float(group_advantages(one, 1, "opo", lengths=lengths)) == 0.0
    with pytest.raises(ValueError, match="group_size must be 2 or more, got 1"):
        group_advantages(one, 1, "rloo")


def test_verl_divides_the_rounding_of_a_mean_by_eps_where_all_rewards_are_equal():
    rewards = torch.full((7,), 0.1)  # the float32 mean of seven times 0.1 is not 0.1
    index = np.array(["one"] * 7, dtype=object)
    theirs, _ = core_algos.compute_grpo_outcome_advantage(rewards[:, None], torch.ones(7, 1), index)
    assert theirs.abs().min() > 1e-3
    assert torch.equal(group_advantages(rewards, 7, eps=1e-6), torch.zeros(7))
