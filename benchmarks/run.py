"""One case, measured: every system's error and memory, then the times of all, taken in turns."""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Batch, Case
from benchmarks.entrants import Absent, System
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
from benchmarks.report import Result
from benchmarks.systems import systems


def rounds(device: torch.device) -> dict[str, Any]:
    """How often: seconds of turns at the least, and the least and the most turns."""
    if device.type == "cuda":
        return {"seconds": 5, "least": 20, "most": 100}
    return {"seconds": 6, "least": 3, "most": 40}


def measure(case: Case, device: torch.device, **turns: Any) -> tuple[list[Result], list[Absent]]:
    """A row per system and one of the bare matrix products, and who is missing. Numerics are asserted before anything is timed.

    Raises:
        AssertionError: a system's gradients are further from the truth than eager's.
    """
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
    _assert_numerics(rows, device)

    steps: list[Step] = [partial(differentiate, system, batch) for system in here]
    steps.append(bare_matmuls(case, batch))
    rows.append({"system": "matrix products alone", "kind": "matmuls", "peak_bytes": None, "error": None})
    for row, times in zip(rows, interleave(steps, device, **(turns or rounds(device))), strict=True):
        row.update(spread(times))
    return rows, absent


def _differentiate_into(results: list[Gradients], system: System, batch: Batch) -> None:
    results.append(differentiate(system, batch))


def _assert_numerics(rows: list[Result], device: torch.device) -> None:
    """float32: 1e-5 of eager. bfloat16: no further from float32 than the best eager bfloat16 is."""
    bound = min(row["error"] for row in rows if row["kind"] == "eager") if device.type == "cuda" else 1e-5
    for row in rows:
        if row["kind"].startswith(("rlvr_ops", "eager, ")):
            assert row["error"] <= bound, f"{row['system']}: error {row['error']:.2e} is above {bound:.2e}"
