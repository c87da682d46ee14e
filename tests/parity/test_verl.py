"""verl's `ppo_loss` (policy loss, aggregation, entropy bonus, KL term), as installed, against `policy_loss_from_logps`."""

from dataclasses import replace

import pytest
import torch
import verl_peer
from parity_cases import LONGEST, TOLERANCE, aggregate, assert_parity, differentiate, make_batch, ours, plus

from rlvr_ops import surrogates

pytestmark = pytest.mark.parity

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
OUR_CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}
GEOMETRIC_CLIP = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.3}
TRUST = {"clip_ratio_c": 10_000.0}  # no bound on the ratio
LOSSES = {  # verl's name and numbers, our arguments; delta is verl's dual clip
    "vanilla": (CLIP | {"clip_ratio_c": 3.0}, OUR_CLIP | {"delta": 3.0}),
    "gspo": (CLIP, OUR_CLIP | {"importance_sampling_level": "sequence_token"}),
    "cispo": (CLIP, {"surrogate": surrogates.cispo_two_sided(epsilon_low=0.2, epsilon_high=0.28)}),
    "sapo": ({"tau_pos": 1.0, "tau_neg": 1.05}, {"surrogate": "sapo"}),
    "geo_mean": (GEOMETRIC_CLIP, {"surrogate": surrogates.gmpo(epsilon_low=0.4, epsilon_high=0.3)}),
    "gpg": ({}, {"surrogate": "reinforce"}),
    "dppo_tv": (TRUST | {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15}, {"surrogate": surrogates.dppo("tv", 0.15)}),
    "dppo_kl": (TRUST | {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05}, {"surrogate": surrogates.dppo("kl", 0.05)}),
    "dro": ({"dro_beta": 0.3}, {"surrogate": "reinforce", "beta": 0.3, "kl_estimator": "k2", "kl_against": "old"}),
    "clip_cov": (
        CLIP | {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 1.0},  # every candidate is drawn
        {"surrogate": surrogates.clip_cov(share=1.0, low=0.2, high=1.0, epsilon_high=0.28)},
    ),
    "kl_cov": ({"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.7}, {"surrogate": surrogates.kl_cov(share=0.3, coef=0.7)}),
}
ONE_MODE = {"sapo": "seq-mean-token-mean", "geo_mean": "seq-mean-token-mean"}  # whatever they are told
KL = {"use_kl_loss": True, "kl_loss_coef": 0.1}
OLD = pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])


def verl_loss(batch, name, mode, **config):
    numbers = LOSSES[name][0] | {"loss_scale_factor": LONGEST if mode.endswith("norm") else None}
    return verl_peer.ppo_loss(batch, name, loss_agg_mode=mode, **numbers | config)


def our_loss(batch, name, mode, **config):
    constant = {"max_completion_length": LONGEST} if mode.endswith("norm") else {}
    return ours(batch, loss_type=ONE_MODE.get(name, mode), **LOSSES[name][1] | constant | config)


@OLD
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_policy_loss_is_verls(name, mode, old):
    for dtype in TOLERANCE:
        batch = make_batch(dtype=dtype)
        theirs = verl_loss(batch if old else replace(batch, old=batch.logps), name, mode)
        assert_parity(our_loss(batch, name, mode, old=old), theirs)


def dro(logps, rows):
    """-(A logp - beta / 2 (logp - old)^2) with beta = 0.3."""
    return 0.15 * (logps - rows.old_per_token_logps).square() - rows.advantages * logps


def dppo_tv(logps, rows):
    """-sg[min(rho, 3)] A logp wherever the probability has not yet moved 0.1 the way of its advantage (2602.04879)."""
    moved = (logps.exp() - rows.old_per_token_logps.exp()).detach()
    trusted = torch.where(rows.advantages > 0, moved <= 0.1, moved >= -0.1)
    ratio = (logps - rows.old_per_token_logps).exp().clamp(max=3.0).detach()
    return torch.where(trusted, -rows.advantages * ratio * logps, 0.0)


FUNCTIONS = {
    "dro": (dro, {"dro_beta": 0.3}),
    "dppo_tv": (dppo_tv, {"clip_ratio_low": 0.1, "clip_ratio_high": 0.1, "clip_ratio_c": 3.0}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_that_we_do_not_have_is_a_function_of_the_users_own(name, mode):
    function, numbers = FUNCTIONS[name]
    constant = {"loss_scale_factor": LONGEST} if mode.endswith("norm") else {}
    length = {"max_completion_length": LONGEST} if mode.endswith("norm") else {}
    for dtype in TOLERANCE:
        batch = make_batch(dtype=dtype)
        theirs = verl_peer.ppo_loss(batch, name, loss_agg_mode=mode, **numbers | constant | KL)
        config = {"old": True, "ref": True, "beta": 0.1} | length
        assert_parity(ours(batch, loss_type=mode, surrogate=function, **config), theirs)


def test_dual_clip_does_what_delta_does_at_any_constant():
    batch = make_batch()
    for constant in (1.5, 3.0, 6.5, 10.0):
        theirs = verl_loss(batch, "vanilla", "token-mean", clip_ratio_c=constant)
        assert_parity(our_loss(batch, "vanilla", "token-mean", old=True, delta=constant), theirs)


@pytest.mark.parametrize("mode", MODES)
def test_both_forms_of_gspo_have_one_gradient_where_a_rollout_has_one_advantage(mode):
    batch = make_batch()
    theirs = verl_loss(batch, "gspo", mode)
    by_rollout = our_loss(batch, "gspo", mode, old=True, importance_sampling_level="sequence")
    assert_parity(by_rollout, theirs)


def test_the_two_forms_of_gspo_differ_with_an_advantage_per_token():
    batch = make_batch()
    batch = replace(batch, advantages=batch.advantages[:, None] * torch.linspace(1.5, 0.5, batch.mask.shape[1]))
    theirs = verl_loss(batch, "gspo", "seq-mean-token-mean")
    assert_parity(our_loss(batch, "gspo", "seq-mean-token-mean", old=True), theirs)
    by_rollout = our_loss(batch, "gspo", "seq-mean-token-mean", old=True, importance_sampling_level="sequence")
    torch.testing.assert_close(by_rollout.loss, theirs.loss, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(by_rollout.d_logps, theirs.d_logps, atol=1e-3)


# --- what the loss is divided by -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_verls_global_counts_are_num_items_in_batch(mode):
    # A quarter of a global batch of 100 tokens in 20 rollouts: verl multiplies by dp_size, since its ranks are averaged.
    batch = make_batch()
    counts = {"dp_size": 4, "batch_num_tokens": 100, "global_batch_size": 20}
    theirs = verl_loss(batch, "vanilla", mode, counts=counts)
    items = 100 / 4 if mode == "token-mean" else 20 / 4
    assert_parity(our_loss(batch, "vanilla", mode, old=True, num_items_in_batch=items), theirs)


def test_verls_token_sum_is_token_mean_over_one_item():
    batch = make_batch()
    theirs = verl_loss(batch, "vanilla", "token-sum")
    assert_parity(our_loss(batch, "vanilla", "token-mean", old=True, num_items_in_batch=1), theirs)


def test_verls_constant_length_is_the_batchs_width_by_default():
    batch = make_batch()
    theirs = verl_loss(batch, "vanilla", "seq-mean-token-sum-norm", loss_scale_factor=None)
    got = our_loss(batch, "vanilla", "seq-mean-token-sum-norm", old=True, max_completion_length=None)
    assert_parity(got, theirs)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", MODES)
def test_verl_divides_by_the_rollouts_that_have_tokens_and_we_by_all(name, mode):
    batch = make_batch((7, 5, 0, 4, 6, 3))
    theirs = verl_loss(batch, name, mode)
    over_all = name == "geo_mean" or ONE_MODE.get(name, mode) == "token-mean"
    assert_parity(our_loss(batch, name, mode, old=True, **({} if over_all else {"num_items_in_batch": 5})), theirs)


# --- KL and entropy --------------------------------------------------------------------------------------------------


ESTIMATORS = {"k1": "k1", "kl": "k1", "k2": "k2", "mse": "k2", "k2+": "k2", "k3": "k3", "low_var_kl": "k3"}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("mode", MODES)
def test_the_kl_term_is_verls(mode, name):
    for dtype in TOLERANCE:
        batch = make_batch(dtype=dtype)
        theirs = verl_loss(batch, "vanilla", mode, kl_loss_type=name, **KL)
        config = {"beta": 0.1, "kl_estimator": ESTIMATORS[name]}
        assert_parity(our_loss(batch, "vanilla", mode, old=True, ref=True, **config), theirs)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_on_policy_the_bias_correction_is_verls_straight_through_kl(estimator):
    batch = make_batch()
    theirs = verl_loss(replace(batch, old=batch.logps), "vanilla", "token-mean", kl_loss_type=f"{estimator}+", **KL)
    config = {"ref": True, "beta": 0.1, "kl_estimator": estimator, "use_bias_correction_kl": True}
    assert_parity(our_loss(batch, "vanilla", "token-mean", **config), theirs)


def test_off_policy_verls_straight_through_kl_leaves_the_ratio_out():
    batch = make_batch()
    theirs = verl_loss(batch, "vanilla", "token-mean", kl_loss_type="k3+", **KL)
    ratio = (batch.logps - batch.old).exp()
    gap = batch.ref - batch.logps
    value = aggregate((ratio - 1) * (gap.exp() - gap - 1), batch.mask, "dapo")
    slope = torch.where(batch.mask, (ratio - 1) * -gap, 0) / batch.mask.sum()
    difference = type(theirs)(value, slope, torch.zeros_like(slope))
    config = {"ref": True, "beta": 0.1, "use_bias_correction_kl": True}
    assert_parity(our_loss(batch, "vanilla", "token-mean", old=True, **config), plus(theirs, difference, 0.1))


def test_verl_stops_k3_at_10_and_we_do_not():
    batch = make_batch()
    batch.ref[0, 0] = batch.logps[0, 0] + 3.0  # exp(3) - 3 - 1 = 16.09
    theirs = verl_loss(batch, "vanilla", "token-mean", kl_loss_type="k3", **KL)

    def beyond(logps, entropies):
        gap = batch.ref - logps
        return aggregate((gap.exp() - gap - 11).clamp(min=0), batch.mask, "dapo")

    got = our_loss(batch, "vanilla", "token-mean", old=True, ref=True, beta=0.1)
    assert_parity(got, plus(theirs, differentiate(beyond, batch), 0.1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo"])
def test_the_entropy_bonus_is_verls(name, mode):
    batch = make_batch()
    theirs = verl_loss(batch, name, mode, entropy_coeff=0.2)
    assert_parity(our_loss(batch, name, mode, old=True, entropy_coef=0.2), theirs)


# --- the sampler's own log-probabilities -----------------------------------------------------------------------------

CORRECTIONS = {  # ours, verl's level and threshold
    "token_truncate": ("token", 1.1),
    "token_mask": ("token", "0.85_1.1"),
    "sequence_truncate": ("sequence", 1.1),
    "sequence_mask": ("sequence", "0.85_1.1"),
}


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("dro", "clip_cov", "kl_cov")])
def test_the_rollout_correction_is_verls(name, correction):
    for dtype in TOLERANCE:
        batch = make_batch(dtype=dtype)
        mode, weights = "seq-mean-token-mean", verl_peer.correction_weights(batch, *CORRECTIONS[correction])
        low = 0.85 if correction.endswith("mask") else None
        config = {"sampling_correction": correction, "sampling_clip_max": 1.1, "sampling_clip_min": low}
        assert_parity(
            our_loss(batch, name, mode, old=True, sampling=True, **config),
            verl_loss(batch, name, mode, weights=weights),
        )


def test_a_sampling_log_probability_that_is_missing_is_no_correction_here_and_nan_in_verl():
    batch = make_batch()
    batch.sampling[0, 2] = float("nan")
    assert verl_peer.correction_weights(batch, "token", 1.1)[0, 2].isnan()
    config = {"old": True, "sampling": True, "sampling_correction": "token_truncate", "sampling_clip_max": 1.1}
    got = our_loss(batch, "vanilla", "token-mean", **config)
    batch.sampling[0, 2] = batch.old[0, 2]
    weights = verl_peer.correction_weights(batch, "token", 1.1)
    assert_parity(got, verl_loss(batch, "vanilla", "token-mean", weights=weights))


# --- numbers out of range --------------------------------------------------------------------------------------------


def test_nan_in_the_padding_reaches_verls_means_over_rollouts_and_not_ours():
    batch = make_batch()
    poisoned = replace(batch, old=batch.old.masked_fill(~batch.mask, float("nan")))
    assert verl_loss(poisoned, "vanilla", "seq-mean-token-mean").loss.isnan()
    assert_parity(verl_loss(poisoned, "vanilla", "token-mean"), verl_loss(batch, "vanilla", "token-mean"))
    for mode in MODES:
        assert_parity(our_loss(poisoned, "vanilla", mode, old=True), verl_loss(batch, "vanilla", mode))


@pytest.mark.parametrize("name", ["vanilla", "cispo", "sapo"])
def test_verls_clamp_of_the_log_ratio_at_20_never_shows(name):
    batch = make_batch()
    for row in (0, 1):  # either sign of the advantage
        batch.old[row, :4] = batch.logps[row, :4] + torch.tensor([-19.0, -30.0, 19.0, 30.0])
    theirs = verl_loss(batch, name, "token-mean")
    assert_parity(our_loss(batch, name, "token-mean", old=True), theirs)


def test_verls_gspo_stops_a_wrong_rollouts_ratio_at_e10_and_ours_only_at_delta():
    batch = make_batch()
    batch.old[1] = batch.logps[1] - 12.0  # A = -1.3
    theirs = verl_loss(batch, "gspo", "seq-mean-token-mean")
    capped = our_loss(batch, "gspo", "seq-mean-token-mean", old=True, delta=torch.e**10)
    assert_parity(capped, theirs)
    more = our_loss(batch, "gspo", "seq-mean-token-mean", old=True).loss - theirs.loss
    # (e^12 - e^10) * 1.3 / 6 rollouts
    assert more.item() == pytest.approx((torch.e**12 - torch.e**10) * 1.3 / 6, rel=1e-6)


def test_the_defaults_of_verl_that_differ_from_ours():
    verl_peer.losses()
    from verl.workers.config import ActorConfig

    actor = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    assert (actor.clip_ratio_c, actor.loss_agg_mode) == (3.0, "token-mean")
    batch = make_batch()
    assert_parity(ours(batch, old=True, loss_type="token-mean", delta=3.0), verl_peer.ppo_loss(batch))
