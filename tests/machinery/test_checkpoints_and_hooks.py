"""Activation checkpointing, selective or not, and hooks on saved tensors: the same gradients, bit for bit."""

from functools import partial

import pytest
import torch
from machinery_cases import gradients, make_batch, make_policy
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rlvr_ops

both = pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
reentrant = pytest.mark.parametrize("use_reentrant", [True, False])


def assert_same_gradients(policy, loss, batch):
    plain = make_policy(**policy.loss)
    truth = gradients(plain, plain(**batch))
    for name, gradient in gradients(policy, loss).items():
        assert torch.equal(gradient, truth[name]), name


@both
@reentrant
def test_a_checkpointed_body_before_the_loss(schedule, use_reentrant):
    policy = make_policy(schedule=schedule)
    block = policy.block.forward
    policy.block.forward = lambda x: checkpoint(block, x, use_reentrant=use_reentrant)
    batch = make_batch()
    loss = policy(**batch)
    if not use_reentrant:
        assert_same_gradients(policy, loss, batch)
        return
    loss.backward()  # PyTorch's reentrant kind goes with backward alone
    plain = make_policy(schedule=schedule)
    plain(**batch).backward()
    for ours, truth in zip(policy.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, truth.grad)


@both
def test_a_checkpoint_around_body_and_loss(schedule):
    policy, batch = make_policy(schedule=schedule, beta=0.1), make_batch()
    assert_same_gradients(policy, checkpoint(policy, use_reentrant=False, **batch), batch)


@both
@reentrant
@pytest.mark.parametrize("around", ["the loss alone", "body and loss"])
def test_a_checkpoint_around_the_loss(schedule, use_reentrant, around):
    """By backward: PyTorch's reentrant kind goes with nothing else."""
    policy, plain = (make_policy(schedule=schedule, beta=0.1) for _ in range(2))
    batch = make_batch()
    ids, advantages = batch.pop("ids"), batch.pop("advantages")

    def body(embedded):
        return policy.norm(policy.block(embedded))

    def loss(x):
        states = x if around == "the loss alone" else body(x)
        return rlvr_ops.ace_loss(states, policy.lm_head.weight, ids, advantages, **policy.loss, **batch).loss

    embedded = policy.embedding(ids)
    given = body(embedded) if around == "the loss alone" else embedded
    checkpoint(loss, given, use_reentrant=use_reentrant).backward()
    plain(ids, advantages, **batch).backward()
    for ours, truth in zip(policy.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, truth.grad)


SAVED = {
    "products of matrices": [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default],
    "attention": [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default],
    "nothing": [],
}


@both
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_selective_checkpointing(schedule, saved, dtype):
    policy, batch = make_policy(dtype, schedule=schedule), make_batch()
    contexts = partial(create_selective_checkpoint_contexts, SAVED[saved])
    loss = checkpoint(policy, use_reentrant=False, context_fn=contexts, **batch)
    plain = make_policy(dtype, schedule=schedule)
    truth = gradients(plain, plain(**batch))
    for name, gradient in gradients(policy, loss).items():
        assert torch.equal(gradient, truth[name]), name


@both
def test_a_policy_that_saves_what_the_loss_overwrites_is_refused_and_never_wrong(schedule):
    def everything(_context, _op, *_args, **_kwargs):
        return CheckpointPolicy.MUST_SAVE

    policy, batch = make_policy(schedule=schedule), make_batch()
    contexts = partial(create_selective_checkpoint_contexts, everything)
    loss = checkpoint(policy, use_reentrant=False, context_fn=contexts, **batch)
    with pytest.raises(RuntimeError, match="cached during selective activation checkpoint has been mutated"):
        loss.backward()


@both
def test_a_compiled_checkpoint_of_body_and_loss(schedule):
    torch.compiler.reset()
    policy, batch = make_policy(schedule=schedule), make_batch()
    compiled = torch.compile(
        lambda: checkpoint(policy, use_reentrant=False, **batch), fullgraph=True, backend="aot_eager"
    )
    truth = gradients(policy, policy(**batch))
    for name, gradient in gradients(policy, compiled()).items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-12, atol=1e-14)


@both
def test_what_is_saved_for_backward_may_live_on_the_cpu(schedule):
    policy, batch = make_policy(schedule=schedule), make_batch()
    with save_on_cpu():
        loss = policy(**batch)
    assert_same_gradients(policy, loss, batch)


@both
def test_what_is_saved_for_backward_may_live_in_a_file(schedule, tmp_path):
    files = []

    def pack(tensor):
        files.append(tmp_path / f"{len(files)}.pt")
        torch.save(tensor, files[-1])
        return files[-1]

    policy, batch = make_policy(schedule=schedule, entropy_coef=0.01), make_batch()
    with saved_tensors_hooks(pack, torch.load):
        loss = policy(**batch)
    assert_same_gradients(policy, loss, batch)


def saved_shapes(loss):
    """The shape of every tensor that a loss of (hidden (4, 8, 16), weight (61, 16)) saves."""
    hidden, weight = (torch.randn(*shape, requires_grad=True) for shape in ((4, 8, 16), (61, 16)))
    shapes = []
    with saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        loss(hidden, weight)
    return [shape for shape in shapes if shape != (0,)]


def test_hooks_see_what_is_kept_for_backward_and_it_is_never_a_tile_of_logits():
    batch = make_batch(dtype=torch.float32)
    batch.pop("completion_mask")
    ids = batch.pop("ids")
    advantages = batch.pop("advantages")

    def loss(schedule):
        return lambda h, w: rlvr_ops.ace_loss(h, w, ids, advantages, schedule=schedule, **batch)

    assert saved_shapes(loss("single_pass")) == [(32, 16), (61, 16)]
    assert sorted(saved_shapes(loss("two_pass"))) == [(32,), (32,), (32,), (32, 16), (61, 16)]
    assert sorted(saved_shapes(lambda h, w: rlvr_ops.token_logps(h, w, ids))) == [(32,), (32,), (32, 16), (61, 16)]
