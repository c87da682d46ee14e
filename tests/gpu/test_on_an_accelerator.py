"""Every kernel on the accelerator at hand: no further from float64 than eager PyTorch in the same dtype is.

`pytest -m gpu`. With RLVR_OPS_TEST_DEVICE=cpu the same tests run on the twins, which shows that the tests themselves work.
"""

import os

import pytest
import torch
from loss_cases import EVERY_METHOD, HEADS, loss_arguments, policy_loss, reference_policy_loss
from loss_cases import make_batch as make_ragged_batch

import rlvr_ops

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("RLVR_OPS_TEST_DEVICE", "cuda")
B, T, H, V = 8, 96, 256, 32003


def make_batch(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, H, generator=g).to(DEVICE, dtype)
    weight = (torch.randn(V, H, generator=g) * 0.2).to(DEVICE, dtype)
    ids = torch.randint(0, V, (B, T), generator=g).to(DEVICE)
    mask = (torch.rand(B, T, generator=g) > 0.2).to(DEVICE)
    advantages = torch.tensor([1.0, -1.0, -0.5, 0.0] * (B // 4), device=DEVICE)
    logp = exact_logps(hidden, weight, ids).float()
    old, ref = (logp + 0.2 * torch.randn(B, T, generator=g).to(DEVICE) for _ in range(2))
    return (
        hidden,
        weight,
        ids,
        advantages,
        {"completion_mask": mask, "old_per_token_logps": old, "ref_per_token_logps": ref},
    )


def exact_logps(hidden, weight, ids):
    return (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def run(loss, hidden, weight, ids, advantages, given, dtype=None, **keywords):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (hidden, weight)]
    out = loss(*leaves, ids, advantages, **given, **keywords)
    out.loss.backward()
    return [out.loss.detach(), leaves[0].grad, leaves[1].grad]


def distance(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
@pytest.mark.parametrize("confidence", ["current", "old"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_ace_is_no_further_from_float64_than_eager(dtype, schedule, confidence, on_policy):
    hidden, weight, ids, advantages, given = make_batch(dtype)
    given = {**given, "old_per_token_logps": None} if on_policy else given
    keywords = {"alpha": 1.0, "beta": 0.01, "confidence": confidence}
    batch = (hidden, weight, ids, advantages, given)
    exact = run(reference_policy_loss, *batch, dtype=torch.float64, **keywords)
    eager = run(reference_policy_loss, *batch, **keywords)
    ours = run(policy_loss, *batch, schedule=schedule, workspace_bytes=T * V * 8, **keywords)
    for name, a, b, truth in zip(("loss", "d_hidden", "d_weight"), ours, eager, exact, strict=True):
        floor = (
            1e-6 if dtype == torch.float32 else 2.5e-3
        )  # eager does not round powers of two (docs/kernels.md, numerics)
        assert distance(a, truth) <= max(1.05 * distance(b, truth), floor), name


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_every_surrogate_is_no_further_from_float64_than_eager(method, schedule):
    """Ragged and masked, with NaN in the padding and a bias, a softcap, a scale and a temperature per token."""
    batch = make_ragged_batch(**HEADS["everything"]).map(lambda x: x.to(DEVICE))

    def gradients(loss, dtype, **options):
        low = batch.to(dtype)
        given = loss_arguments(low, EVERY_METHOD[method], "grpo", HEADS["everything"]) | options
        hidden, weight, bias = low.leaves()
        given.pop("use_bias")
        given |= {"completion_mask": low.mask, "lm_head_bias": bias}
        out = loss(hidden, weight, low.ids, low.advantages, **given)
        return torch.autograd.grad(out.loss, (hidden, weight, bias))

    exact = gradients(reference_policy_loss, torch.float64)
    eager = gradients(reference_policy_loss, torch.float32)
    ours = gradients(policy_loss, torch.float32, schedule=schedule)
    for name, a, b, truth in zip(("d_hidden", "d_weight", "d_bias"), ours, eager, exact, strict=True):
        assert distance(a, truth) <= max(1.05 * distance(b, truth), 1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("gradient", "workspace_bytes"), [(False, None), (True, None), (True, 3_000_000)])
def test_log_probabilities_are_no_further_from_float64_than_eager(dtype, gradient, workspace_bytes):
    """Without a gradient the logits of bfloat16 operands stay in the registers; with one they are folded from a tile."""
    hidden, weight, ids, *_ = make_batch(dtype)
    exact = exact_logps(hidden, weight, ids)
    eager = (hidden @ weight.T).float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    hidden.requires_grad_(gradient)
    found = rlvr_ops.token_logps(hidden, weight, ids, workspace_bytes=workspace_bytes).logps.detach()
    assert distance(found, exact) <= max(1.05 * distance(eager, exact), 1e-6)


def test_entropy_and_self_certainty_are_those_of_float64():
    hidden, weight, ids, *_ = make_batch(torch.float32)
    with torch.no_grad():
        found = rlvr_ops.token_logps(hidden, weight, ids, with_entropy=True, with_self_certainty=True, with_top1=True)
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    torch.testing.assert_close(found.entropy.double(), -(logp.exp() * logp).sum(-1), rtol=1e-4, atol=1e-5)
    certainty = -(torch.tensor(float(V)).log().double() + logp).mean(-1)
    torch.testing.assert_close(found.self_certainty.double(), certainty, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.top1, logp.argmax(-1) == ids)


def test_two_runs_give_the_same_bits():
    batch = make_batch(torch.bfloat16)
    first, second = (run(policy_loss, *batch, alpha=1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gradient", [True, False], ids=["from a tile", "in the registers"])
def test_more_rows_than_a_grid_dimension_of_65535_and_more_logits_than_int32_holds(gradient):
    rows, vocabulary = (70_001, 32_003) if DEVICE != "cpu" else (300, 1_003)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=g).to(DEVICE, torch.bfloat16)
    weight = torch.randn(vocabulary, 16, generator=g).to(DEVICE, torch.bfloat16)
    ids = torch.randint(0, vocabulary, (rows,), generator=g).to(DEVICE)
    hidden.requires_grad_(gradient)
    found = rlvr_ops.token_logps(hidden, weight, ids, workspace_bytes=rows * vocabulary * 4).logps.detach()
    last = slice(rows - 50, rows)
    torch.testing.assert_close(
        found[last].double(), exact_logps(hidden[last].detach(), weight, ids[last]), rtol=2e-2, atol=5e-2
    )


@pytest.mark.parametrize("packed", [False, True])
def test_what_says_which_rows_count_may_be_on_the_host(packed):
    hidden, weight, ids, advantages, given = make_batch(torch.bfloat16)
    if packed:
        hidden, ids = hidden.flatten(0, 1), ids.flatten()
        given = {name: x.flatten() for name, x in given.items()}
        given["cu_seqlens"] = torch.arange(B + 1, device=DEVICE) * T
    here = ("completion_mask", "cu_seqlens")
    on_host = {name: x.cpu() if name in here else x for name, x in given.items()}
    found = run(policy_loss, hidden, weight, ids, advantages.cpu(), on_host, alpha=1.0)
    for a, b in zip(found, run(policy_loss, hidden, weight, ids, advantages, given, alpha=1.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)
