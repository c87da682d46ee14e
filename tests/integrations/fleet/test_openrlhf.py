"""rlvr_ops.integrations.openrlhf in openrlhf's own actor trainer and PolicyLoss."""

import copy
from types import SimpleNamespace

import pytest
import torch
from framework_cases import SETTINGS, assert_same, make_batch, value_and_gradient
from openrlhf.models import PolicyLoss
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ray import ppo_actor

from rlvr_ops import Real, ace_loss_from_logps
from rlvr_ops.integrations import openrlhf
from rlvr_ops.surrogates import SURROGATES


def step(batch, attached, rows=slice(None), loss=None, counts=None, ref=True, **settings):
    """The gradient and the metrics of one real ActorPPOTrainer.training_step, whose actor looks its log-probabilities up."""
    leaf = batch.logps[rows].clone().requires_grad_()
    trainer = object.__new__(ppo_actor.ActorPPOTrainer)
    trainer.actor, trainer.actor_loss_fn = Lookup(leaf), loss or PolicyLoss()
    trainer.args = arguments()
    trainer.strategy = SimpleNamespace(
        ring_attn_group=None, backward=lambda loss, *_: loss.backward(), optimizer_step=lambda *_, **__: None,
        get_grad_norm=lambda _: 0.0,
    )  # fmt: skip
    trainer.aux_loss, trainer.ema_model, trainer.replay_buffer = False, None, None
    trainer.actor_optim, trainer.actor_scheduler = None, SimpleNamespace(get_last_lr=lambda: [0.0])
    if attached:
        openrlhf.attach(trainer, **settings)
    experience = Experience(
        sequences=torch.zeros(len(leaf), 9, dtype=torch.long), attention_mask=torch.ones(len(leaf), 9),
        action_mask=batch.mask[rows], action_log_probs=batch.old[rows], advantages=batch.advantages[rows],
        base_action_log_probs=batch.ref[rows] if ref else None, rollout_log_probs=batch.sampling[rows], info={},
    )  # fmt: skip
    status = trainer.training_step(experience, 0.0, 0, counts)
    return status["metrics"]["policy_loss"], leaf.grad, status["metrics"]


def wanted(batch, loss_type, **settings):
    def loss_of(logps):
        return ace_loss_from_logps(
            logps, batch.advantages, ref_per_token_logps=batch.ref, old_per_token_logps=batch.old,
            completion_mask=batch.mask, loss_type=loss_type, **settings,
        ).loss  # fmt: skip

    return value_and_gradient(loss_of, batch.logps)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("token_level", [True, False])
def test_ace_in_openrlhfs_own_loss_is_ours(token_level, settings):
    batch = make_batch()
    found = step(batch, True, loss=PolicyLoss(token_level_loss=token_level), **settings)
    assert_same(found[:2], wanted(batch, "dapo" if token_level else "grpo", **settings))


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("token_level", [True, False])
def test_each_surrogate_has_openrlhfs_denominators(token_level, surrogate):
    batch = make_batch()
    found = step(batch, True, loss=PolicyLoss(token_level_loss=token_level), surrogate=surrogate)
    assert_same(found[:2], wanted(batch, "dapo" if token_level else "grpo", surrogate=surrogate))


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"token_level_loss": False},
        {"dual_clip": 3.0},
        {"policy_loss_type": "gspo"},
        {"is_correction_level": "token", "is_correction_mode": "clip"},
    ],
)
def test_alpha_0_is_openrlhfs_loss(own):
    batch = make_batch()
    found, stock = (step(batch, attached, loss=PolicyLoss(**own), alpha=0.0) for attached in (True, False))
    assert_same(found[:2], stock[:2], tolerance=0)
    assert found[2].keys() == stock[2].keys()


@pytest.mark.parametrize("settings", [{}, {"surrogate": "sapo"}])
def test_only_negative_advantages_move_and_padding_never_reaches_the_gradient(settings):
    batch = make_batch()
    plain, weighted = (step(batch, True, alpha=alpha, **settings)[1] for alpha in (0.0, 1.0))
    wrong = (batch.advantages < 0) & batch.mask
    assert torch.equal(plain[~wrong], weighted[~wrong])
    assert (weighted.abs()[wrong] > plain.abs()[wrong])[plain[wrong] != 0].all()
    assert not weighted[~batch.mask].any()


@pytest.mark.parametrize("settings", [{}, {"surrogate": "cispo"}, {"surrogate": "gmpo", "confidence": "old"}])
@pytest.mark.parametrize("token_level", [True, False])
def test_micro_batches_add_up_over_two_data_parallel_ranks(token_level, settings):
    batch, loss = make_batch(), PolicyLoss(token_level_loss=token_level)
    counts = {"dp_size": 2, "batch_num_tokens": batch.mask.sum().float(), "global_batch_size": torch.tensor(6.0)}
    parts = [step(batch, True, rows, copy.copy(loss), counts, **settings)[:2] for rows in (slice(0, 2), slice(2, 6))]
    mean = (parts[0][0] + parts[1][0]) / 2, torch.cat([parts[0][1], parts[1][1]]) / 2  # DeepSpeed's mean over ranks
    assert_same(mean, step(batch, True, loss=loss, **settings)[:2])


def test_ace_is_among_the_metrics():
    metrics = step(make_batch(), True)[2]
    assert metrics["ace/weight/mean"] > 1
    assert {"ppo_clip_ratio", "ppo_kl", "ace/shift/mean"} <= metrics.keys()


@pytest.mark.parametrize("token_level", [True, False])
def test_without_counts_a_surrogate_is_averaged_over_the_rollouts_with_tokens_as_openrlhfs_loss_is(token_level):
    batch, loss = make_batch(), PolicyLoss(token_level_loss=token_level)
    batch.mask[2] = False
    counts = {"dp_size": 2, "batch_num_tokens": None, "global_batch_size": None}
    ours = step(batch, True, loss=loss, counts=counts, alpha=0.0, surrogate="ppo_clip")
    theirs = step(batch, False, loss=loss, counts=counts)
    assert_same(ours[:2], theirs[:2])
    assert ours[2]["ppo_clip_ratio"] == pytest.approx(theirs[2]["ppo_clip_ratio"])
    assert theirs[2]["ppo_clip_ratio"] > 0


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match=r"base_action_log_probs is missing.*--algo\.kl\.use_loss"):
        step(make_batch(), True, ref=False)
    for kl in (SimpleNamespace(use_loss=False, init_coef=0.01), SimpleNamespace(use_loss=True, init_coef=0.0)):
        args = SimpleNamespace(algo=SimpleNamespace(kl=kl))
        trainer = SimpleNamespace(actor_loss_fn=PolicyLoss(), training_step=None, args=args)
        with pytest.raises(ValueError, match=r"--algo\.kl\.init_coef above 0"):
            openrlhf.attach(trainer)
        openrlhf.attach(trainer, alpha=0.0)


def test_a_correction_that_a_surrogate_would_ignore_is_refused():
    loss = PolicyLoss(is_correction_level="token")
    with pytest.raises(ValueError, match=r"is_correction_level.*sampling_correction"):
        step(make_batch(), True, loss=loss, surrogate="cispo")


def test_a_surrogate_of_groups_is_refused():
    with pytest.raises(ValueError, match=r"surrogate=Real.*OpenRLHF shuffles"):
        step(make_batch(), True, alpha=0.0, surrogate=Real(2))


def test_the_command_line_imports_an_actor_whose_trainer_has_ace(monkeypatch):
    stock = ppo_actor.PolicyModelActor
    monkeypatch.setattr(ppo_actor, "PolicyModelActor", stock)
    openrlhf.install(alpha=0.5)
    mine, theirs = (remote.__ray_metadata__.modified_class for remote in (ppo_actor.PolicyModelActor, stock))
    assert issubclass(mine, theirs)

    def init(self, *_):
        self.trainer = SimpleNamespace(actor_loss_fn=PolicyLoss(), training_step=lambda _: None, args=arguments())

    monkeypatch.setattr(theirs, "init_model_from_pretrained", init)
    actor = object.__new__(mine)
    actor.init_model_from_pretrained(None, None)
    actor.trainer.training_step("experience")
    assert actor.trainer.actor_loss_fn.args[0].alpha == 0.5


def test_a_bad_setting_is_refused_before_anything_starts():
    with pytest.raises(TypeError, match="alpa"):
        openrlhf.install(alpa=1.0)


class Lookup:
    """An actor whose log-probabilities are given."""

    def __init__(self, logps):
        self.logps = logps

    def train(self):
        """Nothing to switch."""

    def __call__(self, *_, **__):
        return self.logps, SimpleNamespace()


def arguments():
    return SimpleNamespace(
        actor=SimpleNamespace(entropy_coef=None), train=SimpleNamespace(dynamic_batch_enable=False),
        algo=SimpleNamespace(kl=SimpleNamespace(use_loss=True, init_coef=1e-8, estimator="k3", unbiased_gradient=False)),
    )  # fmt: skip
