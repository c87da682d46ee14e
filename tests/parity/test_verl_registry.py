"""verl's registry of policy losses: each is compared; and bypass mode, whose old policy is the engine that sampled."""

from dataclasses import replace

import pytest
import torch
import verl_peer
from parity_cases import TOLERANCE, Outcome, aggregate, assert_parity, differentiate, make_batch, ours, plus
from test_verl import LOSSES, MODES, our_loss, verl_loss

from rlvr_ops import surrogates

pytestmark = pytest.mark.parity

WEIGHTS = {"sampling": True, "sampling_correction": "token_truncate", "sampling_clip_max": 1.1}
KEPT = "token_k1,seq_mean_k3"  # reject tokens of an extreme ratio, then rollouts that drifted on average
BOUNDS = "0.5_2.0,0.2"


def bypass(batch, loss_type, **config):
    """verl's `bypass_mode`: `batch.old` is what the rollout engine gave."""
    verl_peer.losses()
    from verl.trainer.config.algorithm import RolloutCorrectionConfig

    names = ("rollout_is", "rollout_is_threshold", "rollout_rs", "rollout_rs_threshold")
    correction = RolloutCorrectionConfig(
        bypass_mode=True, loss_type=loss_type, **{n: config.pop(n, None if n != "rollout_is_threshold" else 2.0) for n in names}
    )  # fmt: skip
    return verl_peer.ppo_loss(batch, "bypass_mode", rollout_correction=correction, **config)


def kept_by_verl(batch):
    """The batch without the tokens that verl's rejection takes out of the mask."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    _, mask, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=batch.logps, rollout_log_prob=batch.old, response_mask=batch.mask.to(batch.logps.dtype),
        rollout_rs=KEPT, rollout_rs_threshold=BOUNDS,
    )  # fmt: skip
    assert 0 < mask.sum() < batch.mask.sum()
    return replace(batch, mask=mask.bool())


def test_every_loss_that_verl_registers_is_compared():
    verl_peer.losses()
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    assert set(POLICY_LOSS_REGISTRY) == {*LOSSES, "bypass_mode"}


@pytest.mark.parametrize("mode", MODES)
def test_bypass_mode_with_the_clip_is_grpo_with_the_engines_log_probabilities_as_old(mode):
    for dtype in TOLERANCE:
        batch = make_batch(dtype=dtype)
        theirs = bypass(batch, "ppo_clip", loss_agg_mode=mode, rollout_is="token")
        assert_parity(ours(batch, old=True, loss_type=mode, delta=3.0), theirs)


@pytest.mark.parametrize("mode", MODES)
def test_bypass_mode_with_reinforce_is_cispo_with_the_engines_log_probabilities_as_old(mode):
    for dtype in TOLERANCE:
        batch = make_batch(dtype=dtype)
        theirs = bypass(batch, "reinforce", loss_agg_mode=mode, rollout_is="token", rollout_is_threshold=2.0)
        assert_parity(ours(batch, old=True, loss_type=mode, surrogate=surrogates.cispo(2.0)), theirs)
        assert_parity(
            ours(batch, loss_type=mode, surrogate="reinforce"), bypass(batch, "reinforce", loss_agg_mode=mode)
        )


def test_bypass_mode_with_weights_of_rollouts_is_three_lines():
    def weighted(logps, rows):
        weight = rows.rollout_sum(logps - rows.old_per_token_logps).detach().exp().clamp(max=2.0)
        return -weight * rows.advantages * logps

    batch = make_batch()
    theirs = bypass(batch, "reinforce", rollout_is="sequence", rollout_is_threshold=2.0)
    assert_parity(ours(batch, old=True, loss_type="token-mean", surrogate=weighted), theirs)


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_what_bypass_mode_rejects_is_left_out_of_the_mask(loss_type):
    batch = make_batch()
    theirs = bypass(batch, loss_type, rollout_rs=KEPT, rollout_rs_threshold=BOUNDS)
    given = {"delta": 3.0} if loss_type == "ppo_clip" else {"surrogate": "reinforce"}
    assert_parity(ours(kept_by_verl(batch), old=True, loss_type="token-mean", **given), theirs)


def test_verl_weighs_dros_penalty_too_and_we_its_surrogate_alone():
    batch = make_batch()
    weights = verl_peer.correction_weights(batch, "token", 1.1)
    theirs = verl_loss(batch, "dro", "token-mean", weights=weights)

    def difference(logps, entropies):
        return aggregate((1 - weights) * 0.15 * (logps - batch.old) ** 2, batch.mask, "dapo")

    got = our_loss(batch, "dro", "token-mean", old=True, **WEIGHTS)
    assert_parity(got, plus(theirs, differentiate(difference, batch)))


def test_verl_weighs_kl_covs_penalty_too_and_we_its_surrogate_alone():
    """Every token is held, but here none of the rollout without an advantage."""
    batch = make_batch()
    weights = verl_peer.correction_weights(batch, "token", 1.1)
    theirs = verl_loss(batch, "kl_cov", "token-mean", weights=weights, kl_cov_ratio=1.0)

    def difference(logps, entropies):
        held = (batch.advantages != 0)[:, None].to(weights)
        return aggregate((held - weights) * 0.7 * (logps - batch.old).abs(), batch.mask, "dapo")

    given = {"surrogate": surrogates.kl_cov(share=1.0, coef=0.7), **WEIGHTS}
    assert_parity(
        our_loss(batch, "kl_cov", "token-mean", old=True, **given), plus(theirs, differentiate(difference, batch))
    )


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_verl_chooses_by_the_covariance_of_plain_advantages_and_we_of_weighted_ones(name):
    batch = make_batch()
    weights = verl_peer.correction_weights(batch, "token", 1.1)
    weighted = replace(batch, advantages=batch.advantages[:, None] * weights)
    got = our_loss(batch, name, "token-mean", old=True, **WEIGHTS)
    assert_parity(got, verl_loss(weighted, name, "token-mean"))
    assert not torch.allclose(got.d_logps, verl_loss(batch, name, "token-mean", weights=weights).d_logps, atol=1e-3)


def test_the_tokens_that_clip_cov_draws_are_candidates_of_verls_and_as_many():
    batch, given = make_batch(), {"low": 0.2, "high": 1.0, "epsilon_high": 0.28}
    everything, nothing, drawn = (
        ours(batch, old=True, loss_type="token-mean", surrogate=surrogate).d_logps
        for surrogate in (
            surrogates.clip_cov(share=1.0, **given), surrogates.ppo_clip(0.2, 0.28), surrogates.clip_cov(share=0.1, **given),
        )
    )  # fmt: skip
    candidates, left_out = ((nothing - x).abs() > 1e-12 for x in (everything, drawn))
    assert int(left_out.sum()) == int(0.1 * batch.mask.sum()) < int(candidates.sum())
    assert bool((candidates | ~left_out).all())


def test_ace_goes_on_top_of_bypass_mode():
    """With the sampler as old, ACE's weight is still that of policy and reference."""
    batch = make_batch()
    shift = torch.where(batch.mask, batch.logps - batch.ref, 0).sum(1) / batch.tokens
    harder = torch.where(batch.advantages < 0, 1 + torch.nn.functional.softplus(shift), 1.0)
    theirs = bypass(replace(batch, advantages=batch.advantages * harder), "ppo_clip")
    got: Outcome = ours(batch, old=True, ref=True, loss_type="token-mean", delta=3.0, alpha=1.0)
    assert_parity(got, theirs)
