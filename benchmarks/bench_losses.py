"""Forward and backward of the losses, case by case. Numerics are asserted before anything is timed."""

from functools import partial

import pytest
import torch

from benchmarks.cases import CPU_CASES, GPU_CASES, Batch, Case
from benchmarks.entrants import System
from benchmarks.measure import (
    Gradients,
    Step,
    bare_matmuls,
    differentiate,
    interleave,
    peak_bytes,
    relative_error,
    spread,
)
from benchmarks.report import Result, save
from benchmarks.systems import systems

GPU = torch.cuda.is_available()
CASES = GPU_CASES if GPU else CPU_CASES
ROUNDS = {"seconds": 5, "least": 20, "most": 100} if GPU else {"seconds": 6, "least": 3, "most": 40}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_loss(case: Case, request: pytest.FixtureRequest) -> None:
    """Every system's error, memory and time, kept as JSON and shown at the end."""
    device = torch.device("cuda" if GPU else "cpu")
    batch = case.batch(device)
    here, absent = systems(case)

    wide = batch._replace(hidden=batch.hidden.detach().float(), weight=batch.weight.detach().float())
    truth = differentiate(here[0], wide)
    del wide
    rows: list[Result] = []
    for system in here:
        results: list[Gradients] = []
        peak = peak_bytes(partial(_differentiate_into, results, system, batch), device)
        error = relative_error(results[0], truth)
        rows.append({"system": system.name, "kind": system.kind, "peak_bytes": peak, "error": error})
    _assert_numerics(rows)

    steps: list[Step] = [partial(differentiate, system, batch) for system in here]
    steps.append(bare_matmuls(case, batch))
    rows.append({"system": "matrix products alone", "kind": "matmuls", "peak_bytes": None, "error": None})
    for row, times in zip(rows, interleave(steps, device, **ROUNDS), strict=True):
        row.update(spread(times))
    save(case, rows, absent, device, request.config)


def _differentiate_into(results: list[Gradients], system: System, batch: Batch) -> None:
    results.append(differentiate(system, batch))


def _assert_numerics(rows: list[Result]) -> None:
    """float32: 1e-5 of eager. bfloat16: no further from float32 than the best eager bfloat16 is."""
    bound = min(row["error"] for row in rows if row["kind"] == "eager") if GPU else 1e-5
    for row in rows:
        if row["kind"].startswith(("rlvr_ops", "eager, ")):
            assert row["error"] <= bound, f"{row['system']}: error {row['error']:.2e} is above {bound:.2e}"
