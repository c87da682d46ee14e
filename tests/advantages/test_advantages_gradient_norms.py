"""The proxy for the squared norm of grad log pi, against the gradients themselves."""

import pytest
import torch

import rlvr_ops

B, T, V, H = 3, 4, 7, 5


@pytest.fixture
def head():
    torch.manual_seed(3)
    hidden = torch.randn(B, T, H, dtype=torch.float64)
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(V, (B, T))
    return hidden, weight, ids


def scores(hidden, weight, ids):
    logits = hidden @ weight.T
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return logits, logps, logits.softmax(-1).square().sum(-1)


def test_it_is_the_sum_of_every_tokens_gradient_with_respect_to_the_head(head):
    hidden, weight, _ids = head
    _, logps, squares = scores(*head)
    expected = torch.zeros(B, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            (gradient,) = torch.autograd.grad(logps[b, t], weight, retain_graph=True)
            expected[b] += gradient.square().sum()
    torch.testing.assert_close(rlvr_ops.squared_gradient_norms(logps, squares, hidden), expected)


def test_it_is_exact_for_a_rollout_of_one_token(head):
    hidden, weight, ids = head
    one = (hidden[:, :1], weight, ids[:, :1])
    _, logps, squares = scores(*one)
    got = rlvr_ops.squared_gradient_norms(logps, squares, one[0])
    for b in range(B):
        (gradient,) = torch.autograd.grad(logps[b].sum(), weight, retain_graph=True)
        torch.testing.assert_close(got[b], gradient.square().sum())


def test_without_hidden_states_it_is_the_gradient_with_respect_to_the_logits(head):
    logits, logps, squares = scores(*head)
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    torch.testing.assert_close(rlvr_ops.squared_gradient_norms(logps, squares), gradient.square().sum((1, 2)))


def test_the_sum_of_squares_follows_from_two_logsumexps(head):
    logits, _logps, squares = scores(*head)
    stated = ((2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)).exp()
    torch.testing.assert_close(stated, squares)


def test_masked_tokens_do_not_count_whatever_they_hold(head):
    hidden, *_ = head
    _, logps, squares = scores(*head)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    poisoned = [x.detach().masked_fill(mask == 0, torch.nan) for x in (logps, squares)]
    hidden = hidden.masked_fill(mask[..., None] == 0, torch.nan)
    got = rlvr_ops.squared_gradient_norms(*poisoned, hidden, mask)
    assert got[2] == 0
    torch.testing.assert_close(
        got[1:2], rlvr_ops.squared_gradient_norms(logps[1:2, :2], squares[1:2, :2], hidden[1:2, :2])
    )


def test_packed_rows_are_the_padded_ones(head):
    hidden, *_ = head
    _, logps, squares = scores(*head)
    packed = rlvr_ops.squared_gradient_norms(
        logps.reshape(-1), squares.reshape(-1), hidden.reshape(-1, H), cu_seqlens=torch.arange(B + 1) * T
    )
    torch.testing.assert_close(packed, rlvr_ops.squared_gradient_norms(logps, squares, hidden))


def test_a_certain_token_has_no_gradient_and_rounding_makes_none():
    logps = torch.tensor([[-1e-8]])  # exp rounds to 1 in float32, and 1 - 2 + 0.9999999 lies below 0
    assert rlvr_ops.squared_gradient_norms(logps, torch.tensor([[0.9999999]])).tolist() == [0.0]


def test_it_feeds_oblr(head):
    hidden, *_ = head
    _, logps, squares = scores(*head)
    norms = rlvr_ops.squared_gradient_norms(logps, squares, hidden)
    r = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    got = rlvr_ops.group_advantages(r, 3, "oblr", squared_gradient_norms=norms)
    torch.testing.assert_close(got, r - norms[0] / norms.sum())
    assert not norms.requires_grad


def test_wrong_arguments_are_named(head):
    hidden, *_ = head
    _, logps, squares = scores(*head)
    with pytest.raises(ValueError, match=r"sum_p_squared must have shape \(3, 4\) like per_token_logps, got \(3, 3\)"):
        rlvr_ops.squared_gradient_norms(logps, squares[:, :3])
    with pytest.raises(TypeError, match=r"sum_p_squared must be a torch\.Tensor, got NoneType"):
        rlvr_ops.squared_gradient_norms(logps, None)
    with pytest.raises(
        ValueError, match=r"hidden_states must have shape \(3, 4\) like per_token_logps and H, got \(3, 3, 5\)"
    ):
        rlvr_ops.squared_gradient_norms(logps, squares, hidden[:, :3])
