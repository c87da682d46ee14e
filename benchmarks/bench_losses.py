"""Forward and backward of the losses, case by case, under pytest."""

import pytest
import torch

from benchmarks.cases import CPU_CASES, GPU_CASES, Case
from benchmarks.report import SAVED, save
from benchmarks.run import measure

GPU = torch.cuda.is_available()
CASES = GPU_CASES if GPU else CPU_CASES


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_loss(case: Case, request: pytest.FixtureRequest) -> None:
    """Every system's error, memory and time, kept as JSON and shown at the end."""
    device = torch.device("cuda" if GPU else "cpu")
    rows, absent = measure(case, device)
    command = " ".join(["pytest", *request.config.invocation_params.args])
    request.config.stash.setdefault(SAVED, []).append(save(case, rows, absent, device, command))
