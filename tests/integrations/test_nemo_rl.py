"""rlvr_ops.integrations.nemo_rl around a loss of NeMo-RL's documented signature, or around NeMo-RL's where it is installed."""

import enum
import pickle
from types import SimpleNamespace

import pytest
import torch
from framework_cases import SETTINGS, assert_same, make_batch, value_and_gradient
from framework_stand_ins import installed, stand_in

from rlvr_ops import ace_advantages, ace_loss_from_logps
from rlvr_ops.integrations.nemo_rl import ACELossFn
from rlvr_ops.surrogates import SURROGATES


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class ClippedPGLossFn:
    """NeMo-RL's clipped policy gradient with a k3 penalty, from its formula, over the keys and denominators that it documents."""

    def __init__(self, config):
        self.loss_type = LossType.TOKEN_LEVEL if config.token_level_loss else LossType.SEQUENCE_LEVEL
        self.reference_policy_kl_penalty = config.reference_policy_kl_penalty
        self.force_on_policy_ratio = config.force_on_policy_ratio
        self.metric_normalizations = {"loss": MetricNormalizer.TOKENS}

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask, advantages = data["token_mask"][:, 1:] * data["sample_mask"][:, None], data["advantages"][:, 1:]
        old = next_token_logprobs.detach() if self.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        ratio = (next_token_logprobs - old).exp()
        losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        if self.reference_policy_kl_penalty != 0:
            gap = data["reference_policy_logprobs"][:, 1:] - next_token_logprobs
            losses = losses + self.reference_policy_kl_penalty * (gap.exp() - gap - 1)
        if self.loss_type is LossType.TOKEN_LEVEL:
            loss = (losses * mask).sum() / global_valid_toks
        else:
            loss = ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / global_valid_seqs
        return loss, {"loss": loss.item()}


@pytest.fixture(autouse=True)
def _nemo_rl(monkeypatch):
    if not installed("nemo_rl"):
        stand_in(monkeypatch, nemo_rl__algorithms__loss__interfaces={"MetricNormalizer": MetricNormalizer})


def clipped(token_level=True, **others):
    config = {"token_level_loss": token_level, "reference_policy_kl_penalty": 0.0, "force_on_policy_ratio": False}
    if not installed("nemo_rl"):
        return ClippedPGLossFn(SimpleNamespace(**config | others))
    from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig
    from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn as NemoLossFn

    return NemoLossFn(ClippedPGLossConfig(**config | others))


def data_of(batch, rows=slice(None), **others):
    """NeMo-RL's keys: (B, S), of which column 0 is the prompt's last token."""
    first = torch.full((len(batch.logps), 1), 7.0)
    keys = {
        "prev_logprobs": batch.old, "generation_logprobs": batch.sampling, "reference_policy_logprobs": batch.ref,
        "advantages": batch.advantages, "token_mask": batch.mask.float(),
    }  # fmt: skip
    whole = {name: torch.cat([first, values], 1)[rows] for name, values in keys.items()}
    ids = torch.zeros_like(whole["token_mask"], dtype=torch.long)
    return {**whole, "sample_mask": torch.ones(len(batch.logps))[rows], "input_ids": ids} | others


def loss_of(batch, loss_fn, rows=slice(None), **others):
    data, count = data_of(batch, rows, **others), torch.tensor(float(len(batch.logps)))
    return lambda logps: loss_fn(logps, data, count, batch.mask.sum().float())[0]


def wanted(batch, token_level, **settings):
    return lambda logps: ace_loss_from_logps(
        logps, batch.advantages, ref_per_token_logps=batch.ref, old_per_token_logps=batch.old,
        completion_mask=batch.mask, loss_type="dapo" if token_level else "grpo", **settings,
    ).loss  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("token_level", [True, False])
def test_ace_in_nemo_rls_own_loss_is_ours(token_level, settings):
    batch = make_batch()
    found = value_and_gradient(loss_of(batch, ACELossFn(clipped(token_level), **settings)), batch.logps)
    assert_same(found, value_and_gradient(wanted(batch, token_level, **settings), batch.logps))


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("token_level", [True, False])
def test_each_surrogate_has_nemo_rls_denominators(token_level, surrogate):
    batch = make_batch()
    found = value_and_gradient(loss_of(batch, ACELossFn(clipped(token_level), surrogate=surrogate)), batch.logps)
    assert_same(found, value_and_gradient(wanted(batch, token_level, surrogate=surrogate), batch.logps))


@pytest.mark.parametrize("config", [{}, {"reference_policy_kl_penalty": 0.01}, {"force_on_policy_ratio": True}])
def test_alpha_0_is_nemo_rls_loss(config):
    batch, own = make_batch(), clipped(**config)
    found = value_and_gradient(loss_of(batch, ACELossFn(own, alpha=0.0)), batch.logps)
    assert_same(found, value_and_gradient(loss_of(batch, own), batch.logps), tolerance=0)


@pytest.mark.parametrize("settings", [{}, {"surrogate": "sapo"}])
def test_only_negative_advantages_move_and_padding_never_reaches_the_gradient(settings):
    batch = make_batch()
    plain, weighted = (
        value_and_gradient(loss_of(batch, ACELossFn(clipped(), alpha=alpha, **settings)), batch.logps)[1]
        for alpha in (0.0, 1.0)
    )
    wrong = (batch.advantages < 0) & batch.mask
    assert torch.equal(plain[~wrong], weighted[~wrong])
    assert (weighted.abs()[wrong] > plain.abs()[wrong])[plain[wrong] != 0].all()
    assert not weighted[~batch.mask].any()


@pytest.mark.parametrize("settings", [{}, {"surrogate": "cispo"}, {"surrogate": "gmpo", "confidence": "old"}])
@pytest.mark.parametrize("token_level", [True, False])
def test_micro_batches_add_up(token_level, settings):
    batch, loss_fn = make_batch(), ACELossFn(clipped(token_level), **settings)
    parts = [
        value_and_gradient(loss_of(batch, loss_fn, rows), batch.logps[rows]) for rows in (slice(0, 2), slice(2, 6))
    ]
    whole = value_and_gradient(loss_of(batch, loss_fn), batch.logps)
    assert_same((parts[0][0] + parts[1][0], torch.cat([parts[0][1], parts[1][1]])), whole)


def test_the_confidence_is_that_of_log_probabilities_before_top_k_and_top_p():
    batch, wrapped = make_batch(), ACELossFn(clipped())
    found = value_and_gradient(loss_of(batch, wrapped, curr_logprobs_unfiltered=batch.sampling), batch.logps)
    chosen = ACELossFn(clipped(), alpha=0.0)
    batch.advantages = ace_advantages(batch.advantages, batch.sampling, batch.ref, batch.mask)
    assert_same(found, value_and_gradient(loss_of(batch, chosen), batch.logps))


def test_on_policy_the_ratio_is_1_and_the_confidence_the_current_policys():
    batch = make_batch()
    settings = {"surrogate": "ppo_clip", "confidence": "old"}
    found = value_and_gradient(loss_of(batch, ACELossFn(clipped(force_on_policy_ratio=True), **settings)), batch.logps)
    batch.old = batch.logps
    assert_same(found, value_and_gradient(wanted(batch, True, **settings), batch.logps))


@pytest.mark.parametrize("surrogate", ["clip_cov", "kl_cov"])
def test_a_surrogate_of_a_whole_batch_is_refused_where_one_sequence_comes(surrogate):
    batch, one = make_batch(), slice(0, 1)
    with pytest.raises(ValueError, match=f"surrogate='{surrogate}' compares .*one sequence: turn sequence packing off"):
        loss_of(batch, ACELossFn(clipped(), surrogate=surrogate), one)(batch.logps[one])


def test_a_dropped_sample_has_no_gradient():
    batch = make_batch()
    keep = torch.tensor([1.0, 0, 1, 1, 1, 1])
    for settings in ({}, {"surrogate": "sapo"}):
        gradient = value_and_gradient(loss_of(batch, ACELossFn(clipped(), **settings), sample_mask=keep), batch.logps)[
            1
        ]
        assert not gradient[1].any()


def test_the_surrogate_leaves_nemo_rls_kl_term():
    batch = make_batch()

    def kl(wrap):
        with_kl, without = (
            value_and_gradient(loss_of(batch, wrap(clipped(reference_policy_kl_penalty=beta))), batch.logps)
            for beta in (0.01, 0.0)
        )
        return [a - b for a, b in zip(with_kl, without, strict=True)]

    assert_same(kl(lambda own: ACELossFn(own, surrogate="cispo")), kl(lambda own: own))


def test_a_skipped_reference_is_refused_though_nemo_rl_hands_zeros():
    batch = make_batch()
    zeros = torch.zeros(6, 8)
    with pytest.raises(ValueError, match=r"holds only zeros.*reference_policy_kl_penalty above 0"):
        loss_of(batch, ACELossFn(clipped()), reference_policy_logprobs=zeros)(batch.logps)
    with pytest.raises(ValueError, match="reference_policy_logprobs is missing"):
        loss_of(batch, ACELossFn(clipped()), reference_policy_logprobs=None)(batch.logps)
    loss_of(batch, ACELossFn(clipped(), alpha=0.0), reference_policy_logprobs=zeros)(batch.logps)


def test_a_reference_that_is_certain_where_the_policy_is_too_is_no_skipped_one():
    batch = make_batch()
    zeros = torch.zeros(6, 8)
    loss_of(batch, ACELossFn(clipped()), reference_policy_logprobs=zeros)(batch.logps * 1e-3)


def test_what_nemo_rl_asks_of_a_loss_is_answered_by_the_one_inside():
    own = clipped(reference_policy_kl_penalty=0.01)
    loss_fn = pickle.loads(pickle.dumps(ACELossFn(own, alpha=0.5)))
    assert loss_fn.loss_type.name == "TOKEN_LEVEL"
    assert loss_fn.reference_policy_kl_penalty == 0.01
    assert loss_fn.metric_normalizations["ace/weight"].name == "TOKENS"
    assert loss_fn.settings.alpha == 0.5
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = loss_fn.nothing_such


def test_the_data_is_left_as_it_was_and_the_weight_is_logged():
    batch = make_batch()
    data, counts = data_of(batch), (torch.tensor(6.0), batch.mask.sum().float())
    before = data["advantages"].clone()
    _, metrics = ACELossFn(clipped())(batch.logps, data, *counts)
    assert torch.equal(data["advantages"], before)
    assert metrics["ace/weight"] > 1
    _, metrics = ACELossFn(clipped(), alpha=0.0)(batch.logps, data, *counts)
    assert metrics["ace/weight"] == pytest.approx(1)


def test_the_loss_that_is_logged_is_the_one_with_the_surrogate():
    batch = make_batch()
    loss, metrics = ACELossFn(clipped(), surrogate="sapo")(
        batch.logps, data_of(batch), torch.tensor(6.0), batch.mask.sum().float()
    )
    assert metrics["loss"] == loss.item() != 0
