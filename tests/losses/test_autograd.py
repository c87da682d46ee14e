"""The losses inside training code: gradients by finite differences, precision, checkpointing, layouts, compilation."""

from dataclasses import replace

import pytest
import torch
from loss_cases import (
    SMALL,
    assert_same,
    dense_batch,
    error,
    make_batch,
    pack,
    policy_loss,
    policy_loss_from_logps,
    reference_policy_loss,
    reference_policy_loss_from_logps,
    run,
)
from torch.utils.checkpoint import checkpoint

import rlvr_ops

SCHEDULES = ("single_pass", "two_pass")
both = pytest.mark.parametrize("schedule", SCHEDULES)


def arguments(batch, **kwargs):
    return {
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "completion_mask": batch.mask,
        "alpha": 1.0,
        "beta": 0.1,
        **kwargs,
    }


@both
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(schedule, packed):
    batch = make_batch((3, 0, 2), 7, 3, poison=False)
    batch = pack(batch) if packed else batch
    head = {"softcap": 3.0, "logit_scale": 0.8, "temperature": batch.temperature}
    given = arguments(batch, confidence="old", delta=1.6, schedule=schedule, **batch.packing, **head)

    def loss(hidden, weight, bias):
        return policy_loss(hidden, weight, batch.ids, batch.advantages, lm_head_bias=bias, **given).loss

    assert torch.autograd.gradcheck(loss, batch.leaves())


def test_gradcheck_of_log_probabilities_and_entropy():
    batch = make_batch((3, 0, 2), 7, 3, poison=False)

    def scores(hidden, weight, bias):
        out = rlvr_ops.token_logps(
            hidden, weight, batch.ids, completion_mask=batch.mask, lm_head_bias=bias, softcap=3.0,
            temperature=batch.temperature, with_entropy=True, workspace_bytes=8 * 12,
        )  # fmt: skip
        return out.logps, out.entropy

    assert torch.autograd.gradcheck(scores, batch.leaves())


@both
@pytest.mark.parametrize("scale", [3.0, -0.5, 0.0])
def test_an_upstream_gradient_scales_every_gradient(schedule, scale):
    batch = make_batch(SMALL, 17, 5)
    given = arguments(batch, schedule=schedule)
    _, truth = run(policy_loss, batch, use_bias=True, **given)
    leaves = batch.leaves()
    out = policy_loss(leaves[0], leaves[1], batch.ids, batch.advantages, lm_head_bias=leaves[2], **given)
    (scale * out.loss).backward()
    for leaf, grad in zip(leaves, truth, strict=True):
        assert_same(leaf.grad, scale * grad, 1e-14)


@both
def test_a_second_backward_gives_the_same_gradients_again(schedule):
    batch = make_batch(SMALL, 17, 5)
    hidden, weight, _ = batch.leaves()
    out = policy_loss(hidden, weight, batch.ids, batch.advantages, **arguments(batch, schedule=schedule))
    (5.0 * out.loss).backward(retain_graph=True)
    first = hidden.grad.clone(), weight.grad.clone()
    (5.0 * out.loss).backward()
    assert torch.equal(hidden.grad, 2 * first[0])
    assert torch.equal(weight.grad, 2 * first[1])


@both
def test_a_second_derivative_is_refused_rather_than_wrong(schedule):
    batch = make_batch(SMALL, 17, 5)
    hidden, weight, _ = batch.leaves()
    out = policy_loss(hidden, weight, batch.ids, batch.advantages, **arguments(batch, schedule=schedule))
    with pytest.raises(RuntimeError, match="the losses can be differentiated once: create_graph=True"):
        torch.autograd.grad(out.loss, hidden, create_graph=True)


def test_a_second_derivative_of_token_logps_is_refused_rather_than_0():
    batch = make_batch([4, 4], 17, 5, holes=0, poison=False)
    hidden = batch.hidden.detach().requires_grad_()
    scores = rlvr_ops.token_logps(hidden, batch.weight, batch.ids, with_entropy=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(scores.logps.sum() + scores.entropy.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("what", ["loss", "token_logps"])
def test_ids_edited_before_backward_are_refused_and_an_edited_mask_changes_nothing(what):
    batch = make_batch([4, 4], 17, 5, holes=0, poison=False)

    def gradient(edit):
        hidden, weight, _ = batch.leaves()
        ids, mask = batch.ids.clone(), torch.ones_like(batch.ids, dtype=torch.bool)
        mask[:, -1] = False
        if what == "loss":
            loss = rlvr_ops.grpo_loss(
                hidden, weight, ids, batch.advantages, completion_mask=mask, schedule="two_pass"
            ).loss
        else:
            loss = rlvr_ops.token_logps(hidden, weight, ids, completion_mask=mask).logps.sum()
        edit(ids, mask)
        return torch.autograd.grad(loss, hidden)[0]

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(lambda ids, mask: ids.fill_(1))
    assert torch.equal(gradient(lambda ids, mask: mask.fill_(True)), gradient(lambda ids, mask: None))


@both
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 0)])
def test_only_the_gradients_that_are_wanted_are_computed_and_they_are_the_same(schedule, wanted):
    batch = make_batch(SMALL, 17, 5)
    given = arguments(batch, schedule=schedule, use_bias=True)
    _, truth = run(policy_loss, batch, **given)
    leaves = [x.requires_grad_(bool(w)) for x, w in zip(map(torch.Tensor.detach, batch.leaves()), wanted, strict=True)]
    if any(wanted):
        _, grads = run(policy_loss, batch, leaves=leaves, **given)
        for grad, true_grad, want in zip(grads, truth, wanted, strict=True):
            assert (grad is not None) == bool(want)
            assert grad is None or error(grad, true_grad) < 1e-14
    else:
        out = policy_loss(leaves[0], leaves[1], batch.ids, batch.advantages, **arguments(batch, schedule=schedule))
        assert not out.loss.requires_grad


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass", "auto"])
def test_without_gradients_the_loss_is_the_same_number(schedule):
    batch = make_batch(SMALL, 17, 5)
    truth, _ = run(policy_loss, batch, **arguments(batch))
    hidden, weight, _ = batch.leaves()
    given = arguments(batch, schedule=schedule)
    with torch.no_grad():
        quiet = policy_loss(hidden, weight, batch.ids, batch.advantages, **given)
    assert not quiet.loss.requires_grad
    assert_same(quiet.loss, truth.loss.detach(), 1e-14)


@both
@pytest.mark.parametrize("lengths", [(0, 0, 0), ()])
def test_nothing_that_counts_gives_zero_attached_with_zero_gradients(schedule, lengths):
    batch = make_batch(SMALL, 17, 5)
    empty = replace(batch, mask=torch.zeros_like(batch.mask))
    if not lengths:
        rows = ("hidden", "ids", "advantages", "mask", "old", "ref", "sampling", "temperature")
        empty = replace(batch, **{name: getattr(batch, name)[:0] for name in rows})
    packed = replace(pack(empty), mask=None)
    for given_batch in (empty, packed):
        for loss_type in ("grpo", "dapo", "dr_grpo", "bnpo"):
            given = arguments(given_batch, loss_type=loss_type, schedule=schedule, with_entropy=True)
            if loss_type == "dr_grpo":
                given["max_completion_length"] = 5
            out, grads = run(policy_loss, given_batch, use_bias=True, **given)
            assert out.loss.item() == 0
            assert out.loss.requires_grad
            for grad in grads:
                assert grad is not None
                assert not bool(grad.any())
            assert all(bool(torch.isfinite(value)) for value in out.metrics.values())
    logps = torch.zeros_like(empty.old).requires_grad_()
    out = policy_loss_from_logps(
        logps, empty.advantages, completion_mask=empty.mask, ref_per_token_logps=empty.ref, alpha=1.0
    )
    (coef,) = torch.autograd.grad(out.loss, logps)
    assert out.loss.item() == 0
    assert not bool(coef.any())


def eager(hidden, weight, ids, advantages, *, completion_mask, **kwargs):
    """What a trainer without this library does: logits in the model's dtype, the loss in float32."""
    if not torch.is_autocast_enabled("cpu"):
        hidden = hidden.to(torch.promote_types(hidden.dtype, weight.dtype))
    logits = (hidden @ weight.T).float()
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return reference_policy_loss_from_logps(logps, advantages, completion_mask=completion_mask, **kwargs)


def rms(actual, truth):
    return ((actual.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


@both
@pytest.mark.parametrize("room", [None, 4 * 507 * 80])
@pytest.mark.parametrize("mode", ["bf16", "autocast", "autocast bf16 hidden", "bf16 hidden"])
def test_low_precision_is_no_further_from_the_truth_than_plain_pytorch(schedule, mode, room):
    low = make_batch(poison=False).to(torch.float32)
    if "bf16" in mode:
        low = replace(low, hidden=low.hidden.bfloat16())
    if mode == "bf16":
        low = replace(low, weight=low.weight.bfloat16())
    # Clipped only where it does not matter: at the edge of a clip a rounding switches a token off, in any implementation.
    smooth = {"epsilon_low": 1.0, "epsilon_high": 50.0}
    exact = low.to(torch.float64)
    _, truth = run(reference_policy_loss, exact, **arguments(exact, **smooth))
    given = arguments(low, **smooth)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode.startswith("autocast")):
        ours, grads = run(policy_loss, low, schedule=schedule, workspace_bytes=room, **given)
        _, plain = run(eager, low, **given)
    assert ours.loss.dtype == torch.float32
    assert ours.per_token_logps.dtype == torch.float32
    for i, leaf in enumerate((low.hidden, low.weight)):
        assert grads[i].dtype == leaf.dtype
        # Equal but for the partial sums of d_weight, each rounded to bfloat16 where a matmul cannot widen (CPU).
        assert rms(grads[i], truth[i]) <= 1.05 * rms(plain[i], truth[i]) + 1e-6


@both
def test_tied_embeddings_get_both_gradients(schedule):
    batch = make_batch(SMALL, 17, 5, poison=False)
    ids = batch.ids.roll(1, dims=1)

    def gradient(loss):
        table = batch.weight.clone().requires_grad_()
        hidden = torch.tanh(table[ids] @ torch.eye(5, dtype=torch.float64).roll(1, 0))
        out = loss(hidden, table, batch.ids, batch.advantages)
        return torch.autograd.grad(out.loss, table)[0]

    given = arguments(batch)
    got = gradient(lambda *a: policy_loss(*a, schedule=schedule, **given))
    assert_same(got, gradient(lambda *a: reference_policy_loss(*a, **given)), 1e-12)


@both
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(schedule, use_reentrant):
    batch = make_batch(SMALL, 17, 5, poison=False)
    given = arguments(batch, schedule=schedule)

    def gradient(wrap):
        hidden, weight, _ = batch.leaves()

        def loss(h, w):
            return policy_loss(torch.tanh(h), w, batch.ids, batch.advantages, **given).loss

        wrap(loss, hidden, weight).backward()
        return hidden.grad, weight.grad

    plain = gradient(lambda f, *args: f(*args))
    again = gradient(lambda f, *args: checkpoint(f, *args, use_reentrant=use_reentrant))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def strided(x, dim):
    """The same values at every other position of a larger tensor."""
    wide = x.repeat_interleave(2, dim=dim)
    return wide.index_select(dim, torch.arange(wide.shape[dim])).unflatten(dim, (-1, 2)).select(dim + 1, 0)


@both
def test_strides_do_not_matter(schedule):
    batch = make_batch(SMALL, 17, 5, poison=False)
    _, truth = run(policy_loss, batch, **arguments(batch, schedule=schedule))

    def transposed(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    views = [
        replace(
            batch,
            **{n: transposed(getattr(batch, n)) for n in ("hidden", "weight", "ids", "mask", "old", "ref")},
        ),
        replace(
            batch,
            hidden=strided(batch.hidden, 2),
            weight=strided(batch.weight, 0),
            ids=strided(batch.ids, 1),
            advantages=strided(batch.advantages, 0),
            mask=strided(batch.mask, 0),
            old=strided(batch.old, 1),
            ref=strided(batch.ref, 0),
        ),
    ]
    for view in views:
        assert not view.hidden.is_contiguous()
        leaves = [view.hidden.detach().requires_grad_(), view.weight.detach().requires_grad_(), batch.leaves()[2]]
        _, grads = run(policy_loss, view, leaves=leaves, **arguments(view, schedule=schedule))
        assert_same(grads[0], truth[0], 1e-14, "d_hidden")
        assert_same(grads[1], truth[1], 1e-14, "d_weight")


@both
def test_expanded_inputs_get_the_summed_gradient(schedule):
    batch = make_batch(SMALL, 17, 5, poison=False)
    given = arguments(batch, schedule=schedule)

    def gradient(expand):
        row = batch.hidden[:1, :1].clone().requires_grad_()
        hidden = row.expand(4, 5, 5) if expand else row.repeat(4, 5, 1)
        ids = batch.ids[:1].expand(4, 5) if expand else batch.ids[:1].repeat(4, 1)
        loss = policy_loss(hidden, batch.weight, ids, batch.advantages, **given).loss
        return torch.autograd.grad(loss, row)[0]

    assert_same(gradient(True), gradient(False), 1e-13)


@both
def test_no_input_is_written_to(schedule):
    batch = make_batch(SMALL, 17, 5)
    before = batch.map(torch.clone)
    leaves = [batch.hidden.requires_grad_(), batch.weight.requires_grad_(), batch.bias.requires_grad_()]
    run(policy_loss, batch, leaves=leaves, use_bias=True, **arguments(batch, schedule=schedule))
    for name, value in vars(before).items():
        if value is not None:
            torch.testing.assert_close(getattr(batch, name), value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_may_be_int32_and_a_mask_may_be_anything(dtype):
    batch = make_batch(SMALL, 17, 5)
    truth, _ = run(policy_loss, batch, **arguments(batch))
    for mask in (batch.mask.to(dtype), batch.mask.float(), batch.mask.to(torch.bfloat16)):
        other = replace(batch, ids=batch.ids.to(dtype), mask=mask)
        assert torch.equal(run(policy_loss, other, **arguments(other))[0].loss, truth.loss)


@pytest.mark.parametrize("keep", [False, True])
def test_a_batch_of_upstream_gradients_is_right_or_refused(keep):
    hidden, weight, ids, advantages, ref = dense_batch()
    hidden.requires_grad_()
    upstream = {"grad_outputs": torch.tensor([1.0, 2.0]), "is_grads_batched": True, "retain_graph": keep}

    def loss(schedule):
        return rlvr_ops.ace_loss(hidden, weight, ids, advantages, ref_per_token_logps=ref, schedule=schedule).loss

    (truth,) = torch.autograd.grad(loss("single_pass"), hidden)
    (found,) = torch.autograd.grad(loss("single_pass"), hidden, **upstream)
    torch.testing.assert_close(found, torch.stack([truth, 2 * truth]))
    scores = rlvr_ops.token_logps(hidden, weight, ids, with_entropy=True)
    for scalar in (loss("two_pass"), scores.logps.sum(), scores.entropy.sum()):
        with pytest.raises(NotImplementedError, match="a batch of upstream gradients"):
            torch.autograd.grad(scalar, hidden, **upstream)
