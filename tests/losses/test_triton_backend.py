"""The losses through the Triton kernels, under the interpreter, against the reference in float64."""

import random

import pytest
import torch
from loss_cases import (
    EVERY_METHOD,
    HEADS,
    LOSS_TYPES,
    SURROGATES,
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

pytestmark = pytest.mark.interpret
LENGTHS, VOCABULARY, HIDDEN = (9, 5, 0, 1, 7), 203, 12


@pytest.fixture(autouse=True, params=["exponentials", "logits"])
def _what_a_tile_holds(request, monkeypatch):
    """float32 goes the way of bfloat16 on an accelerator, or its own."""
    if request.param == "exponentials":
        monkeypatch.setattr("rlvr_kernels.tile.BY_TRITON", {torch.float32})
        monkeypatch.setattr("rlvr_kernels.score.IN_REGISTERS", {torch.float32})


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_every_method_is_the_reference(method, schedule):
    draw = random.Random(f"{method} {schedule}")
    for head in ("everything", draw.choice(list(HEADS))):
        batch = make_batch(LENGTHS, VOCABULARY, HIDDEN, **HEADS[head])
        batch = draw.choice((batch, pack(batch)))
        loss_type, options = draw.choice(LOSS_TYPES), {"global_count": draw.random() < 0.5}
        arguments = loss_arguments(batch, EVERY_METHOD[method], loss_type, HEADS[head], **options)
        truth = run(reference_policy_loss, batch, **arguments)
        scale = size_of_terms(batch, **arguments) if method in SURROGATES else 0.0
        low = batch.to(torch.float32)
        arguments = loss_arguments(low, EVERY_METHOD[method], loss_type, HEADS[head], **options)
        arguments |= {"workspace_bytes": draw.choice((None, 4 * VOCABULARY * 10)), "with_entropy": draw.random() < 0.3}
        got = run(policy_loss, low, schedule=schedule, backend="triton", score_inactive=True, **arguments)
        assert_all_same(got, truth, torch.float32, f"{loss_type} {head}", scale)


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "temperature": 0.7}])
def test_at_the_reference_every_shift_is_zero_to_rounding(schedule, head):
    """Not to the last bit as on the twins: the kernels take the logarithm in different places."""
    batch = make_batch(LENGTHS, VOCABULARY, HIDDEN).to(torch.float32)
    ref = rlvr_ops.token_logps(
        batch.hidden, batch.weight, batch.ids, completion_mask=batch.mask, backend="triton", **head
    ).logps
    for old in (None, ref):
        out, _ = run(
            rlvr_ops.ace_loss,
            batch,
            ref_per_token_logps=ref,
            old_per_token_logps=old,
            backend="triton",
            schedule=schedule,
            **head,
        )
        assert abs(out.metrics["ace/shift/mean"].item()) < 3e-7
        assert out.metrics["ace/frac_exploratory"].item() == 1.0
        assert out.metrics["ace/weight/max"].item() == pytest.approx(1.6931471805599453, abs=2e-7)


def test_scores_are_the_reference():
    batch = make_batch(LENGTHS, VOCABULARY, HIDDEN)
    low = batch.to(torch.float32)
    everything = {"with_entropy": True, "with_self_certainty": True, "with_top1": True}
    everything |= {"with_sum_p_squared": True, "completion_mask": batch.mask}
    truth = reference.reference_token_logps(batch.hidden, batch.weight, batch.ids, **everything)
    for room in (None, 4 * 300):
        got = rlvr_ops.token_logps(
            low.hidden, low.weight, batch.ids, backend="triton", workspace_bytes=room, **everything
        )
        assert_same(got.logps, truth.logps, 1e-5, "logps")
        assert_same(got.entropy, truth.entropy, 1e-5, "entropy")
        assert_same(got.sum_p_squared, truth.sum_p_squared, 1e-5, "sum_p_squared")
        assert_same(got.self_certainty, truth.self_certainty, 1e-5, "self_certainty")
        assert torch.equal(got.top1, truth.top1)
