"""rlvr_ops.integrations.prime_rl on the dataclasses that prime-rl documents, or on prime-rl itself where it is installed."""

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from framework_cases import SETTINGS, assert_same, make_batch, value_and_gradient
from framework_stand_ins import installed, stand_in

from rlvr_ops import ace_loss_from_logps
from rlvr_ops.integrations.prime_rl import ace_loss, score_reference
from rlvr_ops.surrogates import FUNCTIONS, SURROGATES

LINEAR = [name for name in SURROGATES if not getattr(FUNCTIONS.get(name), "whole_batch", False)]


@dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict


@dataclass
class DefaultLossConfig:
    dppo_mask_low: float = 0.2
    dppo_mask_high: float = 0.2
    adv_tau: float = 1.0
    kl_tau: float = 1e-3


def default_loss_fn(inputs, config):
    """prime-rl's loss, from its formula: DPPO's binary total variation, and a squared log ratio to the sampler."""
    logps, sampled = inputs.trainer_logprobs, inputs.inference_logprobs
    moved = logps.exp() - sampled.exp()
    outside = torch.where(inputs.advantages > 0, moved > config.dppo_mask_high, moved < -config.dppo_mask_low)
    gain = inputs.loss_mask * ~outside * config.adv_tau * inputs.advantages * (logps - sampled).exp()
    losses = config.kl_tau * inputs.loss_mask * (logps - sampled) ** 2 - gain
    return LossOutputs((losses if inputs.loss_weights is None else losses * inputs.loss_weights).sum(), {})


@pytest.fixture(autouse=True)
def _prime_rl(monkeypatch):
    if installed("prime_rl"):
        return
    stand_in(
        monkeypatch,
        prime_rl__trainer__rl__loss={"LossOutputs": LossOutputs, "default_loss_fn": default_loss_fn},
        prime_rl__configs__trainer={"DefaultLossConfig": DefaultLossConfig},
    )


def summed(batch, ref=True, weights=None, **settings):
    """The sum over sequences that prime-rl takes, of which it divides by the global count of tokens."""

    def loss_of(logps):
        losses = [ace_loss(inputs_of(batch, i, logps[i], ref, weights), **settings).loss for i in range(len(logps))]
        return sum(losses) / batch.mask.sum()

    return loss_of


def inputs_of(batch, i, logps, ref=True, weights=None):
    return LossInputs(
        logps, batch.old[i], batch.ref[i] if ref else None, batch.advantages[i], batch.mask[i],
        None if weights is None else weights[i],
    )  # fmt: skip


def wanted(batch, **settings):
    return lambda logps: ace_loss_from_logps(
        logps, batch.advantages, ref_per_token_logps=batch.ref, old_per_token_logps=batch.old,
        completion_mask=batch.mask, loss_type="dapo", **settings,
    ).loss  # fmt: skip


NO_KL = {"default": {"kl_tau": 0.0}}


@pytest.mark.parametrize("settings", SETTINGS)
def test_ace_in_prime_rls_own_loss_has_the_gradient_of_ours(settings):
    """prime-rl writes DPPO with the ratio, ours with the log-probability: the same gradient, another value."""
    from rlvr_ops import Dppo

    batch = make_batch()
    found = value_and_gradient(summed(batch, **NO_KL, **settings), batch.logps)[1]
    ours = value_and_gradient(wanted(batch, surrogate=Dppo(threshold=0.2), **settings), batch.logps)[1]
    torch.testing.assert_close(found, ours, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("surrogate", LINEAR)
def test_each_surrogate_is_summed_so_that_prime_rls_count_makes_it_the_mean_over_tokens(surrogate, settings):
    batch = make_batch()
    found = value_and_gradient(summed(batch, surrogate=surrogate, **NO_KL, **settings), batch.logps)
    assert_same(found, value_and_gradient(wanted(batch, surrogate=surrogate, **settings), batch.logps))


def test_alpha_0_is_prime_rls_loss():
    from prime_rl.configs.trainer import DefaultLossConfig
    from prime_rl.trainer.rl.loss import default_loss_fn

    batch = make_batch()

    def stock(logps):
        inputs = [inputs_of(batch, i, logps[i], ref=False) for i in range(len(logps))]
        return sum(default_loss_fn(one, DefaultLossConfig()).loss for one in inputs) / batch.mask.sum()

    found = value_and_gradient(summed(batch, ref=False, alpha=0.0), batch.logps)
    assert_same(found, value_and_gradient(stock, batch.logps), tolerance=0)


@pytest.mark.parametrize("settings", [{}, {"surrogate": "sapo"}])
def test_only_negative_advantages_move_and_padding_never_reaches_the_gradient(settings):
    batch = make_batch()
    plain, weighted = (
        value_and_gradient(summed(batch, alpha=alpha, **NO_KL, **settings), batch.logps)[1] for alpha in (0.0, 1.0)
    )
    wrong = (batch.advantages < 0) & batch.mask
    assert torch.equal(plain[~wrong], weighted[~wrong])
    assert (weighted.abs()[wrong] > plain.abs()[wrong])[plain[wrong] != 0].all()
    assert not weighted[~batch.mask].any()


@pytest.mark.parametrize("settings", [{}, {"surrogate": "cispo"}, {"surrogate": "gmpo"}])
def test_prime_rls_loss_weights_scale_each_tokens_loss(settings):
    batch = make_batch()
    weights = torch.full_like(batch.logps, 0.5)
    halved = value_and_gradient(summed(batch, weights=weights, **settings), batch.logps)
    whole = value_and_gradient(summed(batch, **settings), batch.logps)
    assert_same(halved, [value / 2 for value in whole])


def test_the_surrogate_leaves_prime_rls_kl_term():
    batch = make_batch()
    terms = [
        value_and_gradient(summed(batch, surrogate="cispo", default={"kl_tau": tau}), batch.logps)
        for tau in (0.0, 0.01)
    ]
    squared = value_and_gradient(lambda logps: (batch.mask * (logps - batch.old) ** 2).sum(), batch.logps)
    count = batch.mask.sum()
    assert_same([b - a for a, b in zip(*terms, strict=True)], [0.01 * value / count for value in squared])


def test_ace_is_among_the_metrics_as_numbers_that_stack():
    batch = make_batch()
    outputs = [ace_loss(inputs_of(batch, i, batch.logps[i])) for i in range(2)]
    assert torch.stack([output.metrics["ace/weight/mean"] for output in outputs]).shape == (2,)


def test_a_reference_that_was_not_scored_is_refused():
    """prime-rl fills it with zeros where it packs such a sequence with others."""
    batch = make_batch()
    with pytest.raises(ValueError, match=r"LossInputs\.ref_logprobs is missing.*score_reference"):
        ace_loss(inputs_of(batch, 0, batch.logps[0], ref=False))
    batch.ref = torch.zeros_like(batch.ref)
    with pytest.raises(ValueError, match="holds only zeros"):
        summed(batch)(batch.logps - 3)


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="alfa"):
        ace_loss(inputs_of(make_batch(), 0, make_batch().logps[0]), alfa=1.0)


def test_grpo_scores_the_reference_as_opd_does(monkeypatch):
    class GRPOAlgorithm:
        async def connect(self, config):
            return config

    class OPDAlgorithm:
        async def score_episode(self, episode):
            return self.teacher_pool, episode

    algo = {"GRPOAlgorithm": GRPOAlgorithm, "OPDAlgorithm": OPDAlgorithm, "ALGORITHM_CLASSES": {"grpo": GRPOAlgorithm}}
    configs = {"FrozenModelConfig": SimpleNamespace}
    stand_in(monkeypatch, prime_rl__orchestrator__algo=algo, prime_rl__configs__algorithm=configs)
    score_reference("model", "http://ref:8000/v1")
    scorer = algo["ALGORITHM_CLASSES"]["grpo"]()
    asyncio.run(scorer.setup())
    pool, episode = asyncio.run(scorer.score_episode("episode"))
    assert (pool.name, pool.base_url, episode) == ("model", "http://ref:8000/v1", "episode")


@pytest.mark.parametrize("surrogate", sorted(set(SURROGATES) - set(LINEAR)))
def test_a_surrogate_that_compares_sequences_is_refused(surrogate):
    with pytest.raises(ValueError, match=r"whole batch.*one sequence at a time"):
        ace_loss(inputs_of(make_batch(), 0, make_batch().logps[0]), surrogate=surrogate)
