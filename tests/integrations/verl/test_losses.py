"""The registered losses inside verl's own `ppo_loss`, on tensors."""

import pytest
import tiny
import torch
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.workers.utils import losses

from rlvr_ops import Ace, ace_loss_from_logps, surrogates
from rlvr_ops.integrations.verl.losses import METHODS, NAMES, Method, PolicyLoss
from rlvr_ops.integrations.verl.reference import ppo_loss
from rlvr_ops.integrations.verl.settings import say_once

MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
OURS = {"epsilon_low": 0.2, "epsilon_high": 0.28}
SEQUENCE = {"importance_sampling_level": "sequence"}
CALLS = {  # what each name says in the keywords of `ace_loss`, with verl's clip range where verl has one
    "ppo-clip": OURS | {"delta": 3.0},
    "grpo": OURS | {"delta": 3.0},
    "dapo": OURS | {"delta": 3.0},
    "dr-grpo": OURS | {"delta": 3.0},
    "gspo": OURS | SEQUENCE,
    "gspo-token": OURS | {"importance_sampling_level": "sequence_token"},
    "luspo": OURS | SEQUENCE,
    "cispo-two-sided": {"surrogate": surrogates.CispoTwoSided(0.2, 0.28)},
    "gmpo": {"surrogate": surrogates.Gmpo(0.2, 0.28)},
    "sapo": {"surrogate": surrogates.Sapo(1.0, 1.05)},
    "clip-cov": {"surrogate": surrogates.ClipCov(0.0002, 1.0, 5.0, 0.2, 0.28)},
    "kl-cov": {"surrogate": surrogates.KLCov(0.0002, 0.1)},
    "fipo": {"surrogate": surrogates.Fipo(0.2, 0.28)},
}
VERLS = {"ppo-clip": "vanilla", "cispo-two-sided": "cispo", "sapo": "sapo", "gmpo": "geo_mean", "reinforce": "gpg"}
ONE_MODE = {"sapo": "seq-mean-token-mean", "geo_mean": "seq-mean-token-mean"}  # in verl, whatever they are told


def mode_of(method):
    return METHODS[method.replace("-", "_")].aggregation or "token-mean"


def run(loss_mode, data, logps, ace=None, loss=ppo_loss, counts=None, mode="token-mean", numbers=None, **config):
    """Loss, its gradient by logps (B, T), and metrics of verl's ppo_loss."""
    logps = logps.clone().requires_grad_()
    values = torch.cat([torch.cat([row, row.new_zeros(1)]) for row in logps])  # one prompt token, no padding
    td = tiny.plain(data, counts)
    actor = tiny.actor(loss_mode, numbers, loss_agg_mode=mode, **CLIP | config)
    if loss is ppo_loss:
        value, metrics = ppo_loss({"log_probs": values}, td, config=actor, ace=ace)
    else:
        value, metrics = loss(actor, {"log_probs": values}, td)
    value.backward()
    return value.detach(), logps.grad, {name: m.values[0] for name, m in metrics.items() if hasattr(m, "values")}


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=tolerance)


@pytest.fixture
def data():
    return tiny.batch()


@pytest.fixture
def logps(data):
    return data["old_log_probs"] + 0.3 * torch.randn(4, tiny.RESPONSE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", [False, True], ids=["", "rollout_is_weights"])
def test_ace_with_alpha_0_is_verls_vanilla_loss(mode, weights, logps):
    data = tiny.batch(weights=weights)
    ours = run("ace", data, logps, Ace(alpha=0.0), mode=mode)
    theirs = run("vanilla", data, logps, loss=losses.ppo_loss, mode=mode)
    close(ours, theirs)
    assert ours[2]["actor/ppo_kl"] == pytest.approx(theirs[2]["actor/ppo_kl"], abs=1e-6)
    assert ours[2]["actor/pg_clipfrac"] == pytest.approx(theirs[2]["actor/pg_clipfrac"], abs=1e-6)


def test_pg_clipfrac_counts_what_verl_counts_as_pg_clipfrac_lower_too(data, logps):
    logps[1, :2] = data["old_log_probs"][1, :2] + 1.5  # of a wrong rollout, beyond clip_ratio_c = 3
    ours, theirs = run("ace", data, logps, Ace(alpha=0.0)), run("vanilla", data, logps, loss=losses.ppo_loss)
    close(ours, theirs)
    assert theirs[2]["actor/pg_clipfrac_lower"] > 0
    verls = theirs[2]["actor/pg_clipfrac"] + theirs[2]["actor/pg_clipfrac_lower"]
    assert ours[2]["actor/pg_clipfrac"] == pytest.approx(verls, abs=1e-6)


@pytest.mark.parametrize("weights", [False, True], ids=["", "rollout_is_weights"])
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("kl-cov", {}),
        ("kl-cov", {"kl_cov_ratio": 0.3, "ppo_kl_coef": 1.0}),
        ("clip-cov", {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05}),  # every candidate, so that nothing is drawn
    ],
)
def test_a_loss_of_the_whole_batch_is_verls(name, numbers, weights, logps):
    data = tiny.batch(weights=weights)
    theirs = run(name.replace("-", "_"), data, logps, loss=losses.ppo_loss, numbers=numbers)
    close(run(f"rlvr-{name}", data, logps, numbers=numbers), theirs)


def test_real_has_no_name_and_takes_neither_ace_nor_rollout_weights(logps, monkeypatch):
    with pytest.raises(ValueError, match="Unsupported loss mode: rlvr-real"):
        get_policy_loss_fn("rlvr-real")
    method = Method(lambda config: surrogates.Real(2))
    for name in ("rlvr-mine", "ace-mine"):
        monkeypatch.setitem(POLICY_LOSS_REGISTRY, name, PolicyLoss(name, method, with_ace=name.startswith("ace")))
    run("rlvr-mine", tiny.batch(), logps)
    for name, weights, refused in (
        ("rlvr-mine", True, "sampling_correction"), ("ace-mine", False, "alpha > 0"), ("ace-mine", True, "alpha > 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{refused}: surrogate Real"):
            run(name, tiny.batch(weights=weights), logps, Ace())


def test_verls_geo_mean_counts_a_rollout_without_tokens_and_gmpo_leaves_it_out(data, logps):
    data["response_mask"][2] = 0
    mode = "seq-mean-token-mean"
    loss, gradient, _ = run("rlvr-gmpo", data, logps, mode=mode)
    close((loss * 3 / 4, gradient * 3 / 4), run("geo_mean", data, logps, loss=losses.ppo_loss, mode=mode), 1e-5)


@pytest.mark.parametrize("weights", [False, True], ids=["", "rollout_is_weights"])
@pytest.mark.parametrize("name", VERLS)
def test_a_loss_that_verl_has_too_is_verls(name, weights, logps):
    data, theirs = tiny.batch(weights=weights), VERLS[name]
    mode = ONE_MODE.get(theirs, "token-mean")
    close(run(f"rlvr-{name}", data, logps, mode=mode), run(theirs, data, logps, loss=losses.ppo_loss, mode=mode), 1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.3])
@pytest.mark.parametrize("method", sorted(name.removeprefix("ace-") for name in NAMES if name.startswith("ace-")))
def test_every_loss_is_our_own_from_log_probabilities(method, alpha, data, logps):
    mode = mode_of(method)
    leaf = logps.clone().requires_grad_()
    out = ace_loss_from_logps(
        leaf, data["advantages"], ref_per_token_logps=data["ref_log_prob"], old_per_token_logps=data["old_log_probs"],
        completion_mask=data["response_mask"], alpha=alpha, loss_type=mode,
        **CALLS.get(method, {"surrogate": method.replace("-", "_")}),
    )  # fmt: skip
    out.loss.backward()
    found = run(f"ace-{method}", data, logps, Ace(alpha), mode=mode)
    close(found, (out.loss.detach(), leaf.grad))
    for name, value in out.metrics.items():
        assert found[2][name] == pytest.approx(float(value), abs=1e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_plain_loss_reads_no_reference_and_is_the_one_with_alpha_0(method, data, logps):
    name, mode = method.replace("_", "-"), mode_of(method)
    without = {key: value for key, value in data.items() if key != "ref_log_prob"}
    close(run(f"rlvr-{name}", without, logps, mode=mode), run(f"ace-{name}", data, logps, Ace(0.0), mode=mode), 0)


def test_ace_is_ace_ppo_clip(data, logps):
    close(run("ace", data, logps, Ace()), run("ace-ppo-clip", data, logps, Ace()), 0)


def test_only_wrong_rollouts_weigh_more(data, logps):
    plain, with_ace = (run("ace", data, logps, Ace(alpha))[1] for alpha in (0.0, 1.0))
    right = data["advantages"][:, 0] > 0
    assert torch.equal(plain[right], with_ace[right])
    assert (with_ace[~right].abs() > plain[~right].abs()).any()


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_average_to_the_whole_batch(mode, data, logps):
    config = {"loss_scale_factor": 8} if mode.endswith("norm") else {}
    tokens = int(data["response_mask"].sum())
    one = {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": 4}
    whole = run("ace", data, logps, Ace(), counts=one, mode=mode, **config)
    parts = [
        run("ace", {k: v[rows] for k, v in data.items()}, logps[rows], Ace(), counts=one | {"dp_size": 2}, mode=mode, **config)
        for rows in (slice(0, 1), slice(1, 4))
    ]  # fmt: skip
    close((sum(p[0] for p in parts) / 2, torch.cat([p[1] for p in parts]) / 2), whole)


def test_a_rollout_without_tokens_is_left_out_as_in_verl(data, logps):
    data["response_mask"][2] = 0
    mode = "seq-mean-token-mean"
    close(run("ace", data, logps, Ace(0.0), mode=mode), run("vanilla", data, logps, loss=losses.ppo_loss, mode=mode))


def test_the_confidence_may_be_the_sampling_policys(data, logps):
    ace = Ace(confidence="old")
    leaf = logps.clone().requires_grad_()
    out = ace_loss_from_logps(
        leaf, data["advantages"], ref_per_token_logps=data["ref_log_prob"], old_per_token_logps=data["old_log_probs"],
        completion_mask=data["response_mask"], loss_type="dapo", confidence="old", **CALLS["ppo-clip"],
    )  # fmt: skip
    out.loss.backward()
    close(run("ace", data, logps, ace), (out.loss.detach(), leaf.grad))


def test_ace_without_a_reference_is_refused(data, logps):
    del data["ref_log_prob"]
    with pytest.raises(ValueError, match=r"loss_mode=ace compares .*use_kl_loss=True .*kl_loss_coef=0"):
        run("ace", data, logps)


def test_a_reference_of_zeros_is_refused(data, logps):
    data["ref_log_prob"] = torch.where(data["response_mask"] == 1, 0.0, -3.0)
    with pytest.raises(ValueError, match=r"ref_log_prob holds only zeros.*use_kl_loss=True .*kl_loss_coef=0"):
        run("ace", data, logps)
    run("ace", data, logps, Ace(0.0))


def test_verls_registry_alone_is_refused_although_the_batch_has_a_reference(data, logps):
    with pytest.raises(ValueError, match=r"trainer_mode=ace \(or VERL_ENGINE_VENDOR=rlvr_ops\)"):
        run("ace", data, logps, loss=losses.ppo_loss)


def test_another_aggregation_than_the_names_is_refused(data, logps):
    with pytest.raises(ValueError, match=r"averages seq-mean-token-mean.*got token-mean"):
        run("ace-grpo", data, logps, Ace())


def test_without_a_trainer_alpha_comes_from_the_environment_and_the_log_says_so(data, logps, monkeypatch, caplog):
    say_once.cache_clear()
    monkeypatch.setenv("RLVR_OPS_ACE_ALPHA", "2.5")
    wanted = run("ace", data, logps, Ace(2.5))
    assert "environment" not in caplog.text
    close(run("ace", data, logps), wanted, 0)
    assert "alpha=2.5" in caplog.text
    assert "from the environment or by default: trainer.v1.trainer_mode=ace alone reads the section ace" in caplog.text


def test_the_numbers_are_said_once(data, logps, caplog):
    say_once.cache_clear()
    for _ in range(2):
        run("ace-dapo", data, logps, Ace(0.7))
    said = [record.message for record in caplog.records if "ace-dapo" in record.message]
    assert len(said) == 1
    assert "alpha=0.7" in said[0]
    assert "epsilon_high=0.28" in said[0]


def test_no_name_is_one_of_verls():
    theirs = {name for name, loss in POLICY_LOSS_REGISTRY.items() if name not in NAMES}
    assert {"vanilla", "gspo", "sapo", "cispo", "geo_mean", "gpg"} <= theirs
    assert all(name == "ace" or name.startswith(("ace-", "rlvr-")) for name in NAMES)
    assert {f"rlvr-{name.replace('_', '-')}" for name in surrogates.SURROGATES} <= set(NAMES)
