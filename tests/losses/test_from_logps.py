"""The losses on given log-probabilities: every combination of their keywords against the reference, and gradcheck."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from loss_cases import (
    SMALL,
    TOLERANCE,
    assert_same,
    make_batch,
    pack,
    policy_loss_from_logps,
    reference_policy_loss_from_logps,
)

import rlvr_ops
from rlvr_ops import reference

OBJECTIVES = [
    dict(zip(("loss_type", "num_items_in_batch", "max_completion_length"), values, strict=True))
    for values in (
        ("grpo", None, None),
        ("grpo", 7, None),
        ("dapo", None, None),
        ("dapo", 50, None),
        ("bnpo", None, None),
        ("dr_grpo", 7, 9),
    )
]
CLIPS = [{}, {"epsilon_low": 0.1, "epsilon_high": 0.28}, {"delta": 1.3, "epsilon_low": 0.15}]
PENALTIES = [{}, *({"beta": 0.2, "kl_estimator": k} for k in ("k1", "k2", "k3"))]
METHODS = [{}] + [
    {"alpha": 0.8, "confidence": confidence, "confidence_reduction": reduction, "shape": shape}
    for confidence, reduction, shape in itertools.product(("current", "old"), ("mean", "sum"), ("softplus", "relu"))
]


def compute(loss, logps, batch, **kwargs):
    logps = logps.detach().clone().requires_grad_()
    out = loss(logps, batch.advantages, completion_mask=batch.mask, **batch.packing, **kwargs)
    return out, torch.autograd.grad(out.loss, logps)[0]


@pytest.fixture(scope="module")
def batches():
    padded = make_batch(SMALL, 7, 3, holes=0.2)
    per_token = replace(padded, advantages=torch.randn(padded.ids.shape, dtype=torch.float64))
    return [padded, pack(padded), per_token, pack(per_token)]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: p.get("kl_estimator", "no-kl"))
@pytest.mark.parametrize("clip", CLIPS, ids=["default", "higher", "delta"])
def test_every_combination_is_the_reference(batches, clip, penalty):
    draw = random.Random(f"{clip} {penalty}")
    for objective, method, off_policy in itertools.product(OBJECTIVES, METHODS, (True, False)):
        dtype = draw.choice((torch.float64, torch.float32))
        # log-probabilities a little off the old ones; NaN where masked, like the old and the reference ones
        batch = draw.choice(batches).to(dtype)
        logps = batch.old + 0.25 * torch.linspace(-1, 1, batch.old.numel(), dtype=dtype).reshape(batch.old.shape)
        given = {**objective, **method, **clip, **penalty, "ref_per_token_logps": batch.ref}
        if off_policy:
            given["old_per_token_logps"] = batch.old
        got, coef = compute(policy_loss_from_logps, logps, batch, **given)
        true, true_coef = compute(reference_policy_loss_from_logps, logps.double(), batch, **given)
        label = f"{given['loss_type']} {method} {off_policy} {dtype}"
        # a token's loss is about its coefficient, exactly so on policy
        assert_same(got.loss, true.loss, TOLERANCE[dtype], label, scale=true_coef.abs().sum())
        assert_same(coef, true_coef, TOLERANCE[dtype], label)
        assert_same(got.per_token_logps, true.per_token_logps, TOLERANCE[dtype], label)
        for name, value in true.metrics.items():
            assert got.metrics[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), f"{label} {name}"


@pytest.mark.parametrize("packed", [False, True])
def test_ace_advantages_are_the_reference(batches, packed):
    for batch in (batches[packed], batches[2 + packed]):
        for dtype in (torch.float64, torch.float32):
            b = batch.to(dtype)
            for reduction, shape in itertools.product(("mean", "sum"), ("softplus", "relu")):
                options = {"alpha": 0.7, "confidence_reduction": reduction, "shape": shape, **b.packing}
                got = rlvr_ops.ace_advantages(b.advantages, b.old, b.ref, b.mask, **options)
                b64 = b.to(torch.float64)
                true = reference.reference_ace_advantages(b64.advantages, b64.old, b64.ref, b64.mask, **options)
                assert got.dtype == dtype
                assert_same(got, true, TOLERANCE[dtype], f"{options}")


def test_ace_advantages_in_any_loss_are_the_ace_loss(batches):
    """For a trainer that takes advantages and nothing else: the re-weighted ones in plain GRPO are ACE-GRPO."""
    batch = batches[0]
    logps = batch.old + 0.1
    weighted = rlvr_ops.ace_advantages(batch.advantages, logps, batch.ref, batch.mask, alpha=0.7)
    plain, coef = compute(rlvr_ops.grpo_loss_from_logps, logps, replace(batch, advantages=weighted))
    given = {"ref_per_token_logps": batch.ref, "alpha": 0.7}
    ace, ace_coef = compute(rlvr_ops.ace_loss_from_logps, logps, batch, **given)
    assert_same(plain.loss, ace.loss, 1e-14)
    assert_same(coef, ace_coef, 1e-14)


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_gradcheck_off_policy(loss_type, kl_estimator):
    """Finite differences see the clipped loss itself, for the confidence taken from the old policy (a constant)."""
    batch = make_batch(SMALL, 7, 3, poison=False)

    def loss(logps):
        return policy_loss_from_logps(
            logps,
            batch.advantages,
            completion_mask=batch.mask,
            old_per_token_logps=batch.old,
            ref_per_token_logps=batch.ref,
            alpha=1.0,
            confidence="old",
            delta=1.5,
            beta=0.3,
            kl_estimator=kl_estimator,
            loss_type=loss_type,
        ).loss

    logps = (batch.old + 0.3 * torch.randn_like(batch.old)).requires_grad_()
    assert torch.autograd.gradcheck(loss, logps)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_what_a_masked_token_holds_never_reaches_anything(garbage):
    clean = make_batch(SMALL, 7, 3, poison=False)
    logps = clean.old + 0.2
    given = {"alpha": 1.0, "beta": 0.1}
    old, ref = {"old_per_token_logps": clean.old}, {"ref_per_token_logps": clean.ref}
    truth, true_coef = compute(policy_loss_from_logps, logps, clean, **given, **old, **ref)

    def dirty(values):
        return values.masked_fill(~clean.mask, garbage)

    per_token = clean.advantages[:, None].expand(logps.shape)
    batch = replace(clean, advantages=dirty(per_token))
    old, ref = {"old_per_token_logps": dirty(clean.old)}, {"ref_per_token_logps": dirty(clean.ref)}
    for mask in (clean.mask, clean.mask.long(), clean.mask.double() * 0.5):
        masked = replace(batch, mask=mask)
        got, coef = compute(policy_loss_from_logps, dirty(logps), masked, **given, **old, **ref)
        assert torch.equal(got.loss, truth.loss)
        assert torch.equal(coef, true_coef)
        assert {k: v.item() for k, v in got.metrics.items()} == {k: v.item() for k, v in truth.metrics.items()}


def test_low_precision_log_probabilities_are_weighed_in_float32():
    batch = make_batch(SMALL, 7, 3).to(torch.bfloat16)
    given = {"old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref, "alpha": 1.0, "beta": 0.1}
    logps = batch.old * 1.05
    got, coef = compute(policy_loss_from_logps, logps, batch, **given)
    assert got.loss.dtype == torch.float32
    assert coef.dtype == torch.bfloat16
    single = batch.to(torch.float64)
    given = {"old_per_token_logps": single.old, "ref_per_token_logps": single.ref, "alpha": 1.0, "beta": 0.1}
    true, true_coef = compute(reference_policy_loss_from_logps, logps.double(), single, **given)
    assert_same(got.loss, true.loss, 1e-5)
    assert_same(coef, true_coef, 2.0**-8)  # one rounding to bfloat16
