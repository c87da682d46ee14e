"""While a CUDA graph is captured no row may be looked for on the host: the same numbers, from all rows."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from loss_cases import policy_loss
from rlvr_kernels.backend import capturing
from torch.utils._python_dispatch import TorchDispatchMode

import rlvr_ops

B, T, H, V = 6, 10, 8, 37
ROOM = B * T * V * 8
CASES = {
    "on policy": {"old": False},
    "off policy": {},
    "known confidence": {"confidence": "old"},
    "entropy": {"entropy_coef": 0.1},
    "divergence": {"beta": 0.1, "with_entropy": True},
    "sequence ratio": {"importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.1},
    "token mean": {"loss_type": "dapo", "alpha": 0.0},
    "several chunks": {"confidence": "old", "beta": 0.1, "workspace_bytes": ROOM // 4},
    "temperature and bias": {"temperature": True, "lm_head_bias": True, "beta": 0.1, "confidence": "old"},
    "top entropy": {"top_entropy_quantile": 0.5, "schedule": "two_pass"},
}


@pytest.fixture
def capture():
    with ExitStack() as stack:
        yield lambda: stack.enter_context(rlvr_ops.cuda_graph_warmup())


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device, outside of the interpreted kernels."""

    WAITS = ("nonzero", "_local_scalar_dense", "masked_select", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.WAITS, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def make_batch(poison):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=g)
    mask = torch.arange(T).expand(B, T) < torch.tensor([10, 7, 3, 10, 0, 8])[:, None]
    ids = torch.randint(V, (B, T), generator=g).masked_fill(~mask, -100)
    old, ref = (-3 - torch.rand(B, T, generator=g) for _ in range(2))
    advantages = torch.tensor([1.0, -1.0, -0.5, 0.0, 1.0, -2.0])
    if poison:
        hidden, old, ref = (
            torch.where(mask.view(B, T, *[1] * (x.ndim - 2)), x, float("nan")) for x in (hidden, old, ref)
        )
    weight = torch.randn(V, H, generator=g)
    return hidden, weight, ids, advantages, {"completion_mask": mask, "old": old, "ref_per_token_logps": ref}


def step(batch, packed=False, backend="torch", **keywords):
    hidden, weight, ids, advantages, given = batch
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    given = dict(given)
    old = given.pop("old")
    given["old_per_token_logps"] = old if keywords.pop("old", True) else None
    if keywords.get("temperature"):  # what is masked may hold anything
        keywords["temperature"] = torch.where(given["completion_mask"], 0.7, float("nan"))
    if keywords.get("lm_head_bias"):
        keywords["lm_head_bias"] = torch.linspace(-1, 1, V).index_fill(0, torch.tensor([0]), -float("inf"))
        ids = ids.where(ids != 0, 1)  # token 0, which masked rows are given, is impossible
    states = hidden
    if packed:
        states, ids = hidden.flatten(0, 1), ids.flatten()
        given = {name: None if x is None else x.flatten() for name, x in given.items()}
        given["cu_seqlens"] = torch.arange(B + 1) * T
        if keywords.get("temperature") is not None:
            keywords["temperature"] = keywords["temperature"].flatten()
    out = policy_loss(
        states, weight, ids, advantages, backend=backend, **{"alpha": 1.0, "workspace_bytes": ROOM, **given, **keywords}
    )
    (2 * out.loss).backward()
    return out.loss.detach(), out.metrics, out.per_token_logps, hidden.grad, weight.grad


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
@pytest.mark.parametrize("case", CASES)
def test_a_captured_loss_is_the_loss(case, schedule, packed, capture):
    keywords = {"schedule": schedule, **CASES[case]}
    expected = step(make_batch(poison=True), packed, **keywords)
    capture()
    found = step(make_batch(poison=True), packed, **keywords)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.interpret
@pytest.mark.parametrize("schedule", ["single_pass", "two_pass", "auto"])
@pytest.mark.parametrize("case", [name for name in CASES if "temperature" not in CASES[name]])  # which a CPU looks at
def test_a_captured_step_never_waits_for_the_device(case, schedule, capture, monkeypatch):
    monkeypatch.setattr("rlvr_ops.losses.policy_loss.check_vocabulary", lambda *_: None)  # not called on an accelerator
    keywords = {"schedule": schedule, **CASES[case]}
    expected = step(make_batch(poison=True), **keywords)
    capture()
    with NoWaiting():
        found = step(make_batch(poison=True), backend="triton", **keywords)
    torch.testing.assert_close(found[3:], expected[3:], rtol=1e-4, atol=1e-5)


def test_whole_rollouts_of_a_batch_that_needs_several_chunks_take_two_passes(capture):
    """Where a chunk must end could only be read from the device."""
    capture()
    _, metrics, *_ = step(make_batch(poison=False), workspace_bytes=ROOM // 4)
    assert metrics["head/single_pass"] == 0


def test_a_step_that_was_compiled_for_chunks_is_refused_when_it_is_captured(monkeypatch):
    """The choice was made while nothing was captured: pieces of rollouts would be weighed as if they were whole."""
    monkeypatch.setattr("rlvr_ops.losses.policy_loss.rows_of", lambda *_: None)
    for module in ("rlvr_ops.losses.policy_loss", "rlvr_kernels.single_pass"):
        monkeypatch.setattr(f"{module}.capturing", lambda: True)
    with pytest.raises(ValueError, match="schedule='two_pass'"):
        step(make_batch(poison=False), workspace_bytes=ROOM // 4, schedule="single_pass")


def test_a_warm_up_holds_in_every_thread_and_until_the_outermost_ends():
    with ThreadPoolExecutor(1) as other:  # as backward's
        with rlvr_ops.cuda_graph_warmup():
            with pytest.raises(RuntimeError, match="inner"), rlvr_ops.cuda_graph_warmup():
                raise RuntimeError("inner")
            assert capturing()
            assert other.submit(capturing).result()
        assert not capturing()
        assert not other.submit(capturing).result()


def test_a_batch_that_does_not_fit_one_chunk_of_a_graph_is_refused_with_what_it_would_take():
    hidden, weight, ids, advantages, given = make_batch(poison=False)
    given |= {"old_per_token_logps": None, "schedule": "single_pass"}
    call = {name: value for name, value in given.items() if name != "old"}
    rlvr_ops.ace_loss(hidden, weight, ids, advantages, workspace_bytes=ROOM // 4, **call)  # half of the batch
    refused = (
        rf"all rows in one chunk in a CUDA graph.*but the batch has {B * T}: give workspace_bytes >= {B * T * V * 4}"
    )
    with rlvr_ops.cuda_graph_warmup(), pytest.raises(ValueError, match=refused):
        rlvr_ops.ace_loss(hidden, weight, ids, advantages, workspace_bytes=ROOM // 4, **call)
