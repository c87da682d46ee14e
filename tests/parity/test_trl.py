"""TRL's `GRPOTrainer._compute_loss`, the installed method itself, against `policy_loss_from_logps`."""

from dataclasses import replace

import pytest
import torch
import trl_peer
from parity_cases import (
    LONGEST,
    TOLERANCE,
    aggregate,
    assert_parity,
    by_the_rollouts_ratio,
    differentiate,
    make_batch,
    ours,
    plus,
)

from rlvr_ops import gdpo_advantages, group_advantages, surrogates

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")]

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
WEIGHTED = ("cispo", "sapo", "vespo")
AGGREGATION = {
    "cispo": "dapo",
    "vespo": "dapo",
    "sapo": "grpo",
}  # TRL's loss types that choose it along with a surrogate
KL = {
    "no-kl": {},
    "kl": {"beta": 0.1, "use_bias_correction_kl": False},  # TRL's default is True
    "corrected-kl": {"beta": 0.1, "use_bias_correction_kl": True},
}
OLD = pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])


def trl_loss(batch, loss_type, **config):
    """TRL's loss with numbers that every branch of the batch is on either side of."""
    numbers = {"epsilon": 0.2, "epsilon_high": 1.5 if loss_type == "cispo" else 0.28, "max_completion_length": LONGEST}
    taus = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.25}
    return trl_peer.compute_loss(batch, loss_type=loss_type, **numbers | taus | config)


def our_loss(batch, loss_type, **config):
    """The same in our names."""
    numbers = {
        "cispo": {"surrogate": surrogates.cispo(ratio_max=1.5)},
        "sapo": {"surrogate": surrogates.sapo(tau_positive=1.0, tau_negative=1.25)},
        "vespo": {"surrogate": "vespo"},
    }.get(loss_type, {"epsilon_low": 0.2, "epsilon_high": 0.28})
    config |= {"ref": True} if config.get("beta") else {}
    config |= {"max_completion_length": LONGEST} if loss_type == "dr_grpo" else {}
    return ours(batch, loss_type=AGGREGATION.get(loss_type, loss_type), **numbers, **config)


@OLD
@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("delta", [None, 4.0], ids=["no-delta", "delta"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_a_clipped_loss_is_trls(loss_type, level, delta, kl, old):
    for dtype in TOLERANCE:
        batch = make_batch(dtype=dtype)
        config = {"importance_sampling_level": level, "delta": delta, "old": old} | KL[kl]
        theirs = trl_loss(batch, loss_type, **config)
        if level == "sequence" and kl == "corrected-kl":
            theirs = plus(theirs, more_in_trl(batch, loss_type, old), -0.1)
        assert_parity(our_loss(batch, loss_type, **config), theirs)


@OLD
@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize(
    ("loss_type", "level"), [(name, "token") for name in WEIGHTED] + [("cispo", "sequence"), ("sapo", "sequence")]
)
def test_a_weighted_loss_is_trls(loss_type, level, kl, old):
    for dtype in TOLERANCE:
        batch = make_batch(dtype=dtype)
        config = {"importance_sampling_level": level, "old": old} | KL[kl]
        theirs = trl_loss(batch, loss_type, **config)
        if level == "sequence" and kl == "corrected-kl":
            theirs = plus(theirs, more_in_trl(batch, loss_type, old), -0.1)
        assert_parity(our_loss(batch, loss_type, **config), theirs)


def more_in_trl(batch, loss_type, old):
    """`by_the_rollouts_ratio` of a batch, and its gradient."""
    known, rule = batch.old if old else None, AGGREGATION.get(loss_type, loss_type)
    return differentiate(lambda logps, _: by_the_rollouts_ratio(logps, known, batch.ref, batch.mask, rule), batch)


def test_trl_ignores_the_level_for_vespo_and_we_refuse_it():
    batch = make_batch()
    theirs = trl_loss(batch, "vespo", importance_sampling_level="sequence", old=True)
    assert_parity(our_loss(batch, "vespo", old=True), theirs)
    with pytest.raises(ValueError, match="does not go with surrogate vespo"):
        our_loss(batch, "vespo", importance_sampling_level="sequence", old=True)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", CLIPPED + WEIGHTED)
def test_an_empty_rollout_counts_as_trl_counts_it(loss_type, level):
    if (loss_type, level) == ("vespo", "sequence"):
        level = "token"
    batch = make_batch((7, 5, 0, 4, 6, 3))
    config = {"importance_sampling_level": level, "old": True} | KL["kl"]
    assert_parity(our_loss(batch, loss_type, **config), trl_loss(batch, loss_type, **config))


@pytest.mark.parametrize("loss_type", CLIPPED + WEIGHTED)
def test_advantages_per_token_are_trls(loss_type):
    batch = make_batch()
    batch = replace(batch, advantages=batch.advantages[:, None] * torch.linspace(1.5, -0.7, batch.mask.shape[1]))
    assert_parity(our_loss(batch, loss_type, old=True), trl_loss(batch, loss_type, old=True))


# --- what the loss is divided by -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_trls_token_count_over_an_accumulation_window_is_num_items_in_batch(loss_type):
    # 300 tokens were generated at once for 8 steps, of which 4 make one update: 150 tokens an update.
    batch = make_batch()
    window = {"num_items": 300, "accumulation": 4, "steps_per_generation": 8}
    assert_parity(our_loss(batch, loss_type, num_items_in_batch=150), trl_loss(batch, loss_type, **window))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "luspo", "sapo"])
def test_trls_accumulation_is_a_count_of_rollouts(loss_type):
    batch = make_batch()
    theirs = trl_loss(batch, loss_type, accumulation=4)
    assert_parity(our_loss(batch, loss_type, num_items_in_batch=4 * 6), theirs)


def test_trls_bnpo_divides_by_the_steps_and_ours_leaves_that_to_the_trainer():
    batch = make_batch()
    theirs = trl_loss(batch, "bnpo", accumulation=4)
    assert_parity(type(theirs)(*(x / 4 for x in our_loss(batch, "bnpo"))), theirs)


def test_in_evaluation_trl_divides_by_the_batch_alone():
    batch = make_batch()
    for loss_type in ("grpo", "dapo"):
        theirs = trl_loss(batch, loss_type, accumulation=4, training=False)
        assert_parity(our_loss(batch, loss_type), theirs)


# --- entropy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["no-kl", "kl"])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("loss_type", CLIPPED + WEIGHTED)
def test_the_tokens_of_highest_entropy_are_trls(loss_type, quantile, kl):
    batch = make_batch()
    config = {"top_entropy_quantile": quantile, "old": True} | KL[kl]
    assert_parity(our_loss(batch, loss_type, **config), trl_loss(batch, loss_type, **config))


@pytest.mark.parametrize("quantile", [1.0, 0.5])
@pytest.mark.parametrize("loss_type", CLIPPED + WEIGHTED)
def test_the_entropy_bonus_is_aggregated_like_the_loss_and_trls_is_a_mean_over_tokens(loss_type, quantile):
    batch = make_batch()
    config = {"entropy_coef": 0.3, "top_entropy_quantile": quantile, "old": True}
    threshold = batch.entropies[batch.mask].quantile(1 - quantile)
    kept = batch.mask & (batch.entropies >= threshold)

    def mean_less_aggregate(logps, entropies):
        bonus = torch.where(kept, entropies, 0)
        return bonus.sum() / kept.sum() - aggregate(bonus, batch.mask, AGGREGATION.get(loss_type, loss_type))

    difference = differentiate(mean_less_aggregate, batch)
    assert_parity(our_loss(batch, loss_type, **config), plus(trl_loss(batch, loss_type, **config), difference, 0.3))


# --- stale rollouts and the sampler's own log-probabilities ----------------------------------------------------------


@OLD
@pytest.mark.parametrize("sampled", [False, True], ids=["from-old", "from-sampling"])
@pytest.mark.parametrize("loss_type", CLIPPED + WEIGHTED)
def test_the_off_policy_mask_is_trls(loss_type, sampled, old):
    batch = make_batch()
    batch.sampling[1, 2] = float("nan")
    config = {"off_policy_mask_threshold": 0.05, "old": old} | KL["kl"]
    sampling = {"sampling_per_token_logps": batch.sampling} if sampled else None
    theirs = trl_loss(batch, loss_type, sampling=sampling, **config)
    unmasked = trl_loss(batch, loss_type, old=old, **KL["kl"])
    assert (sampled or old) != bool(torch.equal(theirs.d_logps, unmasked.d_logps)), "the mask should drop a rollout"
    assert_parity(our_loss(batch, loss_type, sampling=sampled, **config), theirs)


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("low", [None, 0.85], ids=["no-least", "least"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss_type", CLIPPED + WEIGHTED)
def test_the_sampling_correction_is_trls(loss_type, mode, low, kl):
    batch = make_batch(dtype=torch.float32)
    batch.sampling[0, 2] = float("nan")
    config = {"sampling_correction": mode, "sampling_clip_max": 1.2, "sampling_clip_min": low} | KL[kl]
    if loss_type == "vespo" and (mode.startswith("sequence") or kl == "corrected-kl"):
        with pytest.raises(ValueError, match="does not go with surrogate vespo"):
            our_loss(batch, loss_type, old=True, sampling=True, **config)
        return
    correction = {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": 1.2,
        "vllm_importance_sampling_clip_min": low,
    }
    output = trl_peer.generate_and_score(batch, **correction)
    given = {name: output[name] for name in ("importance_sampling_ratio", "sampling_per_token_logps")}
    theirs = trl_loss(batch, loss_type, old=True, sampling=given, use_vllm=True, **correction, **KL[kl])
    assert_parity(our_loss(batch, loss_type, old=True, sampling=True, **config), theirs)


def test_a_token_that_the_correction_masks_weighs_1e_8_in_vespos_product():
    batch = make_batch(dtype=torch.float32)
    batch.sampling[0] = batch.old[0]
    batch.sampling[0, 0] -= 1.0  # beyond clip_max: its weight is 0, and log(1e-8) = -18.4 in the product
    batch.old[0, 1:7] = batch.logps[0, 1:7] - 3.0  # which five counting tokens bring back to -3.4
    batch.sampling[0, 1:7] = batch.old[0, 1:7]
    mode = {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 1.2}
    ratio = trl_peer.generate_and_score(batch, **mode)["importance_sampling_ratio"]
    assert ratio[0, 0] == 0
    given = {"importance_sampling_ratio": ratio}
    theirs = trl_loss(batch, "vespo", old=True, sampling=given, use_vllm=True, **mode)
    assert theirs.d_logps[0, 0].abs() > 1e-3
    config = {"sampling_correction": "token_mask", "sampling_clip_max": 1.2}
    assert_parity(our_loss(batch, "vespo", old=True, sampling=True, **config), theirs)


# --- advantages -----------------------------------------------------------------------------------------------------

REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.3, -1.2, 0.3])  # two groups of 3


@pytest.mark.parametrize(
    ("scale_rewards", "estimator"), [("group", "grpo"), ("none", "dr_grpo"), ("batch", "lite_ppo")]
)
def test_group_advantages_are_trls(scale_rewards, estimator):
    theirs = trl_peer.generate_and_score(make_batch(), REWARDS, scale_rewards=scale_rewards)["advantages"]
    torch.testing.assert_close(group_advantages(REWARDS, 3, estimator), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, 0.5]], ids=["equal", "weighted"])
def test_gdpo_is_trls_normalize_then_sum(weights):
    brief = torch.tensor([0.0, 1.0, 1.0, -0.5, 0.25, 0.0])
    rewards = torch.stack([REWARDS, brief], 1)
    theirs = trl_peer.generate_and_score(
        make_batch(), rewards, reward_weights=weights, multi_objective_aggregation="normalize_then_sum"
    )["advantages"]
    torch.testing.assert_close(gdpo_advantages(rewards, 3, reward_weights=weights), theirs, rtol=1e-5, atol=1e-6)


def test_trl_leaves_a_missing_reward_out_of_its_group_and_we_refuse_it():
    rewards = REWARDS.clone()
    rewards[1] = float("nan")
    theirs = trl_peer.generate_and_score(make_batch(), rewards)["advantages"]
    assert theirs[1] == 0
    two = group_advantages(torch.tensor([1.0, 0.0]), 2)  # the two rollouts that have one
    torch.testing.assert_close(theirs[[0, 2]], two, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="rollout 1"):
        group_advantages(rewards, 3)


# --- numbers out of range --------------------------------------------------------------------------------------------


def test_vespos_clamps_in_trl_show_only_where_one_token_is_e20_times_off():
    batch = make_batch()
    batch.old[0, :3] = batch.logps[0, :3] - torch.tensor([9.0, 12.0, -20.0])  # the product is e once more
    batch.old[1] = batch.logps[1] + 60.0  # the product is 0: TRL stops at 1e-8
    batch.old[3] = batch.logps[3] - 19.0  # and overflows
    assert_parity(our_loss(batch, "vespo", old=True), trl_loss(batch, "vespo", old=True))
    batch.old[0, :2] = batch.logps[0, :2] - torch.tensor([21.0, -21.0])
    assert_parity(our_loss(batch, "vespo", old=True), trl_loss(batch, "vespo", old=True))
    batch.old[0, :2] = batch.logps[0, :2] - torch.tensor([22.0, -20.0])  # TRL takes 20 for the 22
    clamped = replace(batch, old=torch.maximum(batch.old, batch.logps - 20))
    assert_parity(our_loss(clamped, "vespo", old=True), trl_loss(batch, "vespo", old=True))


def test_nan_in_the_padding_spreads_in_trl_and_not_here():
    batch = make_batch()
    poisoned = replace(batch, old=batch.old.masked_fill(~batch.mask, float("nan")))
    with pytest.raises(AssertionError, match="the padding has a gradient"):
        trl_loss(poisoned, "grpo", old=True)
    assert_parity(our_loss(poisoned, "grpo", old=True), trl_loss(batch, "grpo", old=True))


def test_a_clipped_ratio_beyond_float32_is_nan_in_trl_and_0_here():
    batch = make_batch(dtype=torch.float32)
    batch.old[0, 0] = batch.logps[0, 0] - 80.0  # a ratio of 6e34 where A > 0
    batch.old[1, 1] = batch.logps[1, 1] + 80.0
    assert_parity(our_loss(batch, "grpo", old=True, delta=4.0), trl_loss(batch, "grpo", old=True, delta=4.0))
    batch.old[0, 0] = batch.logps[0, 0] - 95.0  # inf
    theirs, got = trl_loss(batch, "grpo", old=True, delta=4.0), our_loss(batch, "grpo", old=True, delta=4.0)
    assert theirs.d_logps[0, 0].isnan()
    assert_parity(got, theirs._replace(d_logps=theirs.d_logps.nan_to_num(nan=0.0)))


def test_the_defaults_of_trl_that_differ_from_ours():
    config = trl_peer.trainer().args
    assert (config.loss_type, config.use_bias_correction_kl) == ("dapo", True)
    assert (config.vllm_importance_sampling_mode, config.vllm_importance_sampling_clip_max) == ("sequence_mask", 3.0)
    batch = make_batch()
    theirs = trl_peer.compute_loss(batch, old=True, beta=0.1)
    got = ours(batch, old=True, ref=True, loss_type="dapo", beta=0.1, use_bias_correction_kl=True)
    assert_parity(got, theirs)


def test_trl_allows_a_delta_inside_the_clip_and_we_refuse_it():
    batch = make_batch()
    assert trl_loss(batch, "grpo", old=True, delta=1.1).loss.isfinite()
    with pytest.raises(ValueError, match="delta must be > 1"):
        our_loss(batch, "grpo", old=True, delta=1.1)
