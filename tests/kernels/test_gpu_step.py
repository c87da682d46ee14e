"""Whole steps as an NVIDIA GPU would take them, without one.

Tensors have no memory: the matmuls check shapes and dtypes, every launch compiles, and what asks for a value raises. Steps go
the way of a capture, which asks for none, or the answers are given: each is a host sync, and they are counted.
"""

import weakref

import pytest
import torch
from rlvr_kernels.tile import Tile, TileShape
from torch.utils._python_dispatch import TorchDispatchMode

import rlvr_ops
from benchmarks.correct import WAITS
from rlvr_ops import rollouts
from tools.compile_table import TARGETS, recorded

B, T, H, V = 4, 16, 64, 1003
ROW = V * 4
TWICE = {"schedule": "two_pass"}
LEFT = "anchor linear_exp combine_exp linear_lse combine_tiles linear_exp"  # the last three look for flagged rows
CASES = {
    "on policy": {},
    "off policy": {"old": True},
    "known confidence": {"old": True, "confidence": "old", "beta": 0.1},
    "several chunks": {"old": True, "confidence": "old", "workspace_bytes": 20 * ROW},
    "entropy": {"entropy_coef": 0.1},
    "a head": {"lm_head_bias": True, "temperature": 0.7, "softcap": 30.0, "beta": 0.1},
    "two passes": TWICE,
    "two passes in pieces": TWICE | {"old": True, "workspace_bytes": 20 * ROW, "entropy_coef": 0.1},
    "frozen": {"frozen": True},
    "frozen, two passes": TWICE | {"frozen": True},
    "masked": {"mask": True, "old": True, "confidence": "old"},
    "packed": {"packed": True, "schedule": "single_pass"},
    "vespo": {"old": True, "surrogate": "vespo", "alpha": 0.0},
    "gspo": {"old": True, "importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.1},
}


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def checked_addmm(total, a, b, *, out, out_dtype=None):
    """What cuBLAS is asked for by torch.addmm, where PyTorch's own function for the meta device takes no out_dtype."""
    assert total is out
    assert a.dtype == b.dtype
    assert out.shape == (a.shape[0], b.shape[1])
    assert a.shape[1] == b.shape[0]
    assert (out_dtype or a.dtype) == out.dtype
    return out


@pytest.fixture
def eager_gpu(monkeypatch):
    """The meta device is taken for CUDA; the launches' names and kernels."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):  # pytorch/pytorch#163880
        monkeypatch.setattr(torch, "addmm", checked_addmm)
    monkeypatch.setattr("rlvr_kernels.tile.widens", lambda device, dtype: dtype.itemsize == 2)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr("rlvr_kernels.checks._check_data", lambda name: None)
    with recorded(TARGETS["sm_90"]) as launches:
        yield launches


@pytest.fixture
def gpu(eager_gpu):
    with rlvr_ops.cuda_graph_warmup():
        yield eager_gpu


@pytest.fixture
def syncs(eager_gpu, monkeypatch):
    """The questions that were asked: how many rows count, which have a gradient, which coefficients are 0."""
    asked = []

    def count_rows(cu_seqlens, scored, alive):
        if cu_seqlens.is_cpu:
            return rollouts.count_rows(cu_seqlens, scored, alive)
        asked.append("count")
        return rollouts.Counts((T, T, 0, T // 2), 2 * T + T // 2, read=True)

    def rows_of(which, count=None):
        if count is not None or which is None:
            return rollouts.rows_of(which, count)
        asked.append("rows")
        return meta(2 * T, dtype=torch.int64) if which.shape[0] == B * T else None

    def rows_to_keep(coef, weight, products):
        asked.append("zeros")
        return meta(T, dtype=torch.int64), 3

    for module in ("head.plan", "head.token_logps", "losses.policy_loss"):
        monkeypatch.setattr(f"rlvr_ops.{module}.count_rows", count_rows)
    for module in ("head.pull_back", "head.token_logps", "losses.policy_loss"):
        monkeypatch.setattr(f"rlvr_ops.{module}.rows_of", rows_of)
    monkeypatch.setattr("rlvr_kernels.single_pass._rows_to_keep", rows_to_keep)
    return asked


ON_HOST = {"host": True, "mask": True}
QUESTIONS = {
    "zero advantages": ({}, ["count"], []),
    "a mask": ({"mask": True}, ["count"], []),
    "a mask, off policy": ({"mask": True, "old": True}, ["count"], []),
    "every row counts": ({"beta": 0.1}, [], []),
    "every row counts, off policy": ({"beta": 0.1, "old": True}, ["zeros"], []),
    "a mask on the host": (ON_HOST, [], []),
    "a mask on the host, off policy": (ON_HOST | {"old": True}, ["zeros"], []),
    "a mask on the host, in chunks": (ON_HOST | {"workspace_bytes": 40 * V}, [], []),
    "a mask, in chunks": ({"mask": True, "workspace_bytes": 40 * V}, ["count"], []),
    "boundaries on the host": ({"host": True, "packed": True}, [], []),
    "boundaries": ({"packed": True}, ["count"], []),
    "inactive rows are scored": ({"score_inactive": True}, ["count"], []),
    "inactive rows are scored, off policy": ({"score_inactive": True, "old": True}, ["count"], []),
    "every row counts, in chunks": ({"beta": 0.1, "workspace_bytes": 40 * V}, [], []),
    "every row counts, and a rollout is too long to fit": ({"beta": 0.1, "workspace_bytes": 4 * V}, [], ["rows"]),
    "a sampling correction": (ON_HOST | {"old": True, "sampling_correction": "token_mask"}, ["count"], []),
    "two passes": (TWICE | {"mask": True}, ["count"], ["rows"]),
    "two passes, a mask on the host": (TWICE | ON_HOST, [], ["rows"]),
    "two passes, too long to fit": ({"mask": True, "workspace_bytes": 4 * V}, ["count"], ["rows"]),
}


@pytest.mark.compile
@pytest.mark.parametrize(("case", "forward", "backward"), QUESTIONS.values(), ids=QUESTIONS)
def test_an_accelerator_is_asked_once_and_not_at_all_where_the_host_knows(case, forward, backward, syncs):
    loss = step(torch.bfloat16, case, backward=False)
    assert syncs == forward
    syncs.clear()
    loss.backward()
    assert syncs == backward


@pytest.mark.compile
@pytest.mark.parametrize(("given", "forward", "backward"), WAITS.values(), ids=WAITS)
def test_what_may_wait_on_a_gpu_is_what_asks_here(given, forward, backward, syncs):
    case = {name: value for name, value in given.items() if name != "zeros"}
    loss = step(torch.bfloat16, case | ({} if {"mask", "zeros"} & given.keys() else {"beta": 0.1}), backward=False)
    assert len(syncs) == forward
    syncs.clear()
    loss.backward()
    assert len(syncs) == backward


@pytest.mark.compile
@pytest.mark.parametrize(("mask", "questions"), [(None, []), ("host", []), ("meta", ["rows"])])
def test_scoring_asks_once_at_most(mask, questions, syncs):
    mask = None if mask is None else torch.ones(B, T) if mask == "host" else meta(B, T)
    hidden, weight = meta(B, T, H, dtype=torch.bfloat16), meta(V, H, dtype=torch.bfloat16)
    with torch.no_grad():
        rlvr_ops.token_logps(hidden, weight, meta(B, T, dtype=torch.int64), completion_mask=mask)
    assert syncs == questions


def step(dtype, case, backward=True):
    given = dict(case)
    host = given.pop("host", False)
    hidden, weight = meta(B, T, H, dtype=dtype).requires_grad_(), meta(V, H, dtype=dtype)
    weight.requires_grad_(not given.pop("frozen", False))
    ids, ref = meta(B, T, dtype=torch.int64), meta(B, T)
    given["old_per_token_logps"] = ref if given.pop("old", False) else None
    if given.pop("mask", False):
        given["completion_mask"] = torch.arange(T).expand(B, T) < 9 if host else meta(B, T, dtype=torch.bool)
    if given.get("sampling_correction"):
        given["sampling_per_token_logps"] = ref
    if given.get("lm_head_bias"):
        given["lm_head_bias"] = meta(V, dtype=dtype).requires_grad_()
    if given.pop("packed", False):
        hidden, ids, ref = meta(B * T, H, dtype=dtype).requires_grad_(), ids.flatten(), ref.flatten()
        given["cu_seqlens"] = torch.arange(B + 1) * T if host else meta(B + 1, dtype=torch.int64)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0]) if host else meta(B)
    out = rlvr_ops.ace_loss(hidden, weight, ids, advantages, ref_per_token_logps=ref, **given)
    if not backward:
        return out.loss
    out.loss.backward()
    return [x for x in (hidden, weight, given.get("lm_head_bias")) if x is not None and x.requires_grad]


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_compiles_whole_and_its_products_get_what_they_take(dtype, case, gpu):
    for leaf in step(dtype, case):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
    names = {name.removesuffix("_kernel") for name, _ in gpu}
    if dtype == torch.bfloat16:
        assert names >= {"linear_exp", "weigh"}
        assert "lse_fold" not in names
        assert "dlogits" not in names or case.get("entropy_coef")
    else:
        assert names >= {"weigh", "dlogits"}
        assert "linear_exp" not in names


@pytest.mark.compile
@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ({}, f"{LEFT} weigh scale scale"),
        ({"old": True}, f"{LEFT} weigh scale scale"),
        ({"schedule": "two_pass"}, "linear_lse combine_tiles weigh linear_exp"),
    ],
    ids=["on policy", "off policy", "two passes"],
)
def test_the_launches_of_a_step(case, kernels, gpu):
    step(torch.bfloat16, case)
    assert [name.removesuffix("_kernel") for name, _ in gpu] == kernels.split()


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.usefixtures("gpu")
def test_rows_of_an_odd_vocabulary_begin_where_matmuls_copy_in_bulk(dtype):
    """At multiples of 128 bytes: without that, cuBLAS takes products that copy one element at a time."""
    tile = Tile(TileShape(5, V), dtype, torch.device("meta"))
    held, gradient = tile.part(5, V), tile.gradient(5, V)
    assert held.shape == gradient.shape == (5, V)
    assert {x.stride(0) * x.element_size() for x in (held, gradient)} == {1024 * (2 if dtype == torch.bfloat16 else 4)}


@pytest.mark.compile
def test_scoring_without_a_gradient_is_one_kernel_and_its_reduction(gpu):
    hidden, weight = meta(B * T, H, dtype=torch.bfloat16), meta(V, H, dtype=torch.bfloat16)
    with torch.no_grad():
        rlvr_ops.token_logps(hidden, weight, meta(B * T, dtype=torch.int64))
    assert [name for name, _ in gpu] == ["linear_lse_kernel", "combine_tiles_kernel"]


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, other than those that were there before, and remembers the most."""

    def __init__(self, *known):
        super().__init__()
        self.live, self.peak, self.largest = {x.untyped_storage()._cdata: [None, 0] for x in known}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return found

    def add(self, tensor):
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        entry = self.live.setdefault(key, [0, size])
        if entry[0] is not None:
            entry[0] += 1
            weakref.finalize(tensor, self.drop, key)
        self.largest = max(self.largest, entry[1])
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))

    def drop(self, key):
        self.live[key][0] -= 1
        if not self.live[key][0]:
            del self.live[key]


@pytest.mark.compile
@pytest.mark.usefixtures("syncs")
@pytest.mark.parametrize(("schedule", "workspace"), [("single_pass", 2.2e9), ("two_pass", 0.5e9)])
def test_what_a_large_step_holds_beside_its_gradients(schedule, workspace):
    """(8192, 4096, 131072) in bfloat16. Nothing of the size of the logits exists in float32, and in two passes nothing at all."""
    n, h, v = 8192, 4096, 131072
    hidden, weight = (meta(*shape, dtype=torch.bfloat16).requires_grad_() for shape in ((16, n // 16, h), (v, h)))
    ids, ref, advantages = meta(16, n // 16, dtype=torch.int64), meta(16, n // 16), meta(16)
    with Memory(hidden, weight, ids, ref, advantages) as memory:
        out = rlvr_ops.ace_loss(hidden, weight, ids, advantages, ref_per_token_logps=ref, beta=0.1, schedule=schedule)
        out.loss.backward()
        gradients = hidden.grad.nbytes + weight.grad.nbytes
    assert memory.peak - gradients <= workspace
    assert memory.largest <= (2 * n * v if schedule == "single_pass" else gradients)
