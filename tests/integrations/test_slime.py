"""rlvr_ops.integrations.slime on the lists and reducers that slime documents, or on slime itself where it is installed."""

from types import SimpleNamespace

import pytest
import torch
from framework_cases import SETTINGS, assert_same, make_batch, value_and_gradient
from framework_stand_ins import installed, stand_in

import rlvr_ops
from rlvr_ops import ace_loss_from_logps
from rlvr_ops.integrations.slime import ace_advantages, ace_loss
from rlvr_ops.surrogates import FUNCTIONS, SURROGATES

LINEAR = [name for name in SURROGATES if not getattr(FUNCTIONS.get(name), "whole_batch", False)]


def get_log_probs_and_entropy(logits, *, args, unconcat_tokens, total_lengths, response_lengths, **_):
    """slime's, but that the logits are the log-probabilities of the responses, one after another."""
    return torch.empty(0), {"log_probs": list(logits.split(response_lengths))}


def policy_loss_function(args, batch, logits, sum_of_sample_mean):
    """slime's PPO clip and KL term, from their formulas, over the keys that it documents."""
    _, scored = get_log_probs_and_entropy(
        logits, args=args, unconcat_tokens=None, total_lengths=None, response_lengths=batch["response_lengths"]
    )
    logps, advantages = torch.cat(scored["log_probs"]), torch.cat(batch["advantages"])
    ratio = (logps - torch.cat(batch["log_probs"])).exp()
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high) * advantages)
    loss = sum_of_sample_mean(losses)
    if args.use_kl_loss:
        loss = loss + args.kl_loss_coef * sum_of_sample_mean(logps - torch.cat(batch["ref_log_probs"]))
    return loss, {"loss": loss.detach(), "pg_loss": loss.detach()}


@pytest.fixture(autouse=True)
def _slime(monkeypatch):
    if installed("slime"):
        real = pytest.importorskip("slime.backends.megatron_utils.loss")
        monkeypatch.setattr(real, "get_log_probs_and_entropy", with_entropy)
        return
    stand_in(
        monkeypatch,
        slime__backends__megatron_utils__loss={
            "get_log_probs_and_entropy": get_log_probs_and_entropy,
            "get_rollout_top_p_logprob_kwargs": lambda args, batch: {},
            "policy_loss_function": policy_loss_function,
        },
    )


def with_entropy(logits, **others):
    empty, scored = get_log_probs_and_entropy(logits, **others)
    return empty, scored | {"entropy": [torch.zeros_like(logp) for logp in scored["log_probs"]]}


def args_of(**others):
    given = {
        "advantage_estimator": "grpo", "normalize_advantages": False, "use_rollout_logprobs": False, "use_tis": False,
        "use_opsm": False, "context_parallel_size": 1, "eps_clip": 0.2, "eps_clip_high": 0.2, "use_kl_loss": True,
        "kl_loss_coef": 0.0, "kl_loss_type": "k1", "eps_clip_c": None, "get_mismatch_metrics": False,
        "entropy_coef": 0.0, "use_unbiased_kl": False, "custom_pg_loss_reducer_function_path": None, "rollout_top_p": 1.0,
    }  # fmt: skip
    return SimpleNamespace(**given | others)


def data_of(batch, rows=range(6), **others):
    """slime's lists of one tensor for each sample; what a batch pads is masked here, as tool output is."""
    names = {
        "log_probs": batch.old,
        "ref_log_probs": batch.ref,
        "rollout_log_probs": batch.sampling,
        "advantages": batch.advantages,
    }
    cut = {name: [values[i] for i in rows] for name, values in names.items()}
    lengths = [batch.logps.shape[1]] * len(rows)
    return {
        **cut, "loss_masks": [batch.mask[i].int() for i in rows], "response_lengths": lengths, "total_lengths": lengths,
        "unconcat_tokens": None, "rewards": [float(batch.advantages[i, 0]) for i in rows],
    } | others  # fmt: skip


def reducer(batch, per_token=False, rows=range(6)):
    """slime's sum_of_sample_mean: the sum of samples' means, or, with --calculate-per-token-loss, of tokens."""
    masks = [batch.mask[i].float() for i in rows]

    def sum_of_sample_mean(values):
        parts = zip(values.split([len(mask) for mask in masks]), masks, strict=True)
        return sum((part * mask).sum() / (1 if per_token else mask.sum().clamp(min=1)) for part, mask in parts)

    return sum_of_sample_mean


def loss_of(batch, per_token=False, rows=range(6), args=None, **others):
    args, data = args or args_of(), data_of(batch, rows, **others)
    return lambda logps: ace_loss(args, data, logps.reshape(-1), reducer(batch, per_token, rows))[0]


def averaged(batch, per_token=False, **others):
    """slime's loss after slime has divided it by the global batch's samples or tokens."""
    loss, count = loss_of(batch, per_token, **others), batch.mask.sum() if per_token else len(batch.logps)
    return lambda logps: loss(logps) / count


def wanted(batch, per_token=False, **settings):
    return lambda logps: ace_loss_from_logps(
        logps, batch.advantages, ref_per_token_logps=batch.ref, old_per_token_logps=batch.old,
        completion_mask=batch.mask, loss_type="dapo" if per_token else "grpo", **settings,
    ).loss  # fmt: skip


def prefixed(settings):
    return {f"ace_{name}": value for name, value in settings.items()}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("per_token", [True, False])
def test_ace_in_slimes_own_loss_is_ours(per_token, settings):
    batch = make_batch()
    found = value_and_gradient(averaged(batch, per_token, args=args_of(**prefixed(settings))), batch.logps)
    assert_same(found, value_and_gradient(wanted(batch, per_token, **settings), batch.logps))


@pytest.mark.parametrize("surrogate", LINEAR)
@pytest.mark.parametrize("per_token", [True, False])
def test_each_surrogate_is_reduced_as_slime_reduces(per_token, surrogate):
    batch = make_batch()
    found = value_and_gradient(averaged(batch, per_token, args=args_of(ace_surrogate=surrogate)), batch.logps)
    assert_same(found, value_and_gradient(wanted(batch, per_token, surrogate=surrogate), batch.logps))


@pytest.mark.parametrize("kl", [{}, {"kl_loss_coef": 0.01}])
def test_alpha_0_is_slimes_loss(kl):
    from slime.backends.megatron_utils.loss import policy_loss_function

    batch, args = make_batch(), args_of(ace_alpha=0.0, **kl)
    data = data_of(batch)

    def stock(logps):
        return policy_loss_function(args, data, logps.reshape(-1), reducer(batch))[0]

    found = value_and_gradient(loss_of(batch, args=args), batch.logps)
    assert_same(found, value_and_gradient(stock, batch.logps), tolerance=0)


@pytest.mark.parametrize("settings", [{}, {"ace_surrogate": "sapo"}])
def test_only_negative_advantages_move_and_padding_never_reaches_the_gradient(settings):
    batch = make_batch()
    plain, weighted = (
        value_and_gradient(loss_of(batch, args=args_of(ace_alpha=alpha, **settings)), batch.logps)[1]
        for alpha in (0.0, 1.0)
    )
    wrong = (batch.advantages < 0) & batch.mask
    assert torch.equal(plain[~wrong], weighted[~wrong])
    assert (weighted.abs()[wrong] > plain.abs()[wrong])[plain[wrong] != 0].all()
    assert not weighted[~batch.mask].any()


@pytest.mark.parametrize("settings", [{}, {"ace_surrogate": "cispo"}, {"ace_surrogate": "gmpo"}])
def test_micro_batches_add_up(settings):
    batch, args = make_batch(), args_of(**settings)
    parts = [
        value_and_gradient(loss_of(batch, rows=rows, args=args), batch.logps[rows.start : rows.stop])
        for rows in (range(2), range(2, 6))
    ]
    whole = value_and_gradient(loss_of(batch, args=args), batch.logps)
    assert_same((parts[0][0] + parts[1][0], torch.cat([parts[0][1], parts[1][1]])), whole)


def test_the_surrogate_leaves_slimes_kl_term():
    batch = make_batch()
    with_kl, without = (
        value_and_gradient(loss_of(batch, args=args_of(ace_surrogate="cispo", kl_loss_coef=coefficient)), batch.logps)
        for coefficient in (0.01, 0.0)
    )
    kl = value_and_gradient(lambda logps: 0.01 * reducer(batch)((logps - batch.ref).reshape(-1)), batch.logps)
    assert_same([a - b for a, b in zip(with_kl, without, strict=True)], kl)


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.5, "shape": "relu"}, {"confidence_reduction": "sum"}])
def test_the_advantages_are_grpos_weighted_by_the_sampling_policy(settings):
    batch, data = make_batch(), data_of(make_batch())
    ace_advantages(args_of(**prefixed(settings)), data)
    found = rlvr_ops.ace_advantages(batch.advantages, batch.old, batch.ref, batch.mask, **settings)
    torch.testing.assert_close(torch.stack(data["advantages"]), found)
    assert torch.equal(torch.stack(data["returns"]), batch.advantages)


def test_with_use_rollout_logprobs_the_sampling_policy_is_the_engine():
    batch, data = make_batch(), data_of(make_batch(), log_probs=None)
    ace_advantages(args_of(use_rollout_logprobs=True), data)
    found = rlvr_ops.ace_advantages(batch.advantages, batch.sampling, batch.ref, batch.mask)
    torch.testing.assert_close(torch.stack(data["advantages"]), found)


def test_the_weight_is_logged_in_slimes_units():
    batch = make_batch()
    _, logged = ace_loss(args_of(), data_of(batch), batch.logps.reshape(-1), reducer(batch))
    assert logged["ace/weight"] > len(batch.logps)
    weights = rlvr_ops.ace_advantages(batch.advantages, batch.logps, batch.ref, batch.mask) / batch.advantages
    torch.testing.assert_close(logged["ace/weight"], reducer(batch)(weights.reshape(-1)))


def test_the_loss_that_is_logged_is_the_one_with_the_surrogate():
    batch, args = make_batch(), args_of(ace_surrogate="sapo", kl_loss_coef=0.01)
    loss, logged = ace_loss(args, data_of(batch), batch.logps.reshape(-1), reducer(batch))
    args = args_of(ace_surrogate="sapo")
    without_kl, _ = ace_loss(args, data_of(batch), batch.logps.reshape(-1), reducer(batch))
    assert torch.equal(logged["loss"], loss)
    torch.testing.assert_close(logged["pg_loss"], without_kl)


def test_with_use_rollout_logprobs_the_loss_takes_the_engine_for_the_old_policy():
    batch, settings = make_batch(), {"surrogate": "ppo_clip", "confidence": "old"}
    args = args_of(use_rollout_logprobs=True, **prefixed(settings))
    found = value_and_gradient(averaged(batch, args=args), batch.logps)
    batch.old = batch.sampling
    assert_same(found, value_and_gradient(wanted(batch, **settings), batch.logps))


@pytest.mark.parametrize("surrogate", [None, "sapo"])
def test_log_probabilities_are_scored_under_top_p_and_with_a_gradient_only_for_a_surrogate(surrogate, monkeypatch):
    import slime.backends.megatron_utils.loss as module

    seen, score = [], module.get_log_probs_and_entropy

    def scored(logits, top_p=None, **others):
        seen.append((top_p, torch.is_grad_enabled()))
        return score(logits, **others)

    monkeypatch.setattr(module, "get_log_probs_and_entropy", scored)
    monkeypatch.setattr(module, "get_rollout_top_p_logprob_kwargs", lambda args, batch: {"top_p": batch["top_p"]})
    loss_of(make_batch(), args=args_of(ace_surrogate=surrogate), top_p=0.9)(make_batch().logps)
    assert seen[0] == (0.9, surrogate is not None)


@pytest.mark.parametrize(
    "call", [ace_advantages, lambda args, data: ace_loss(args, data, make_batch().logps.reshape(-1), None)]
)
def test_a_missing_reference_is_refused(call):
    for missing in (None, []):
        with pytest.raises(ValueError, match=r"ref_log_probs is missing.*--use-kl-loss"):
            call(args_of(), data_of(make_batch(), ref_log_probs=missing))


def test_log_probs_that_slime_skipped_are_refused_in_the_advantages():
    with pytest.raises(ValueError, match=r"log_probs is missing.*--get-mismatch-metrics"):
        ace_advantages(args_of(), data_of(make_batch(), log_probs=None))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"normalize_advantages": True}, "--normalize-advantages"),
        ({"context_parallel_size": 2}, "--context-parallel-size"),
        ({"ace_surrogate": "cispo", "use_tis": True}, "--use-tis"),
        ({"ace_surrogate": "cispo", "use_opsm": True}, "--use-opsm"),
        (
            {"ace_surrogate": "cispo", "custom_pg_loss_reducer_function_path": "a.b"},
            "--custom-pg-loss-reducer-function-path",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(others, message):
    batch = make_batch()
    with pytest.raises(ValueError, match=message):
        loss_of(batch, args=args_of(**others))(batch.logps)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"ace_confidence": "current"}, "--custom-loss-function-path"),
        ({"ace_surrogate": "cispo"}, "--custom-loss-function-path"),
        ({"advantage_estimator": "ppo"}, "--advantage-estimator"),
        ({"normalize_advantages": True}, "--normalize-advantages"),
    ],
)
def test_what_the_advantages_cannot_do_is_refused(others, message):
    with pytest.raises(ValueError, match=message):
        ace_advantages(args_of(**others), data_of(make_batch()))


def test_an_unknown_ace_setting_is_refused():
    with pytest.raises(TypeError, match="alfa"):
        ace_advantages(args_of(ace_alfa=1.0), data_of(make_batch()))


@pytest.mark.parametrize("surrogate", sorted(set(SURROGATES) - set(LINEAR)))
def test_a_surrogate_that_compares_samples_is_refused(surrogate):
    batch = make_batch()
    with pytest.raises(ValueError, match=r"whole batch.*denominators"):
        loss_of(batch, args=args_of(ace_surrogate=surrogate))(batch.logps)
