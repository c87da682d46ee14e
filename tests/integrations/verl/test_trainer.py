"""The trainer that trainer.v1.trainer_mode=ace chooses, on verl's own configuration. Its queue and its workers are stand-ins."""

import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import verl
from hydra import compose, initialize_config_dir
from tensordict import TensorDict
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import validate_config

from rlvr_ops import Ace, ace_advantages, ace_loss_from_logps
from rlvr_ops.integrations.verl import trainer as ours
from rlvr_ops.integrations.verl.settings import say_once

SCORED = ("actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_coef=0")
MICRO = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2"
ACE_LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode=ace"


def configuration(*overrides):
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", overrides=["trainer.v1.trainer_mode=ace", MICRO, *overrides])


def make(*overrides):
    config = configuration(*overrides)
    return get_trainer_cls(config.trainer.v1.trainer_mode)(config)


def test_verl_finds_the_trainer_and_takes_it_for_its_own_synchronous_one():
    trainer = make(*SCORED)
    assert isinstance(trainer, PPOTrainerSync)
    assert trainer.trainer_mode == trainer.config.trainer.v1.trainer_mode == "sync"
    assert type(trainer.replay_buffer).__name__ == "ReplayBuffer"


def test_verls_own_validation_accepts_the_configuration():
    micro = [f"actor_rollout_ref.{part}.log_prob_micro_batch_size_per_gpu=2" for part in ("ref", "rollout")]
    validate_config(
        configuration(*SCORED, ACE_LOSS, "++ace.alpha=0.5", *micro), use_reference_policy=True, use_critic=False
    )


@pytest.mark.parametrize("loss", ["vanilla", "ace", "ace-dapo", "rlvr-cispo"])
def test_a_run_that_scores_no_reference_is_refused_at_its_start(loss):
    with pytest.raises(ValueError, match=r"none is scored: set .*use_kl_loss=True .*kl_loss_coef=0"):
        make(f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}")


def test_with_alpha_0_no_reference_is_needed():
    assert make("++ace.alpha=0").ace.alpha == 0


def test_a_reference_for_the_reward_will_do():
    assert make("algorithm.use_kl_in_reward=True").use_reference_policy


def test_the_confidence_of_the_policy_in_training_needs_a_loss_that_applies_ace():
    with pytest.raises(ValueError, match=r"ace.confidence=current needs .*loss_mode=ace, got vanilla"):
        make(*SCORED, "++ace.confidence=current")


def test_distillation_under_a_loss_of_ours_is_refused():
    with pytest.raises(ValueError, match="replaces the loss that distillation uses"):
        make(*SCORED, ACE_LOSS, "distillation.enabled=True")


@pytest.mark.parametrize(
    ("section", "message"), [("alhpa: 1", "takes alpha, .*got alhpa"), ("alpha: much", "a number")]
)
def test_a_wrong_section_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        make(*SCORED, f"+ace={{{section}}}")


def test_the_configuration_wins_over_the_environment_and_is_said_once(monkeypatch, caplog):
    say_once.cache_clear()
    monkeypatch.setenv("RLVR_OPS_ACE_ALPHA", "3")
    monkeypatch.setenv("RLVR_OPS_ACE_SHAPE", "relu")
    for _ in range(2):
        assert make(*SCORED, "++ace.alpha=0.25").ace == Ace(0.25, "old", "mean", "relu")
    said = [record.message for record in caplog.records if "alpha=0.25" in record.message]
    assert said == [
        "rlvr_ops: Ace(alpha=0.25, confidence='old', reduction='mean', shape='relu') in the advantages of the loss vanilla"
    ]


def test_confidences_are_the_places_own_unless_they_are_said():
    assert make(*SCORED, ACE_LOSS).ace.confidence == "current"
    assert make(*SCORED).ace.confidence == "old"
    assert make(*SCORED, ACE_LOSS, "++ace.confidence=old").ace.confidence == "old"


def test_the_workers_get_a_loss_that_sees_the_reference(monkeypatch, models):
    sent = []
    monkeypatch.setattr(PPOTrainerSync, "_setup", lambda self: None)
    trainer = make(*SCORED, ACE_LOSS, "++ace.alpha=1.3", "actor_rollout_ref.actor.strategy=fsdp2")
    trainer.actor_rollout_wg = SimpleNamespace(set_loss_fn=sent.append)
    trainer._setup()
    worker, tensors = tiny.training_worker(models()), tiny.batch()
    worker.set_loss_fn(pickle.loads(pickle.dumps(sent[0])))
    loss = tiny.tu.get(worker.train_batch(tiny.nested(tensors)), "metrics")["loss"]
    _, logps, _ = tiny.plain_scores(models(), tensors)
    out = ace_loss_from_logps(
        logps, tensors["advantages"], ref_per_token_logps=tensors["ref_log_prob"], completion_mask=tensors["response_mask"],
        old_per_token_logps=tensors["old_log_probs"], alpha=1.3, loss_type="dapo", delta=3.0,
    )  # fmt: skip
    assert loss == pytest.approx(out.loss.item(), abs=1e-5)


@pytest.mark.parametrize("loss", ["vanilla", "rlvr-cispo"])
def test_another_loss_is_left_to_verl_and_its_advantages_are_weighed(loss, monkeypatch):
    tensors, sent, put = tiny.batch(), [], {}
    mask = tensors["response_mask"]
    stored = {
        name: torch.nested.as_nested_tensor(
            [row[: int(n)] for row, n in zip(tensors[name], mask.sum(1), strict=True)], layout=torch.jagged
        )
        for name in ours.FIELDS
    }

    class Queue:
        def kv_batch_get(self, keys, partition_id, select_fields):
            return TensorDict({name: stored[name] for name in select_fields}, batch_size=4)

        def kv_batch_put(self, keys, partition_id, fields):
            put.update(fields.items())
            return batch

    class Batch(SimpleNamespace):
        def __len__(self):
            return 4

    batch = Batch(keys=list("abcd"), partition_id="train")
    monkeypatch.setattr(ours, "tq", Queue())
    monkeypatch.setattr(PPOTrainerSync, "_setup", lambda self: None)
    monkeypatch.setattr(PPOTrainerSync, "_compute_advantage", lambda self, batch, metrics: batch)
    trainer = make(*SCORED, "++ace.alpha=0.8", f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}")
    trainer.actor_rollout_wg = SimpleNamespace(set_loss_fn=sent.append)
    trainer._setup()
    metrics = {}
    assert trainer._compute_advantage(batch, metrics) is batch
    assert sent == []
    wanted = ace_advantages(tensors["advantages"], tensors["old_log_probs"], tensors["ref_log_prob"], mask, alpha=0.8)
    found = put["advantages"].to_padded_tensor(0.0)
    torch.testing.assert_close(found, wanted)
    right = tensors["advantages"][:, 0] > 0
    assert torch.equal(found[right], tensors["advantages"][right])
    assert not torch.equal(found[~right], tensors["advantages"][~right])
    gap = ((tensors["old_log_probs"] - tensors["ref_log_prob"]) * mask).sum(1) / mask.sum(1)
    assert metrics["actor/ace/shift/mean"] == pytest.approx(float(gap[~right].mean()), abs=1e-5)
    assert metrics["actor/ace/weight/max"] == pytest.approx(
        1 + 0.8 * float(torch.nn.functional.softplus(gap[~right]).max()), abs=1e-5
    )


def test_weighing_takes_advantages_per_token_and_touches_wrong_rollouts_only():
    advantages = torch.tensor([[0.5, 0.5, 0.0], [-0.5, -0.5, -0.5]])
    logps = torch.full((2, 3), -2.0)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    weighed, metrics = ours.weighed(advantages, logps, logps, mask, ace=Ace(confidence="old"))
    assert weighed[0].tolist() == [0.5, 0.5, 0.0]
    torch.testing.assert_close(weighed[1], torch.full((3,), -0.5 * (1 + math.log(2))))
    assert metrics["actor/ace/weight/mean"] == pytest.approx(1 + math.log(2))


@pytest.mark.parametrize("numbers", [{"reduction": "sum", "alpha": 0.1}, {"shape": "relu"}])
def test_weighing_follows_every_number_of_ace(numbers):
    tensors, ace = tiny.batch(), Ace(confidence="old", **numbers)
    given = (tensors["advantages"], tensors["old_log_probs"], tensors["ref_log_prob"], tensors["response_mask"])
    weighed, metrics = ours.weighed(*given, ace=ace)
    wanted = ace_advantages(*given, alpha=ace.alpha, confidence_reduction=ace.reduction, shape=ace.shape)
    torch.testing.assert_close(weighed, wanted)
    plain, _ = ours.weighed(*given, ace=Ace(confidence="old", alpha=ace.alpha))
    assert not torch.equal(weighed, plain)
    most = (wanted / tensors["advantages"])[tensors["response_mask"] == 1].max()
    assert metrics["actor/ace/weight/max"] == pytest.approx(float(most), rel=1e-5)


def test_a_reference_of_zeros_is_refused_where_advantages_are_weighed():
    tensors = tiny.batch()
    ref = torch.zeros_like(tensors["old_log_probs"])
    with pytest.raises(ValueError, match=r"ref_log_prob holds only zeros.*use_kl_loss=True"):
        ours.weighed(tensors["advantages"], tensors["old_log_probs"], ref, tensors["response_mask"], ace=Ace())


@pytest.mark.parametrize("overrides", [(*SCORED, ACE_LOSS), ("++ace.alpha=0",)], ids=["weighing-loss", "alpha-0"])
def test_advantages_are_left_alone_where_nothing_is_to_be_weighed(monkeypatch, overrides):
    monkeypatch.setattr(PPOTrainerSync, "_compute_advantage", lambda self, batch, metrics: batch)
    monkeypatch.delattr(ours, "tq")
    assert make(*overrides)._compute_advantage("batch", {}) == "batch"
