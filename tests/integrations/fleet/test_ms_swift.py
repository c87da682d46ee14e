"""rlvr_ops.integrations.ms_swift in ms-swift's own GRPOTrainer."""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from framework_cases import SETTINGS, assert_same, make_batch, value_and_gradient
from swift.rl_core.data import GRPOBatch
from swift.rlhf_trainers import GRPOTrainer
from swift.rlhf_trainers import grpo_trainer as module
from swift.trainers.trainer_factory import TrainerFactory

from rlvr_ops import Real, ace_loss_from_logps
from rlvr_ops.integrations import ms_swift
from rlvr_ops.integrations.settings import Settings
from rlvr_ops.surrogates import SURROGATES, Fipo

LOSS_TYPES = {"grpo": "grpo", "bnpo": "bnpo", "dr_grpo": "dr_grpo", "dapo": "dapo"}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.setattr(module, "gather_object", lambda values: values)
    monkeypatch.setattr(
        GRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda self, model, model_inputs, grpo_batch, **_: (model_inputs["logps"], None),
    )


def trainer_of(cls=None, **attributes):
    """ms-swift's trainer with what its loss reads, without a model."""
    trainer = object.__new__(cls or GRPOTrainer)
    given = {
        "model": SimpleNamespace(training=True), "compute_entropy": False, "overlong_filter": False, "beta": 1e-8,
        "kl_in_reward": False, "rollout_importance_sampling_mode": None, "log_rollout_offpolicy_metrics": False,
        "disable_rollout_importance_sampling": False, "importance_sampling_level": "token", "_has_teacher": False,
        "off_policy_sequence_mask_delta": None, "loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2,
        "args": SimpleNamespace(delta=None, gradient_accumulation_steps=2), "max_completion_length": 7,
        "sdar_loss_coef": 0.0, "chord_sft_iterator": None, "model_accepts_loss_kwargs": False, "tau_pos": 1.0,
        "compute_loss_func": None, "current_gradient_accumulation_steps": 1, "use_liger_loss": False, "tau_neg": 1.05,
        "top_entropy_quantile": 1.0, "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "accelerator": SimpleNamespace(num_processes=1, gather_for_metrics=lambda values: values),
        "fipo_gamma": 0.98, "fipo_clip_range": 0.2, "fipo_clip_high_only": False, "fipo_safety_threshold": None,
        "real_tau": 1.0, "num_generations": 6,
    }  # fmt: skip
    for name, value in (given | attributes).items():
        setattr(trainer, name, value)
    return trainer


def batch_of(batch, rows=slice(None), ref=True):
    mask = batch.mask[rows]
    return GRPOBatch(
        completion_mask=mask, truncated_mask=torch.arange(len(mask)) == 1, advantages=batch.advantages[rows],
        seq_lengths=mask.sum(1), old_per_token_logps=batch.old[rows], rollout_per_token_logps=batch.sampling[rows],
        ref_per_token_logps=batch.ref[rows] if ref else None, num_items_in_batch=batch.mask.sum(),
    )  # fmt: skip


def found(batch, chosen=None, rows=slice(None), **attributes):
    """Value and gradient of ms-swift's own _compute_loss_and_metrics, with ACE if `chosen`."""
    cls = GRPOTrainer if chosen is None else ms_swift.ace_trainer(GRPOTrainer, chosen)
    trainer, grpo_batch = trainer_of(cls, **attributes), batch_of(batch, rows)
    return value_and_gradient(
        lambda logps: trainer._compute_loss_and_metrics(None, {"logps": logps}, grpo_batch)[0], batch.logps[rows]
    )


def wanted(batch, loss_type, mask=None, **settings):
    def loss_of(logps):
        return ace_loss_from_logps(
            logps, batch.advantages, ref_per_token_logps=batch.ref, old_per_token_logps=batch.old,
            completion_mask=batch.mask if mask is None else mask, loss_type=loss_type, **settings,
        ).loss  # fmt: skip

    return value_and_gradient(loss_of, batch.logps)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_ace_in_ms_swifts_own_loss_is_ours(loss_type, settings):
    batch = make_batch()
    assert_same(found(batch, Settings(**settings), loss_type=loss_type), wanted(batch, loss_type, **settings))


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_surrogate_has_ms_swifts_denominators(loss_type, surrogate):
    batch = make_batch()
    ours = found(batch, Settings(surrogate=surrogate), loss_type=loss_type)
    assert_same(ours, wanted(batch, loss_type, surrogate=surrogate))


@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, "cispo", "sapo", "fipo", "real"])
@pytest.mark.parametrize("settings", [{}, {"beta": 0.04}, {"importance_sampling_level": "sequence", "beta": 0.0}])
def test_alpha_0_is_ms_swifts_loss(loss_type, settings):
    batch = make_batch()
    ours = found(batch, Settings(alpha=0.0), loss_type=loss_type, **settings)
    assert_same(ours, found(batch, loss_type=loss_type, **settings), tolerance=0)


FIPO = {"alpha": 0.0, "loss_type": "dapo", "surrogate": Fipo(influence=(0.8, 1.2), half_life=2.0, safe_ratio=1.2)}
SWIFTS_FIPO = {"loss_type": "fipo", "beta": 0.0, "fipo_gamma": 2 ** (-1 / 2), "fipo_safety_threshold": 1.2}


@pytest.mark.parametrize("delta", [None, 1.3])
def test_fipo_is_ms_swifts(delta):
    batch = make_batch()
    surrogate = replace(FIPO["surrogate"], delta=delta)
    args = SimpleNamespace(delta=delta, gradient_accumulation_steps=2)
    assert_same(found(batch, **SWIFTS_FIPO, args=args), wanted(batch, **{**FIPO, "surrogate": surrogate}))


def test_fipo_skips_a_tools_tokens_that_ms_swift_counts():
    batch = make_batch()
    batch.mask[:, 1] = False
    theirs, ours = found(batch, **SWIFTS_FIPO), wanted(batch, **FIPO)
    first, second = theirs[1][:, 0], ours[1][:, 0]
    assert not torch.allclose(first, second)
    torch.testing.assert_close(theirs[1][:, 2:], ours[1][:, 2:])


REAL = {"alpha": 0.0, "loss_type": "grpo", "surrogate": Real(3, tau=0.7)}
SWIFTS_REAL = {"loss_type": "real", "beta": 0.0, "real_tau": 0.7, "num_generations": 3}


def test_real_is_ms_swifts():
    batch = make_batch()
    assert_same(found(batch, **SWIFTS_REAL), wanted(batch, **REAL))


def test_real_labels_no_rollout_without_tokens_and_ms_swift_calls_it_wrong():
    """At a ratio of 1 and beside one right and one wrong rollout, it makes log(1 + 1 + 1) of log(1 + 1), for one group of two.

    It also counts the group in full, and we the two rollouts of three that have tokens.
    """
    batch = make_batch()
    batch.logps = batch.old.clone()
    batch.mask[2] = False
    ours, theirs = (f(batch, **given)[0] for f, given in ((wanted, REAL), (found, SWIFTS_REAL)))
    assert (theirs - ours).item() == pytest.approx(math.log(3 / 2) / 2 + math.log(4) / 3 / 2, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"surrogate": "sapo"}])
def test_only_negative_advantages_move_and_padding_never_reaches_the_gradient(settings):
    batch = make_batch()
    plain, weighted = (found(batch, Settings(alpha=alpha, **settings))[1] for alpha in (0.0, 1.0))
    wrong = (batch.advantages < 0) & batch.mask
    assert torch.equal(plain[~wrong], weighted[~wrong])
    moved = plain.abs()[wrong] > 1e-6  # clipped tokens have the KL term's gradient, of coefficient 1e-8
    assert (weighted.abs()[wrong] > plain.abs()[wrong])[moved].all()
    assert not weighted[~batch.mask].any()


@pytest.mark.parametrize("settings", [{}, {"surrogate": "cispo"}, {"surrogate": "gmpo", "confidence": "old"}])
def test_micro_batches_add_up_over_two_accumulation_steps(settings):
    """The Trainer halves each loss, which ms-swift undoes for a loss over the whole window's tokens."""
    batch, chosen = make_batch(), Settings(**settings)
    parts = [
        found(batch, chosen, rows, loss_type="dapo", current_gradient_accumulation_steps=2)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    mean = (parts[0][0] + parts[1][0]) / 2, torch.cat([parts[0][1], parts[1][1]]) / 2
    assert_same(mean, found(batch, chosen, loss_type="dapo"))


@pytest.mark.parametrize("settings", [{}, {"surrogate": "cispo"}])
def test_two_ranks_average_to_the_loss_over_all_tokens(settings):
    batch, chosen = make_batch(), Settings(**settings)
    two = SimpleNamespace(num_processes=2, gather_for_metrics=lambda values: values)
    parts = [
        found(batch, chosen, rows, loss_type="dapo", accelerator=two, model_accepts_loss_kwargs=True)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    mean = (parts[0][0] + parts[1][0]) / 2, torch.cat([parts[0][1], parts[1][1]]) / 2
    assert_same(mean, found(batch, chosen, loss_type="dapo"))


def test_dr_grpo_divides_by_ms_swifts_max_completion_length():
    batch = make_batch()
    ours = found(batch, Settings(surrogate="sapo"), loss_type="dr_grpo", max_completion_length=9)
    assert_same(ours, wanted(batch, "dr_grpo", surrogate="sapo", max_completion_length=9))


def test_scoring_a_batch_before_training_weights_nothing():
    batch = make_batch()
    trainer, grpo_batch = trainer_of(ms_swift.ace_trainer(GRPOTrainer, Settings())), batch_of(batch, ref=False)
    trainer._get_per_token_logps_and_entropies(None, {"logps": batch.logps}, grpo_batch)
    assert torch.equal(grpo_batch.advantages, batch.advantages)


def test_an_evaluations_metrics_are_logged_apart():
    batch = make_batch()
    trainer = trainer_of(ms_swift.ace_trainer(GRPOTrainer, Settings()), model=SimpleNamespace(training=False))
    trainer._compute_loss_and_metrics(None, {"logps": batch.logps}, batch_of(batch))
    assert trainer._metrics["eval"]["ace/weight/mean"][0] > 1
    assert "ace/weight/mean" not in trainer._metrics["train"]


def test_the_surrogate_leaves_ms_swifts_kl_term():
    batch, chosen = make_batch(), Settings(surrogate="cispo")
    with_kl, without = (found(batch, chosen, beta=beta) for beta in (0.04, 1e-12))
    stock = found(batch, Settings(alpha=0.0), beta=0.04)[0] - found(batch, Settings(alpha=0.0), beta=0.0)[0]
    torch.testing.assert_close(with_kl[0] - without[0], stock, atol=1e-6, rtol=1e-5)


def test_the_surrogate_drops_overlong_rollouts_as_ms_swift_does():
    batch = make_batch()
    mask = batch.mask & (torch.arange(6) != 1)[:, None]
    ours = found(batch, Settings(surrogate="ppo_clip"), overlong_filter=True)
    assert_same(ours, wanted(batch, "grpo", mask))
    assert_same(ours, found(batch, Settings(), overlong_filter=True))


def test_a_second_iteration_over_a_batch_does_not_compound():
    batch = make_batch()
    trainer, grpo_batch = trainer_of(ms_swift.ace_trainer(GRPOTrainer, Settings())), batch_of(batch)
    before = grpo_batch.advantages.clone()
    first, second = (trainer._compute_loss_and_metrics(None, {"logps": batch.logps}, grpo_batch)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(grpo_batch.advantages, before)
    assert trainer._metrics["train"]["ace/weight/mean"][1] > 1


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match="--beta is 0"):
        ms_swift.check(trainer_of(beta=0.0), Settings())
    ms_swift.check(trainer_of(beta=0.0), Settings(alpha=0.0))
    trainer = trainer_of(ms_swift.ace_trainer(GRPOTrainer, Settings()))
    batch = make_batch()
    with pytest.raises(ValueError, match=r"ref_per_token_logps is missing.*--beta above 0"):
        trainer._compute_loss_and_metrics(None, {"logps": batch.logps}, batch_of(batch, ref=False))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"use_liger_loss": True}, "use_liger_kernel"),
        ({"loss_type": "real"}, "--loss_type"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"rollout_importance_sampling_mode": "token_truncate"}, "rollout_importance_sampling_mode"),
        ({"off_policy_sequence_mask_delta": 0.1}, "off_policy_sequence_mask_delta"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile"),
        ({"chord_sft_iterator": iter(())}, "chord_sft_iterator"),
    ],
)
def test_what_a_surrogate_would_ignore_is_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        ms_swift.check(trainer_of(**attributes), Settings(alpha=0.0, surrogate="cispo"))


def test_ace_with_a_loss_of_signs_is_refused():
    with pytest.raises(ValueError, match="--loss_type real reads the advantages' signs alone"):
        ms_swift.check(trainer_of(loss_type="real"), Settings())
    ms_swift.check(trainer_of(loss_type="real"), Settings(alpha=0.0))
    with pytest.raises(ValueError, match="--loss_type must be one of"):  # the surrogate takes REAL's place
        ms_swift.check(trainer_of(loss_type="real"), Settings(surrogate="cispo"))


def test_rlhf_type_grpo_finds_our_trainer(monkeypatch):
    monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", dict(TrainerFactory.TRAINER_MAPPING))
    ms_swift.register(alpha=0.5, confidence="old")
    cls = TrainerFactory.get_trainer_cls(SimpleNamespace(rlhf_type="grpo"))
    assert issubclass(cls, GRPOTrainer)
    assert cls.__name__ == "ACEGRPOTrainer"
    with pytest.raises(ValueError, match="confidence"):
        ms_swift.register(confidence="sampler")
