"""Scores against the reference: log-probability, entropy, self-certainty, top-1, with and without gradient."""

import pytest
import torch
from loss_cases import SMALL, TOLERANCE, assert_same, head_arguments, make_batch, pack
from rlvr_kernels.linear_lse import linear_lse

import rlvr_ops
from rlvr_ops.reference import reference_token_logps

HEADS = {
    "plain": {},
    "bias": {"lm_head_bias": True},
    "softcap": {"softcap": 3.0, "logit_scale": -0.7},
    "everything": {"lm_head_bias": True, "softcap": 4.0, "logit_scale": 1.3, "temperature": True},
}
EVERYTHING = {"with_entropy": True, "with_self_certainty": True, "with_top1": True, "with_sum_p_squared": True}


def likely(batch):
    """The same batch with every other token the likeliest one, so that top-1 is sometimes true."""
    best = (batch.hidden @ batch.weight.T).nan_to_num().argmax(dim=-1)
    even = torch.arange(batch.ids.numel()).reshape(batch.ids.shape) % 2 == 0
    return best.where(even & batch.mask, batch.ids)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [None, 1, 100])
def test_every_score_is_the_reference(head, packed, dtype, columns):
    batch = make_batch()
    batch = pack(batch) if packed else batch
    ids = likely(batch)
    arguments = {"completion_mask": batch.mask, **EVERYTHING}
    truth = reference_token_logps(batch.hidden, batch.weight, ids, **arguments, **head_arguments(batch, HEADS[head]))
    low = batch.to(dtype)
    room = None if columns is None else columns * 300 * dtype.itemsize
    got = rlvr_ops.token_logps(
        low.hidden, low.weight, ids, workspace_bytes=room, **arguments, **head_arguments(low, HEADS[head])
    )
    for name in ("logps", "entropy", "self_certainty"):
        value = getattr(got, name)
        assert value.dtype == dtype
        assert_same(value, getattr(truth, name), TOLERANCE[dtype], name)
        assert not bool(value[~batch.mask].any())
    assert got.top1.dtype == torch.bool
    assert torch.equal(got.top1, truth.top1)
    if head == "plain":
        assert 0 < int(got.top1.sum()) < int(batch.mask.sum())


@pytest.mark.parametrize("head", HEADS)
def test_the_kernel_without_a_workspace_gives_the_same_log_probabilities(head):
    batch = make_batch().to(torch.float32)
    given = head_arguments(batch, HEADS[head])
    given = {name.removeprefix("lm_head_"): value for name, value in given.items()}
    if isinstance(given.get("temperature"), torch.Tensor):
        given["temperature"] = given["temperature"][batch.mask]
    got = linear_lse(batch.hidden[batch.mask], batch.weight, batch.ids[batch.mask], **given)[0]
    double = batch.to(torch.float64)
    arguments = {"completion_mask": batch.mask, **head_arguments(double, HEADS[head])}
    truth = reference_token_logps(double.hidden, double.weight, batch.ids, **arguments).logps
    assert_same(got, truth[batch.mask], 1e-5)


def test_what_is_not_asked_for_is_none():
    batch = make_batch(SMALL, 17, 5)
    got = rlvr_ops.token_logps(batch.hidden, batch.weight, batch.ids, completion_mask=batch.mask)
    assert got.entropy is None
    assert got.self_certainty is None
    assert got.top1 is None


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_loss_of_log_probabilities_and_entropy_has_the_reference_gradients(head, dtype):
    """The library's losses are not needed: a user's own function of logp and entropy gets its gradients too."""
    batch = make_batch(**HEADS[head])

    def gradients(scores, given):
        hidden, weight, bias = given.leaves()
        arguments = head_arguments(given, HEADS[head])
        if "lm_head_bias" in arguments:
            arguments["lm_head_bias"] = bias
        out = scores(hidden, weight, given.ids, completion_mask=given.mask, with_entropy=True, **arguments)
        loss = (out.logps.exp() * given.mask).sum() + 0.3 * (out.entropy**2 * given.mask).mean() - out.logps.mean()
        leaves = [hidden, weight] + ([bias] if "lm_head_bias" in arguments else [])
        return torch.autograd.grad(loss, leaves)

    truth = gradients(reference_token_logps, batch)
    for got, true in zip(gradients(rlvr_ops.token_logps, batch.to(dtype)), truth, strict=True):
        assert_same(got, true, TOLERANCE[dtype])


@pytest.mark.parametrize("size", [1e4, -1e4, 60.0])
def test_logits_far_from_zero_stay_exact(size):
    """All logits near `size`: log-probabilities are those of the differences."""
    hidden = torch.ones(1, 3, 1, dtype=torch.float32)
    spread = torch.tensor([0.0, 1.0, 2.0, -3.0])
    weight = (spread + size)[:, None]
    got = rlvr_ops.token_logps(hidden, weight, torch.tensor([[0, 1, 3]]), with_entropy=True)
    exact = (weight.double() - size)[:, 0].log_softmax(0)
    assert got.logps[0].tolist() == pytest.approx(exact[[0, 1, 3]].tolist(), rel=1e-6)
    assert got.entropy[0].tolist() == pytest.approx([-(exact.exp() * exact).sum().item()] * 3, rel=1e-5)


def test_a_certain_token_has_log_probability_zero_and_no_nan_gradient():
    hidden = torch.full((1, 2, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    out = rlvr_ops.token_logps(hidden, weight, torch.tensor([[0, 2]]), with_entropy=True)
    assert out.logps[0].tolist() == [0.0, -2e4]
    assert out.entropy[0].tolist() == [0.0, 0.0]
    (out.logps.sum() + out.entropy.sum()).backward()
    assert bool(torch.isfinite(hidden.grad).all())
    assert bool(torch.isfinite(weight.grad).all())


def test_a_forbidden_token_has_probability_zero_and_no_nan_gradient():
    """A bias of -inf forbids a token, as padded vocabularies do: it has no mass, no entropy and no gradient."""
    batch = make_batch(SMALL, 17, 5, poison=False)
    bias = batch.bias.clone()
    bias[3] = -torch.inf
    ids = batch.ids.masked_fill(batch.ids == 3, 4)
    keep = torch.arange(17) != 3
    results = []
    for weight, b, chosen in ((batch.weight, bias, ids), (batch.weight[keep], bias[keep], ids - (ids > 3).long())):
        hidden, w = batch.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = rlvr_ops.token_logps(
            hidden, w, chosen, completion_mask=batch.mask, lm_head_bias=b, with_entropy=True, workspace_bytes=8 * 40
        )
        (out.logps.sum() + 0.1 * out.entropy.sum()).backward()
        results.append((out.logps, out.entropy, hidden.grad, w.grad))
    forbidden, without = results
    for a, b in zip(forbidden[:3], without[:3], strict=True):
        assert_same(a, b, 1e-12)
    assert_same(forbidden[3][keep], without[3], 1e-12)
    assert not bool(forbidden[3][3].any())
