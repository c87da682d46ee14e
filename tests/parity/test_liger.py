"""Liger's `LigerFusedLinearGRPOLoss` from hidden states, as installed and not compiled, against `policy_loss`."""

from dataclasses import replace
from types import SimpleNamespace

import loss_cases
import pytest
import torch
from loss_cases import assert_same, policy_loss, run
from parity_cases import LENGTHS, LONGEST, by_the_rollouts_ratio

import rlvr_ops
from rlvr_ops import reference, surrogates

pytestmark = pytest.mark.parity

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")
WEIGHTED = ("cispo", "sapo", "vespo")
AGGREGATION = {"cispo": "dapo", "vespo": "dapo", "sapo": "grpo"}
KL = {
    "no-kl": {"beta": 0.0},
    "kl": {"beta": 0.1},
    "corrected-kl": {"beta": 0.1, "use_bias_correction_kl": True},
}
OLD = pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])


def make_batch(lengths=LENGTHS, vocabulary=37, hidden_size=8, **head):
    """A float32 batch with two outlying ratios; Liger has no way to leave a padded position out, so nothing is NaN there."""
    batch = loss_cases.make_batch(lengths, vocabulary, hidden_size, poison=False, **head)
    batch.old[0, 1] -= 1.7
    batch.old[1, 0] -= 1.9
    return batch.to(torch.float32)


def liger_loss(
    batch, loss_type, *, old=True, ref=True, sampling_ratio=None, num_items_in_batch=None, bias=False, **options
):
    """(loss, [d_hidden, d_weight, d_bias]) of Liger."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    numbers = {
        "epsilon_low": 0.2,
        "epsilon_high": 1.5 if loss_type == "cispo" else 0.28,
        "max_completion_length": LONGEST,
    }
    module = LigerFusedLinearGRPOLoss(compiled=False, loss_type=loss_type, use_ref_model=ref, **numbers | options)

    def loss(hidden, weight, ids, advantages, *, completion_mask, lm_head_bias=None):
        value, _metrics = module(
            hidden, weight, ids, completion_mask.float(), advantages, lm_head_bias,
            ref_per_token_logps=batch.ref if ref else None, old_per_token_logps=batch.old if old else None,
            vllm_is_ratio=sampling_ratio, num_items_in_batch=num_items_in_batch,
        )  # fmt: skip
        return SimpleNamespace(loss=value)

    return run(loss, batch, use_bias=bias)


def our_loss(batch, loss_type, *, old=True, ref=True, bias=False, **options):
    """The same of `policy_loss`."""
    numbers = {
        "cispo": {"surrogate": surrogates.cispo(ratio_max=1.5)},
        "sapo": {"surrogate": "sapo"},
        "vespo": {"surrogate": "vespo"},
    }.get(loss_type, {"epsilon_low": 0.2, "epsilon_high": 0.28})
    options |= {"old_per_token_logps": batch.old} if old else {}
    options |= {"ref_per_token_logps": batch.ref} if ref else {}
    options = ({"max_completion_length": LONGEST} if loss_type == "dr_grpo" else {}) | options
    rule = AGGREGATION.get(loss_type, loss_type)
    return run(policy_loss, batch, use_bias=bias, loss_type=rule, **numbers | options)


def assert_parity(got, theirs):
    assert_same(got[0].loss, theirs[0].loss, 1e-5, "loss", scale=1.0)
    for name, mine, other in zip(("d_hidden", "d_weight", "d_bias"), got[1], theirs[1], strict=True):
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert_same(mine, other, 1e-5, name)


@OLD
@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("delta", [None, 4.0], ids=["no-delta", "delta"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_a_clipped_loss_is_ligers(loss_type, level, delta, kl, old):
    batch = make_batch()
    options = {"importance_sampling_level": level, "delta": delta, "old": old} | KL[kl]
    theirs = liger_loss(batch, loss_type, **options)
    if level == "sequence" and kl == "corrected-kl":
        theirs = less_what_liger_has_more(theirs, batch, loss_type, old)
    assert_parity(our_loss(batch, loss_type, **options), theirs)


@OLD
@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("loss_type", WEIGHTED)
def test_a_weighted_loss_is_ligers(loss_type, kl, old):
    batch = make_batch()
    options = {"old": old} | KL[kl]
    assert_parity(our_loss(batch, loss_type, **options), liger_loss(batch, loss_type, **options))


def less_what_liger_has_more(theirs, batch, loss_type, old):
    """Liger's outcome without its beta = 0.1 times `by_the_rollouts_ratio`."""

    def more(hidden, weight, ids, advantages, *, completion_mask):
        logps = reference.reference_token_logps(hidden, weight, ids).logps
        known = batch.old if old else None
        return SimpleNamespace(loss=by_the_rollouts_ratio(logps, known, batch.ref, completion_mask, loss_type))

    (out, grads), (more_out, more_grads) = theirs, run(more, batch)
    grads = [None if grad is None else grad - 0.1 * other for grad, other in zip(grads, more_grads, strict=True)]
    return SimpleNamespace(loss=out.loss - 0.1 * more_out.loss), grads


@pytest.mark.parametrize("loss_type", WEIGHTED)
def test_liger_refuses_the_rollouts_ratio_where_we_refuse_it_for_vespo_alone(loss_type):
    batch = make_batch()
    with pytest.raises(ValueError, match="Sequence-level importance sampling is not supported"):
        liger_loss(batch, loss_type, importance_sampling_level="sequence")
    if loss_type != "vespo":
        assert our_loss(batch, loss_type, importance_sampling_level="sequence")[0].loss.isfinite()


# --- luspo -----------------------------------------------------------------------------------------------------------


@OLD
@pytest.mark.parametrize("kl", ["no-kl", "kl"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_is_ligers_where_all_rollouts_are_equally_long(level, kl, old):
    batch = make_batch((6, 6, 6, 6))
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    options = {"importance_sampling_level": level, "old": old} | KL[kl]
    assert_parity(our_loss(batch, "luspo", **options), liger_loss(batch, "luspo", **options))


def test_luspo_of_rollouts_is_ligers_without_a_kl_term():
    batch = make_batch()
    options = {"importance_sampling_level": "sequence", "beta": 0.0}
    assert_parity(our_loss(batch, "luspo", **options), liger_loss(batch, "luspo", **options))


def test_ligers_luspo_of_tokens_weighs_the_padding_like_tokens():
    # sum_i T_i / (B T) sum over all T positions: dr_grpo without a mask, its advantages times T_i
    batch = make_batch()
    theirs = liger_loss(batch, "luspo", beta=0.0)
    everywhere = replace(batch, mask=torch.ones_like(batch.mask), advantages=batch.advantages * batch.mask.sum(dim=1))
    assert_parity(our_loss(everywhere, "dr_grpo", max_completion_length=max(LENGTHS)), theirs)
    assert bool(theirs[1][0][~batch.mask].any()), "Liger gives the padding a gradient"
    assert not bool(our_loss(batch, "luspo")[1][0][~batch.mask].any())


# --- numbers out of range --------------------------------------------------------------------------------------------


def test_nan_in_the_padding_spreads_in_liger_and_not_here():
    batch = make_batch()
    poisoned = replace(batch, old=batch.old.masked_fill(~batch.mask, float("nan")))
    assert liger_loss(poisoned, "grpo", beta=0.0)[0].loss.isnan()
    assert_parity(our_loss(poisoned, "grpo"), liger_loss(batch, "grpo", beta=0.0))


def test_a_clipped_ratio_beyond_float32_is_nan_in_liger_and_0_here():
    batch = make_batch()
    batch.old[0, 0] -= 95.0  # A > 0, and e^95 is inf
    assert liger_loss(batch, "grpo", beta=0.0)[1][0][0, 0].isnan().all()
    assert torch.equal(our_loss(batch, "grpo")[1][0][0, 0], torch.zeros(8))


# --- denominators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_ligers_token_count_is_num_items_in_batch_and_at_least_1(loss_type):
    batch = make_batch()
    for count, ours in ((70, 70), (0.25, 1)):
        theirs = liger_loss(batch, loss_type, beta=0.0, num_items_in_batch=count)
        assert_parity(our_loss(batch, loss_type, num_items_in_batch=ours), theirs)


@pytest.mark.parametrize("loss_type", CLIPPED + WEIGHTED)
def test_an_empty_rollout_counts_as_liger_counts_it(loss_type):
    batch = make_batch((7, 5, 0, 4, 6, 3))
    assert_parity(our_loss(batch, loss_type), liger_loss(batch, loss_type, beta=0.0))


def test_liger_wants_dr_grpos_constant_and_ours_is_the_batchs_width_by_default():
    batch = make_batch()
    with pytest.raises(AssertionError, match="max_completion_length must be provided"):
        liger_loss(batch, "dr_grpo", max_completion_length=None)
    theirs = liger_loss(batch, "dr_grpo", beta=0.0, max_completion_length=max(LENGTHS))
    assert_parity(our_loss(batch, "dr_grpo", max_completion_length=None), theirs)


# --- the sampler's own log-probabilities -----------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", CLIPPED + WEIGHTED)
def test_the_sampling_ratio_is_ligers(loss_type, level):
    batch = make_batch()
    gap = torch.where(batch.mask, 0.1 * torch.randn_like(batch.old), 0)
    options = {
        "sampling_per_token_logps": batch.old - gap,
        "sampling_correction": f"{level}_truncate",
        "sampling_clip_max": 1.1,
    }
    ratio = (gap if level == "token" else gap.sum(dim=1, keepdim=True)).exp().clamp(max=1.1)
    if (loss_type, level) == ("vespo", "sequence"):
        with pytest.raises(ValueError, match="does not go with surrogate vespo"):
            our_loss(batch, loss_type, **options)
        return
    assert_parity(our_loss(batch, loss_type, **options), liger_loss(batch, loss_type, beta=0.0, sampling_ratio=ratio))


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "head"),
    [(37, {}), (37, {"bias": True}), (37, {"temperature": 0.6}), (4100, {"bias": True, "temperature": 1.7})],
    ids=["plain", "bias", "temperature", "two-chunks-of-vocabulary"],
)
@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
def test_the_head_is_ligers(schedule, vocabulary, head):
    known = {"temperature": head.get("temperature", 1.0)} | ({"lm_head_bias": True} if "bias" in head else {})
    batch = make_batch(LENGTHS, vocabulary, **known)
    theirs = liger_loss(batch, "grpo", beta=0.1, delta=4.0, chunk_size=4, **head)
    assert_parity(our_loss(batch, "grpo", beta=0.1, delta=4.0, schedule=schedule, **head), theirs)


def test_ligers_own_reference_pass_is_token_logps():
    batch = make_batch()
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(compiled=False, loss_type="grpo", beta=0.1, epsilon_high=0.28)
    frozen, head = batch.hidden + 0.2, batch.weight * 1.1

    def loss(hidden, weight, ids, advantages, *, completion_mask):
        value, _ = module(
            hidden, weight, ids, completion_mask.float(), advantages, ref_input=frozen, ref_weight=head,
            old_per_token_logps=batch.old,
        )  # fmt: skip
        return SimpleNamespace(loss=value)

    ref = rlvr_ops.token_logps(frozen, head, batch.ids, completion_mask=batch.mask).logps
    assert_parity(our_loss(replace(batch, ref=ref), "grpo", beta=0.1), run(loss, batch))


def test_liger_takes_a_missing_reference_for_the_policy_itself_and_we_refuse():
    batch = make_batch()
    theirs = liger_loss(batch, "grpo", beta=0.1, ref=False)
    assert_parity(our_loss(batch, "grpo", ref=False), theirs)
    with pytest.raises(ValueError, match="ref_per_token_logps is missing"):
        our_loss(batch, "grpo", beta=0.1, ref=False)


def test_the_defaults_of_liger_that_differ_from_ours():
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(compiled=False)
    assert (module.loss_type, module.beta, module.use_bias_correction_kl) == ("dapo", 0.04, False)
    batch = make_batch()

    def loss(hidden, weight, ids, advantages, *, completion_mask):
        mask = completion_mask.float()
        return SimpleNamespace(loss=module(hidden, weight, ids, mask, advantages, None, batch.ref, batch.old)[0])

    given = {"old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref}
    assert_parity(run(policy_loss, batch, loss_type="dapo", beta=0.04, **given), run(loss, batch))
