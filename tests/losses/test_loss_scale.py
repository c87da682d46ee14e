"""The factor that arrives from above the loss: a loss scale, or a share of an accumulated batch."""

import pytest
import torch

import rlvr_ops

B, T, H, V = 4, 16, 32, 512


def gradients(dtype, factor=1.0, schedule="auto", retain_graph=False):
    """d_hidden and d_weight in float64 without the factor, and the schedule's metric; each token weighs 4e-6."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, H, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) * 0.3).to(dtype).requires_grad_()
    ids = torch.randint(V, (B, T), generator=g)
    out = rlvr_ops.dapo_loss(
        hidden, weight, ids, torch.tensor([1.0, -1.0, 1.0, -1.0]), num_items_in_batch=2**18, schedule=schedule
    )
    (out.loss * factor).backward(retain_graph=retain_graph)
    return [x.grad.double() / factor for x in (hidden, weight)], float(out.metrics["head/single_pass"])


def error(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("factor", [2.0**15, 2.0**16])
def test_a_loss_scale_saves_a_float16_gradient_from_underflow(factor):
    exact, _ = gradients(torch.float64)
    found, single = gradients(torch.float16, factor)
    assert not single
    for a, b in zip(found, exact, strict=True):
        assert error(a, b) < 1e-3


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_loss_scale_that_float16_cannot_hold_leaves_its_gradients_finite(retain_graph):
    found, single = gradients(torch.float16, 2.0**16, "single_pass", retain_graph)
    assert single
    assert all(bool(x.isfinite().all()) for x in found)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_factor_is_not_rounded_to_the_gradients_dtype(retain_graph):
    """bfloat16 has 0.3340 for 1/3: every entry of the gradient would be 0.2 % too large."""
    whole, _ = gradients(torch.bfloat16, schedule="single_pass")
    third, _ = gradients(torch.bfloat16, 1 / 3, "single_pass", retain_graph)
    for a, b in zip(third, whole, strict=True):
        assert abs(float((a * b).sum() / (b * b).sum()) - 1) < 5e-4
