"""rlvr_ops.integrations.skyrl in skyrl's own trainer, policy worker and losses."""

from types import SimpleNamespace

import pytest
import torch
from framework_cases import SETTINGS, assert_same, make_batch, value_and_gradient
from ray import cloudpickle
from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
from skyrl.backends.skyrl_train.utils.ppo_utils import (
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
)
from skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker import PolicyWorker
from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.dataset.replay_buffer import Experience
from skyrl.train.trainer import RayPPOTrainer

from rlvr_ops import ace_advantages, ace_loss_from_logps
from rlvr_ops.integrations.settings import Settings
from rlvr_ops.integrations.skyrl import ace_policy_loss, ace_trainer, ace_worker
from rlvr_ops.surrogates import FUNCTIONS, SURROGATES

REDUCTIONS = {"token_mean": "dapo", "sequence_mean": "grpo", "seq_mean_token_sum_norm": "dr_grpo"}

LINEAR = [name for name in SURROGATES if not getattr(FUNCTIONS.get(name), "whole_batch", False)]


def config(**algorithm):
    chosen = SkyRLTrainConfig()
    for name, value in ({"temperature": 1.0, "max_seq_len": 7} | algorithm).items():
        setattr(chosen.trainer.algorithm, name, value)
    return chosen


def scaled(batch, reduction, rows=slice(None)):
    """Advantages as SkyRL's trainer hands them to its workers."""
    whole = apply_loss_reduction_to_advantages_minibatch(batch.advantages, batch.mask.float(), reduction, 2, 7)
    return whole[rows]


def loss_of(batch, chosen, advantages, own="regular", rows=slice(None), ref=True):
    experience = SimpleNamespace(base_action_log_probs=batch.ref[rows] if ref else None)
    algorithm = config(policy_loss_type=own).trainer.algorithm
    return lambda logps: ace_policy_loss(
        chosen, PolicyLossRegistry.get(own), experience, logps, batch.old[rows], advantages, algorithm,
        loss_mask=batch.mask[rows].float(), rollout_logprobs=batch.sampling[rows],
    )[0]  # fmt: skip


def ours(batch, loss_type, **settings):
    return lambda logps: ace_loss_from_logps(
        logps, batch.advantages, ref_per_token_logps=batch.ref, old_per_token_logps=batch.old,
        completion_mask=batch.mask, loss_type=loss_type, **settings,
    ).loss  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ace_in_skyrls_own_loss_is_ours_under_each_reduction(reduction, settings):
    batch = make_batch()
    found = value_and_gradient(loss_of(batch, Settings(**settings), scaled(batch, reduction)), batch.logps)
    assert_same(found, value_and_gradient(ours(batch, REDUCTIONS[reduction], **settings), batch.logps))


@pytest.mark.parametrize("surrogate", LINEAR)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_each_surrogate_has_skyrls_denominators(reduction, surrogate):
    batch = make_batch()
    chosen = Settings(surrogate=surrogate)
    found = value_and_gradient(loss_of(batch, chosen, scaled(batch, reduction)), batch.logps)
    assert_same(found, value_and_gradient(ours(batch, REDUCTIONS[reduction], surrogate=surrogate), batch.logps))


@pytest.mark.parametrize("own", ["regular", "dual_clip", "gspo", "cispo", "sapo", "dppo"])
def test_alpha_0_is_skyrls_loss(own):
    batch, algorithm = make_batch(), config(policy_loss_type=own).trainer.algorithm
    advantages = scaled(batch, "token_mean")
    skyrls = PolicyLossRegistry.get(own)

    def stock(logps):
        return skyrls(
            logps, batch.old, advantages, config=algorithm, loss_mask=batch.mask.float(),
            rollout_logprobs=batch.sampling,
        )[0]  # fmt: skip

    found = value_and_gradient(loss_of(batch, Settings(alpha=0.0), advantages, own, ref=False), batch.logps)
    assert_same(found, value_and_gradient(stock, batch.logps), tolerance=0)


@pytest.mark.parametrize("settings", [{}, {"surrogate": "sapo"}])
def test_only_negative_advantages_move_and_padding_never_reaches_the_gradient(settings):
    batch = make_batch()
    advantages = scaled(batch, "token_mean")
    plain, weighted = (
        value_and_gradient(loss_of(batch, Settings(alpha=alpha, **settings), advantages), batch.logps)[1]
        for alpha in (0.0, 1.0)
    )
    wrong = (batch.advantages < 0) & batch.mask
    assert torch.equal(plain[~wrong], weighted[~wrong])
    assert (weighted.abs()[wrong] > plain.abs()[wrong])[plain[wrong] != 0].all()
    assert not weighted[~batch.mask].any()


@pytest.mark.parametrize("settings", [{}, {"surrogate": "cispo"}, {"surrogate": "gmpo", "confidence": "old"}])
def test_micro_batches_add_up(settings):
    batch, chosen = make_batch(), Settings(**settings)
    whole = value_and_gradient(loss_of(batch, chosen, scaled(batch, "sequence_mean")), batch.logps)
    parts = [
        value_and_gradient(loss_of(batch, chosen, scaled(batch, "sequence_mean", rows), rows=rows), batch.logps[rows])
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert_same((parts[0][0] + parts[1][0], torch.cat([parts[0][1], parts[1][1]])), whole)


@pytest.mark.parametrize("settings", [{}, {"surrogate": "cispo"}])
def test_the_policy_worker_steps_with_ace(settings, monkeypatch):
    """SkyRL's own forward and backward of a micro-batch, with a model that looks its log-probabilities up."""
    batch, leaf = make_batch(), make_batch().logps.requires_grad_()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    worker = object.__new__(ace_worker(PolicyWorkerBase, Settings(**settings)))
    worker.model = Lookup(leaf)
    worker.cfg = config(use_kl_loss=False).trainer
    worker.policy_loss_fn = PolicyLossRegistry.get("regular")
    worker.strategy = SimpleNamespace(backward=lambda loss, model, optimizer: loss.backward())
    worker.optimizer, worker.mesh_rank = None, SimpleNamespace(dp_size=1)
    worker.scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    status = worker._forward_backward_micro(experience_of(batch), 1.0)
    wanted = value_and_gradient(ours(batch, "dapo", **settings), batch.logps)[1]
    torch.testing.assert_close(leaf.grad, wanted, atol=1e-6, rtol=1e-6)
    assert status["loss_metrics/ace/weight/mean"] > 1
    assert worker.policy_loss_fn is PolicyLossRegistry.get("regular")


def test_the_trainer_weights_advantages_by_the_sampling_policy():
    batch = make_batch()
    trainer = trainer_of(config(), confidence="old", alpha=0.5)
    data = trainer.compute_advantages_and_returns(training_batch(batch))
    plain = RayPPOTrainer.compute_advantages_and_returns(trainer, training_batch(batch))["advantages"]
    wanted = ace_advantages(plain, batch.old, batch.ref, batch.mask, alpha=0.5)
    assert torch.equal(data["advantages"], wanted)
    assert not torch.equal(wanted, plain)
    assert trainer.all_metrics["ace/weight/mean"] > 1


def test_without_the_old_policys_log_probabilities_the_samplers_count():
    batch = make_batch()
    data = training_batch(batch)
    data["action_log_probs"], data["rollout_logprobs"] = None, batch.sampling
    found = trainer_of(config(), confidence="old").compute_advantages_and_returns(data)["advantages"]
    batch.old = batch.sampling
    wanted = trainer_of(config(), confidence="old").compute_advantages_and_returns(training_batch(batch))
    assert torch.equal(found, wanted["advantages"])
    chosen, experience = Settings(surrogate="ppo_clip", confidence="old"), experience_of(batch)
    losses = [
        value_and_gradient(
            lambda logps, old=old: ace_policy_loss(
                chosen, None, experience, logps, old, batch.advantages, None, batch.mask, batch.sampling
            )[0],
            batch.logps,
        )
        for old in (None, batch.sampling)
    ]
    assert_same(*losses, tolerance=0)


def test_with_the_current_policy_the_trainer_takes_a_worker_that_sees_the_reference(monkeypatch):
    built = []
    monkeypatch.setattr(RayPPOTrainer, "build_models", lambda self, *workers: built.append(workers))
    trainer_of(config()).build_models(PolicyWorker, "critic", "ref")
    trainer_of(config(), confidence="old").build_models(PolicyWorker, "critic", "ref")
    (worker, *others), (kept, *_) = built
    assert others == ["critic", "ref"]
    assert kept is PolicyWorker
    mine, theirs = (w.__ray_metadata__.modified_class for w in (worker, PolicyWorker))
    assert issubclass(mine, theirs)


def test_a_worker_survives_the_way_to_its_process():
    worker = cloudpickle.loads(cloudpickle.dumps(ace_worker(PolicyWorkerBase, Settings(alpha=0.5))))
    assert issubclass(worker, PolicyWorkerBase)


@pytest.mark.parametrize(
    ("settings", "algorithm", "message"),
    [
        ({}, {"use_kl_loss": False}, "use_kl_loss=true"),
        ({"confidence": "old"}, {"advantage_batch_normalize": True}, "advantage_batch_normalize"),
    ],
)
def test_what_would_undo_ace_is_refused_when_models_are_built(settings, algorithm, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(config(**algorithm), **settings).build_models(PolicyWorker, None, None)


@pytest.mark.parametrize(
    ("part", "name", "value"), [("generator", "step_wise_trajectories", True), ("trainer", "strategy", "megatron")]
)
def test_a_rollout_in_rows_and_another_strategy_are_refused(part, name, value):
    chosen = config()
    setattr(getattr(chosen, part), name, value)
    with pytest.raises(ValueError, match=rf"{part}\.{name}"):
        trainer_of(chosen).build_models(PolicyWorker, None, None)


def test_a_reference_for_the_reward_will_do(monkeypatch):
    monkeypatch.setattr(RayPPOTrainer, "build_models", lambda self, *workers: workers)
    chosen = config(use_kl_loss=False, use_kl_in_reward=True)
    assert trainer_of(chosen, confidence="old").build_models(PolicyWorker, 1, 2) == (PolicyWorker, 1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tis_ratio_type", "token"),
        ("sequence_mask_metric", "product"),
        ("outlier_token_is_threshold_low", 0.1),
        ("outlier_token_is_threshold_high", 9.0),
        ("token_mask_is_threshold_low", 0.1),
    ],
)
def test_a_correction_that_a_surrogate_would_ignore_is_refused(name, value):
    chosen = config()
    setattr(chosen.trainer.algorithm.off_policy_correction, name, value)
    with pytest.raises(ValueError, match="sampling_correction"):
        trainer_of(chosen, surrogate="cispo").build_models(PolicyWorker, None, None)


def test_a_missing_reference_is_refused():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"base_action_log_probs is missing.*use_kl_loss=true"):
        loss_of(batch, Settings(), batch.advantages, ref=False)(batch.logps)
    data = training_batch(batch)
    data["base_action_log_probs"] = None
    with pytest.raises(ValueError, match="base_action_log_probs is missing"):
        trainer_of(config(), confidence="old").compute_advantages_and_returns(data)


class Lookup:
    """A model whose log-probabilities are given."""

    def __init__(self, logps):
        self.logps = logps

    def train(self):
        """Nothing to switch."""

    def __call__(self, sequences, num_actions, **others):
        return self.logps, {"entropy": torch.zeros(len(sequences), num_actions + 2)}


def experience_of(batch):
    tokens, ids = batch.logps.shape[1], torch.zeros(len(batch.logps), 9, dtype=torch.long)
    return Experience(
        sequences=ids, action_log_probs=batch.old, base_action_log_probs=batch.ref, values=None, returns=None,
        advantages=scaled(batch, "token_mean"), attention_mask=ids, loss_mask=batch.mask.long(),
        action_mask=batch.mask.long(), rollout_logprobs=batch.sampling, rollout_expert_indices=None,
        num_actions=tokens, info={},
    )  # fmt: skip


def training_batch(batch):
    rewards = torch.zeros_like(batch.logps)
    rewards[:, 0] = (batch.advantages[:, 0] > 0).float()
    data = TrainingInputBatch(
        {
            "sequences": torch.zeros(6, 9, dtype=torch.long), "response_mask": batch.mask.long(), "rewards": rewards,
            "loss_mask": batch.mask.long(), "action_log_probs": batch.old, "base_action_log_probs": batch.ref,
            "values": None,
        }
    )  # fmt: skip
    data.metadata = {"uids": ["a", "a", "a", "b", "b", "b"], "avg_response_length": 1.0}
    return data


def trainer_of(cfg, **settings):
    trainer = object.__new__(ace_trainer(RayPPOTrainer, **settings))
    trainer.cfg, trainer.all_metrics = cfg, {}
    return trainer


@pytest.mark.parametrize("surrogate", sorted(set(SURROGATES) - set(LINEAR)))
def test_a_surrogate_that_compares_samples_is_refused(surrogate):
    with pytest.raises(ValueError, match=r"whole batch.*denominators"):
        ace_trainer(RayPPOTrainer, surrogate=surrogate)
