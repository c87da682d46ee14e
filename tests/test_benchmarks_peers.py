"""Other libraries are called as they want to be, also those that need a GPU: there with what does the work replaced."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from benchmarks import systems
from benchmarks.cases import Case
from benchmarks.measure import errors, truth
from benchmarks.systems import SYSTEMS, Missing, compute, cuda

CPU = torch.device("cpu")
CASE = Case("grpo", 16, 16, 50, 4)
FORMS = [CASE, replace(CASE, entropy=True), replace(CASE, loss="logps"), replace(CASE, frozen=True)]


PEERS = {system.key: system for system in SYSTEMS}


def is_exact(key, case):
    """Loaded without asking whether this machine has what it needs."""
    batch = case.batch(CPU)
    got = compute(PEERS[key].load(case), batch, case)
    assert (got.entropy is not None) == case.entropy
    return max(errors(got, truth(case, batch), batch, case).values()) < 1e-5


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_trl(case):
    pytest.importorskip("trl")
    assert is_exact("trl", case)


@pytest.mark.parametrize("case", [CASE, replace(CASE, loss="logps")], ids=lambda case: case.name)
def test_pytorchs_chunks(case):
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert is_exact("torch-chunked", case)
    else:
        with pytest.raises(AttributeError, match="LinearCrossEntropyOptions"):
            is_exact("torch-chunked", case)


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_ligers_scaled_cross_entropy_by_what_it_does_on_a_cpu(case, monkeypatch):
    pytest.importorskip("liger_kernel")
    found = systems.import_module
    monkeypatch.setattr(systems, "import_module", lambda name: None if "sm90" in name else found(name))
    assert is_exact("liger-scaled_ce", case)


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_verls_triton_kernels_by_the_same_in_pytorch(case, monkeypatch):
    kernels = pytest.importorskip("verl.utils.kernel.kernels")

    def forward(hidden, weight, ids, reduction, temperature, group):
        assert (reduction, temperature, group, ids.ndim) == (0, 1.0, None, 1)
        log_p = (hidden @ weight.T).log_softmax(-1)
        logps, entropy = log_p.gather(-1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        return logps, entropy, logps, logps, logps

    def backward(d_logps, d_entropy, hidden, weight, ids, *_):
        assert d_logps.is_contiguous()
        assert not d_entropy.any()
        p = (hidden @ weight.T).softmax(-1)
        dz = d_logps[:, None] * (torch.nn.functional.one_hot(ids, len(weight)) - p)
        return dz @ weight, dz.T @ hidden

    monkeypatch.setattr(kernels, "efficient_entropy_forward", forward)
    monkeypatch.setattr(kernels, "efficient_entropy_backward", backward)
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda *_: nullcontext())
    assert is_exact("verl-triton", case)


def test_ligers_loss_leaves_the_precision_of_matmuls_as_it_was():
    pytest.importorskip("liger_kernel")
    before = torch.get_float32_matmul_precision()
    assert is_exact("liger-grpo", CASE)
    assert torch.get_float32_matmul_precision() == before


def test_what_would_take_minutes_on_a_cpu_stays_out_of_the_large_cases(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for key in ("eager-compiled", "torch-chunked"):
        with pytest.raises(Missing, match="slow on a CPU"):
            PEERS[key].enter(Case("ace", 1024, 896, 151936, 8))


def test_a_missing_gpu_or_another_one_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Missing, match="needs a CUDA GPU"):
        cuda(CASE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(Missing, match=r"needs a GPU of compute capability 9\.0"):
        PEERS["liger-scaled_ce"].needs(CASE)
