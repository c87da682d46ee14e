"""The tokenised Brier loss: the full-logits formula, from K rows of the head, with nothing of width V on the way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rlvr_ops import tokenised_brier_loss

few = settings(max_examples=60, deadline=None, derandomize=True)
HEADS = {
    "plain": {},
    "bias": {"lm_head_bias": True},
    "softcap": {"softcap": 3.0, "logit_scale": -0.7},
    "everything": {"lm_head_bias": True, "softcap": 4.0, "logit_scale": 1.3, "temperature": True},
}
V, H, K = 150, 12, 101


def make(seed=0, shape=(4, 5), vocabulary=V, levels=K):
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    ids = torch.randperm(vocabulary, generator=g)[:levels]
    correct = torch.randint(2, shape, generator=g)
    mask = torch.rand(shape, generator=g) < 0.4
    mask[0, 0] = True
    return (
        normal(*shape, H),
        normal(vocabulary, H),
        ids,
        correct,
        mask,
        normal(vocabulary),
        0.5 + normal(*shape).square(),
    )


def head_arguments(head, bias, temperature):
    given = dict(HEADS[head])
    if "lm_head_bias" in given:
        given["lm_head_bias"] = bias
    if "temperature" in given:
        given["temperature"] = temperature
    return given


def full_logits(
    hidden, weight, ids, correct, mask, *, lm_head_bias=None, softcap=None, logit_scale=1.0, temperature=1.0
):
    """All V logits, the softmax over K of them, and the penalty written out."""
    z = hidden @ weight.T
    z = logit_scale * (z if lm_head_bias is None else z + lm_head_bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature)
    p = z[..., ids].exp() / z[..., ids].exp().sum(-1, keepdim=True)
    loss = sum(p[..., k] * (correct.double() - k / (len(ids) - 1)) ** 2 for k in range(len(ids)))
    return (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("head", HEADS)
def test_it_is_the_full_logits_formula_with_the_same_gradients(head):
    hidden, weight, ids, correct, mask, bias, temperature = make()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    arguments = head_arguments(head, bias, temperature)
    leaves = leaves if "lm_head_bias" in arguments else leaves[:2]
    truth = full_logits(hidden, weight, ids, correct, mask, **arguments)
    got = tokenised_brier_loss(hidden, weight, ids, correct, confidence_mask=mask, **arguments)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=0)
    for ours, true in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-14)


def test_by_hand():
    # Logits 0 and ln 3 for "0" and "1": p = 1/4 and 3/4. Correct: 1/4 (1 - 0)^2; wrong: 3/4 (0 - 1)^2.
    weight = torch.tensor([[7.0], [0.0], [math.log(3.0)]])
    hidden, ids = torch.ones(2, 1), torch.tensor([1, 2])
    assert float(tokenised_brier_loss(hidden, weight, ids, torch.tensor([1, 1]))) == pytest.approx(0.25)
    assert float(tokenised_brier_loss(hidden, weight, ids, torch.tensor([1, 0]))) == pytest.approx((0.25 + 0.75) / 2)
    # Ten times the temperature: p = 3^0.1 / (1 + 3^0.1) on "1".
    assert float(tokenised_brier_loss(hidden, weight, ids, torch.tensor([0, 0]), temperature=10.0)) == pytest.approx(
        3**0.1 / (1 + 3**0.1)
    )


@few
@given(st.integers(0, 20))
def test_the_least_loss_is_at_the_token_of_the_true_probability(right):
    """All mass on one token, for an answer that is right in `right` of 20 cases."""
    verdicts = (torch.arange(20) < right).long()
    ids, weight = torch.arange(21), torch.eye(21)
    losses = [
        float(tokenised_brier_loss(1e4 * torch.eye(21)[k].expand(20, 21), weight, ids, verdicts)) for k in range(21)
    ]
    assert min(range(21), key=losses.__getitem__) == right


def test_masked_rows_may_hold_anything_and_get_no_gradient():
    hidden, weight, ids, correct, mask, _, temperature = make()
    truth = tokenised_brier_loss(hidden, weight, ids, correct, confidence_mask=mask, temperature=temperature)
    poisoned = hidden.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    weight.requires_grad_()
    verdicts = correct.masked_fill(~mask, -100)
    warmth = temperature.masked_fill(~mask, 0.0)
    got = tokenised_brier_loss(poisoned, weight, ids, verdicts, confidence_mask=mask, temperature=warmth)
    assert torch.equal(got, truth)
    got.backward()
    assert not bool(poisoned.grad[~mask].any())
    assert bool(poisoned.grad[mask].all())
    assert bool(torch.isfinite(weight.grad).all())


def test_the_weight_has_a_gradient_in_the_rows_of_the_confidence_tokens_alone():
    hidden, weight, ids, correct, *_ = make()
    weight.requires_grad_()
    tokenised_brier_loss(hidden, weight, ids, correct).backward()
    touched = weight.grad.any(1)
    assert touched[ids].all()
    assert int(touched.sum()) == K


def test_micro_batches_over_the_global_count_add_up():
    hidden, weight, ids, correct, mask, *_ = make()
    whole = tokenised_brier_loss(hidden, weight, ids, correct, confidence_mask=mask)
    parts = [
        tokenised_brier_loss(
            hidden[i], weight, ids, correct[i], confidence_mask=mask[i], num_items_in_batch=int(mask.sum())
        )
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_with_nothing_marked_the_loss_is_zero_with_zero_gradients():
    hidden, weight, ids, correct, mask, *_ = make()
    hidden.requires_grad_()
    loss = tokenised_brier_loss(hidden, weight, ids, correct, confidence_mask=torch.zeros_like(mask))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


class Shapes(TorchDispatchMode):
    """Every shape that any operation, forward or backward, writes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.seen.add(tuple(value.shape))
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_of_width_v_is_made_but_the_gradient_of_the_weight(frozen):
    vocabulary, rows = 200_000, 64
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=g, requires_grad=True)
    weight = torch.randn(vocabulary, 8, generator=g).requires_grad_(not frozen)
    ids, correct = torch.randperm(vocabulary, generator=g)[:K], torch.randint(2, (rows,), generator=g)
    with Shapes() as shapes:
        tokenised_brier_loss(hidden, weight, ids, correct).backward()
    wide = {shape for shape in shapes.seen if vocabulary in shape}
    assert wide == (set() if frozen else {(vocabulary, 8)})
    largest = max((shape for shape in shapes.seen if rows in shape), key=lambda shape: torch.Size(shape).numel())
    assert torch.Size(largest).numel() == rows * K
    assert all(torch.Size(shape).numel() <= rows * K for shape in shapes.seen - wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_softmax_is_in_float32_or_wider(dtype):
    hidden, weight, ids, correct, mask, *_ = make()
    low, lower = hidden.to(dtype), weight.to(dtype)
    got = tokenised_brier_loss(low, lower, ids, correct, confidence_mask=mask)
    assert got.dtype == torch.float32
    truth = tokenised_brier_loss(low.double(), lower.double(), ids, correct, confidence_mask=mask)
    assert float(got) == pytest.approx(float(truth), rel=1e-5 if dtype == torch.float32 else 3e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tokenised_brier_loss(low, lower, ids, correct, confidence_mask=mask).dtype == torch.float32


def test_wrong_inputs_are_named():
    hidden, weight, ids, correct, mask, *_ = make()

    def call(**changed):
        arguments = {"hidden_states": hidden, "lm_head_weight": weight, "confidence_token_ids": ids, "correct": correct}
        return tokenised_brier_loss(**{**arguments, **changed})

    with pytest.raises(
        ValueError, match=r"correct must have shape \(4, 5\) like hidden_states without H, got \(4,\): expand"
    ):
        call(correct=correct[:, 0])
    with pytest.raises(ValueError, match="correct must hold only 0 and 1, got 2"):
        call(correct=correct + 1)
    with pytest.raises(ValueError, match=r"confidence_mask must have shape \(4, 5\) like hidden_states.*got \(4, 6\)"):
        call(confidence_mask=torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"confidence_token_ids must lie in \[0, V\) = \[0, 150\), got \[0, 150\]"):
        call(confidence_token_ids=torch.tensor([0, 150]))
    with pytest.raises(ValueError, match="confidence_token_ids must be distinct: does the tokenizer split"):
        call(confidence_token_ids=torch.tensor([3, 3]))
    with pytest.raises(ValueError, match=r"confidence_token_ids must have shape \(K,\), K at least 2, got \(1,\)"):
        call(confidence_token_ids=ids[:1])
    with pytest.raises(TypeError, match=r"confidence_token_ids must have dtype int64 or int32, got torch\.float32"):
        call(confidence_token_ids=ids.float())
    with pytest.raises(ValueError, match=r"lm_head_weight must have shape \(V, H\) with H = 12 like hidden_states"):
        call(lm_head_weight=weight[:, 1:])
    with pytest.raises(ValueError, match="temperature must be > 0 and finite"):
        call(temperature=0.0)
    with pytest.raises(
        ValueError, match=r"temperature must be a number or have shape \(4, 5\), one per row, got \(4,\)"
    ):
        call(temperature=torch.ones(4))
    with pytest.raises(ValueError, match="num_items_in_batch must be > 0, the marked rows of the global batch, got 0"):
        call(num_items_in_batch=0)
    with pytest.raises(ValueError, match="softcap must be > 0 and finite"):
        call(softcap=0.0)
    assert torch.isfinite(call(confidence_mask=mask))


def test_a_temperature_is_not_rounded_to_float32():
    hidden, weight, ids, correct, mask, *_ = make()
    got = tokenised_brier_loss(hidden, weight, ids, correct, confidence_mask=mask, temperature=0.7)
    truth = full_logits(hidden, weight, ids, correct, mask, temperature=0.7)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=0)
