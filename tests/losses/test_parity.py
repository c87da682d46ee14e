"""The fused losses against the reference in float64, in every combination of schedule, aggregation, method and head."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from loss_cases import (
    EVERY_METHOD,
    HEADS,
    LOSS_TYPES,
    METHODS,
    NAN,
    SMALL,
    SURROGATES,
    TOLERANCE,
    assert_all_same,
    assert_same,
    loss_arguments,
    make_batch,
    pack,
    policy_loss,
    reference_policy_loss,
    run,
    size_of_terms,
)  # fmt: skip

import rlvr_ops
from rlvr_ops import reference

SCHEDULES = ("single_pass", "two_pass", "auto")
LONGEST_ROLLOUT, VOCABULARY = 70, 507


CASES = [*itertools.product(METHODS, HEADS), *itertools.product(SURROGATES, ("plain", "everything"))]


@pytest.mark.parametrize(("method", "head"), CASES)
def test_every_schedule_is_the_reference(method, head):
    draw = random.Random(f"{method} {head}")
    padded = make_batch(**HEADS[head])
    for loss_type in LOSS_TYPES:
        batch = draw.choice((padded, pack(padded)))
        options = {"global_count": draw.random() < 0.5}
        arguments = loss_arguments(batch, EVERY_METHOD[method], loss_type, HEADS[head], **options)
        truth = run(reference_policy_loss, batch, **arguments)
        scale = size_of_terms(batch, **arguments) if method in SURROGATES else 0.0
        for schedule, dtype in (
            *zip(SCHEDULES, itertools.repeat(torch.float32)),
            (draw.choice(SCHEDULES), torch.float64),
        ):
            given = batch.to(dtype)
            arguments = loss_arguments(given, EVERY_METHOD[method], loss_type, HEADS[head], **options)
            # Room for the longest rollout and little more makes several chunks; None leaves it to the library.
            room = draw.choice((None, LONGEST_ROLLOUT * VOCABULARY * dtype.itemsize * 5 // 4))
            arguments |= {"schedule": schedule, "workspace_bytes": room, "score_inactive": True}
            got = run(policy_loss, given, **arguments)
            assert_all_same(got, truth, dtype, f"{loss_type} {schedule} {dtype}", scale)
            assert schedule == "auto" or got[0].metrics["head/single_pass"].item() == (schedule == "single_pass")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_loss_per_token_advantage_is_the_reference(schedule, packed):
    batch = make_batch()
    batch = replace(batch, advantages=torch.randn(batch.ids.shape, dtype=torch.float64).masked_fill(~batch.mask, NAN))
    batch = pack(batch) if packed else batch
    method = {"old": True, "ref": True, "alpha": 1.0, "beta": 0.1}
    for loss_type in LOSS_TYPES:
        truth = run(reference_policy_loss, batch, **loss_arguments(batch, method, loss_type, {}))
        for dtype in TOLERANCE:
            given = batch.to(dtype)
            got = run(policy_loss, given, schedule=schedule, **loss_arguments(given, method, loss_type, {}))
            assert_all_same(got, truth, dtype, f"{loss_type} {dtype}")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_entropy_metric_is_the_reference_and_changes_nothing_else(head, schedule):
    batch = make_batch(**HEADS[head])
    arguments = loss_arguments(batch, METHODS["ace-old"], "dapo", HEADS[head])
    truth = run(reference_policy_loss, batch, with_entropy=True, **arguments)
    got = run(policy_loss, batch, with_entropy=True, score_inactive=True, schedule=schedule, **arguments)
    assert_all_same(got, truth, torch.float64, schedule)


def test_the_log_probabilities_come_back_with_the_loss():
    batch = make_batch()
    arguments = loss_arguments(batch, METHODS["ace"], "grpo", {})
    truth, _ = run(reference_policy_loss, batch, **arguments)
    unscored = batch.mask & (batch.advantages == 0)[:, None]
    assert bool(unscored.any())
    for schedule in SCHEDULES:
        everything, _ = run(policy_loss, batch, schedule=schedule, score_inactive=True, **arguments)
        assert_same(everything.per_token_logps, truth.per_token_logps.detach(), 1e-12, schedule)
        assert not everything.per_token_logps.requires_grad
        assert not bool(everything.per_token_logps[~batch.mask].any())
        some, _ = run(policy_loss, batch, schedule=schedule, **arguments)
        assert torch.equal(some.per_token_logps.isnan(), unscored)
        assert torch.equal(some.per_token_logps[~unscored], everything.per_token_logps[~unscored])


PRESETS = {
    "ace_loss": {"alpha": 1.0},
    "grpo_loss": {"loss_type": "grpo"},
    "dapo_loss": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo_loss": {"loss_type": "dr_grpo"},
    "bnpo_loss": {"loss_type": "bnpo"},
    "gspo_loss": {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "luspo_loss": {
        "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4, "loss_type": "luspo",
    },
    "cispo_loss": {"surrogate": "cispo", "loss_type": "dapo"},
    "dispo_loss": {"surrogate": "dispo", "loss_type": "dapo"},
    "sapo_loss": {"surrogate": "sapo"},
    "gmpo_loss": {"surrogate": "gmpo"},
    "vespo_loss": {"surrogate": "vespo", "loss_type": "dapo"},
    "reinforce_loss": {"surrogate": "reinforce"},
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_policy_loss_with_its_defaults(name):
    batch = make_batch(SMALL, 17, 5)
    given = {"old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref, "beta": 0.1}
    truth = run(reference_policy_loss, batch, **given, **PRESETS[name])
    assert_all_same(run(getattr(rlvr_ops, name), batch, **given), truth, torch.float64, name)

    def from_logps(hidden, weight, ids, advantages, **kwargs):
        logps = reference.reference_token_logps(hidden, weight, ids, completion_mask=batch.mask).logps
        return getattr(rlvr_ops, f"{name}_from_logps")(logps, advantages, **kwargs)

    assert_all_same(run(from_logps, batch, **given), truth, torch.float64, f"{name}_from_logps")


def test_the_module_is_ace_loss():
    batch = make_batch(SMALL, 17, 5)
    hyper = {"alpha": 0.5, "loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.01, "confidence": "old", "delta": 2.0}
    given = {"old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref}
    module = rlvr_ops.ACELoss(**hyper)
    assert_all_same(
        run(module, batch, **given), run(rlvr_ops.ace_loss, batch, **given, **hyper), torch.float64, "module"
    )
    assert list(module.parameters()) == []
    assert "alpha=0.5" in repr(module)
    with pytest.raises(ValueError, match="alpha must be >= 0"):
        rlvr_ops.ACELoss(alpha=-1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_temperature_per_rollout_is_the_reference(schedule, packed):
    batch = make_batch(SMALL, 17, 5)
    batch = pack(batch) if packed else batch
    given = {"ref_per_token_logps": batch.ref, "alpha": 1.0, "temperature": torch.tensor([0.5, 1.0, 1.5, 2.0]).double()}
    truth = run(reference_policy_loss, batch, **given)
    assert_all_same(run(policy_loss, batch, schedule=schedule, **given), truth, torch.float64, schedule)
