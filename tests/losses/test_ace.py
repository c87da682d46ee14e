"""What ACE promises by itself: nothing at alpha = 0, 1 + alpha ln 2 at the reference, and no touch of a right rollout."""

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import SMALL, make_batch, pack, run

import rlvr_ops

SCHEDULES = ("single_pass", "two_pass", "auto")


def given_for(batch, **kwargs):
    return {"old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref, **kwargs}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_alpha_zero_is_grpo_bit_for_bit(schedule, dtype):
    batch = make_batch().to(dtype)
    ace, ace_grads = run(rlvr_ops.ace_loss, batch, alpha=0.0, schedule=schedule, **given_for(batch))
    grpo, grpo_grads = run(rlvr_ops.grpo_loss, batch, schedule=schedule, **given_for(batch))
    assert torch.equal(ace.loss, grpo.loss)
    for a, b in zip(ace_grads[:2], grpo_grads[:2], strict=True):
        assert torch.equal(a, b)
    without = rlvr_ops.ace_loss_from_logps(batch.old, batch.advantages, completion_mask=batch.mask, alpha=0.0)
    plain = rlvr_ops.grpo_loss_from_logps(batch.old, batch.advantages, completion_mask=batch.mask)
    assert torch.equal(without.loss, plain.loss)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_at_the_reference_every_shift_is_zero_and_every_weight_one_plus_alpha_ln_2(schedule, dtype, reduction):
    head = {"softcap": 3.0, "temperature": 0.7}
    for padded in (make_batch().to(dtype), make_batch(SMALL, 17, 5).to(dtype)):
        for batch in (padded, pack(padded)):
            scores = rlvr_ops.token_logps(
                batch.hidden, batch.weight, batch.ids, completion_mask=batch.mask, lm_head_bias=batch.bias, **head
            )
            options = {"alpha": 0.5, "confidence_reduction": reduction, "schedule": schedule, **head}
            for old in (None, scores.logps):
                out, _ = run(
                    rlvr_ops.ace_loss,
                    batch,
                    ref_per_token_logps=scores.logps,
                    old_per_token_logps=old,
                    use_bias=True,
                    score_inactive=True,
                    **options,
                )
                assert torch.equal(out.per_token_logps, scores.logps)
                assert out.metrics["ace/shift/mean"].item() == 0.0
                assert out.metrics["kl"].item() == 0.0
                assert out.metrics["ace/frac_exploratory"].item() == 1.0
                exact = torch.tensor(1 + 0.5 * math.log(2), dtype=scores.logps.dtype).item()
                assert out.metrics["ace/weight/max"].item() == exact
                assert out.metrics["ace/weight/mean"].item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("confidence", ["current", "old"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rollout_with_an_advantage_of_zero_or_more_is_never_touched(schedule, confidence):
    batch = make_batch().to(torch.float32)
    options = {"schedule": schedule, "beta": 0.01, "with_entropy": True}  # both through the same kernels: the same bits
    _, ace = run(rlvr_ops.ace_loss, batch, alpha=5.0, confidence=confidence, **options, **given_for(batch))
    _, grpo = run(rlvr_ops.grpo_loss, batch, **options, **given_for(batch))
    untouched, wrong = batch.advantages >= 0, batch.advantages < 0
    assert torch.equal(ace[0][untouched], grpo[0][untouched])
    has_tokens = batch.mask.any(dim=1)
    for i in (wrong & has_tokens).nonzero()[:, 0]:
        assert not torch.equal(ace[0][i], grpo[0][i])
    right = replace(batch, advantages=batch.advantages.abs())
    ace, ace_grads = run(rlvr_ops.ace_loss, right, alpha=5.0, confidence=confidence, **options, **given_for(batch))
    grpo, grpo_grads = run(rlvr_ops.grpo_loss, right, **options, **given_for(batch))
    assert torch.equal(ace.loss, grpo.loss)
    assert torch.equal(ace_grads[1], grpo_grads[1])


def test_a_group_of_wrong_rollouts_alone_has_nothing_to_weigh():
    batch = make_batch(SMALL, 17, 5)
    advantages = rlvr_ops.group_advantages(torch.zeros(4), 4)
    out, grads = run(rlvr_ops.ace_loss, replace(batch, advantages=advantages.double()), **given_for(batch))
    assert out.loss.item() == 0
    assert not bool(grads[0].any())
    assert not bool(grads[1].any())
    assert out.metrics["head/rows_scored"].item() == 0


def test_the_shift_is_a_constant_to_the_gradient():
    """d/dlogp is -A' / T exactly, with no term from d softplus(c) / dlogp."""
    logps = torch.tensor([[-1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-2.0, -2.5]], dtype=torch.float64)
    out = rlvr_ops.ace_loss_from_logps(logps, torch.tensor([-1.0], dtype=torch.float64), ref_per_token_logps=ref)
    out.loss.backward()
    weight = 1 + math.log1p(math.exp((1.0 - 0.5) / 2))
    assert logps.grad[0].tolist() == pytest.approx([weight / 2, weight / 2], rel=1e-14)


@pytest.mark.parametrize("shift", [-1e4, -200.0, -30.0, 30.0, 200.0, 1e4])
def test_an_extreme_shift_neither_overflows_nor_vanishes_wrongly(shift):
    for dtype in (torch.float32, torch.float64):
        logps = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
        ref = torch.full((1, 1), -shift, dtype=dtype)
        out = rlvr_ops.ace_loss_from_logps(logps, torch.tensor([-1.0], dtype=dtype), ref_per_token_logps=ref)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(1 + max(shift, 0.0), rel=1e-6)
        assert logps.grad.item() == pytest.approx(1 + max(shift, 0.0), rel=1e-6)


def test_on_policy_both_confidences_are_the_same_number():
    batch = make_batch(SMALL, 17, 5)
    same = rlvr_ops.token_logps(batch.hidden, batch.weight, batch.ids, completion_mask=batch.mask).logps
    outs = [
        run(rlvr_ops.ace_loss, batch, ref_per_token_logps=batch.ref, old_per_token_logps=old, confidence=confidence)
        for old in (None, same)
        for confidence in ("current", "old")
    ]
    for out, grads in outs[1:]:
        torch.testing.assert_close(out.loss, outs[0][0].loss, rtol=1e-14, atol=0)
        torch.testing.assert_close(grads[1], outs[0][1][1], rtol=1e-12, atol=1e-15)
