"""Whole steps as an NVIDIA GPU would take them in a CUDA graph, without one.

Tensors that have no memory go the way of a capture, which reads nothing on the host; the matmuls check shapes and dtypes, and
every launch compiles. The branches in which rows leave the batch need values; test_workspace.py has those.
"""

import pytest
import torch
from rlvr_kernels.tile import Tile, TileShape

import rlvr_ops
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


@pytest.fixture
def gpu(monkeypatch):
    """The meta device is taken for CUDA; the launches' names and kernels."""
    monkeypatch.setattr("rlvr_kernels.tile.widens", lambda device, dtype: dtype.itemsize == 2)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr("rlvr_kernels.checks._check_data", lambda name: None)
    with rlvr_ops.cuda_graph_warmup(), recorded(TARGETS["sm_90"]) as launches:
        yield launches


def step(dtype, case):
    given = dict(case)
    hidden, weight = meta(B, T, H, dtype=dtype).requires_grad_(), meta(V, H, dtype=dtype)
    weight.requires_grad_(not given.pop("frozen", False))
    ids, ref = meta(B, T, dtype=torch.int64), meta(B, T)
    given["old_per_token_logps"] = ref if given.pop("old", False) else None
    if given.pop("mask", False):
        given["completion_mask"] = meta(B, T, dtype=torch.bool)
    if given.get("lm_head_bias"):
        given["lm_head_bias"] = meta(V, dtype=dtype).requires_grad_()
    if given.pop("packed", False):
        hidden, ids, ref = meta(B * T, H, dtype=dtype).requires_grad_(), ids.flatten(), ref.flatten()
        given["cu_seqlens"] = meta(B + 1, dtype=torch.int64)
    out = rlvr_ops.ace_loss(hidden, weight, ids, meta(B), ref_per_token_logps=ref, **given)
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
