"""A step of training in a CUDA graph."""

import pytest
import torch

import rlvr_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="CUDA graphs need CUDA; tests/losses/test_capture.py does not"
    ),
]
B, T, H, V = 8, 64, 256, 8192


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["auto", "two_pass"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_a_captured_step_replays_on_other_values(on_policy, schedule, dtype):
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=g)

    hidden, weight = normal(B, T, H).to(dtype).requires_grad_(), (0.1 * normal(V, H)).to(dtype).requires_grad_()
    ids = torch.randint(V, (B, T), device="cuda", generator=g)
    mask = torch.arange(T, device="cuda").expand(B, T) < torch.arange(T - 14, T + 2, 2, device="cuda")[:, None]
    advantages, old, ref = normal(B), normal(B, T) - 9, normal(B, T) - 9

    def step():
        out = rlvr_ops.ace_loss(
            hidden, weight, ids, advantages, ref_per_token_logps=ref, completion_mask=mask, schedule=schedule,
            old_per_token_logps=None if on_policy else old,
        )  # fmt: skip
        return out.loss, *torch.autograd.grad(out.loss, (hidden, weight))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), rlvr_ops.cuda_graph_warmup():
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        g.manual_seed(seed)
        with torch.no_grad():
            hidden.copy_(normal(B, T, H))
            advantages.copy_(normal(B) * (torch.arange(B, device="cuda") % 3 > 0))  # others are inactive now and then
            old.copy_(normal(B, T) - 9)
        graph.replay()
        expected = step()
        for a, b in zip(captured, expected, strict=True):
            distance = (a.double() - b.double()).norm() / b.double().norm()
            assert distance < (1e-5 if dtype == torch.float32 else 1e-2)
