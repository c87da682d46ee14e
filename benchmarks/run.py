"""One case, measured: every system's numbers and memory, then the times of all, taken in turns."""

import gc
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from rlvr_kernels.tile import widens

from benchmarks.cases import Batch, Case
from benchmarks.entrants import Absent, Entry, System, reason
from benchmarks.measure import Computed, Step, bare_matmuls, compute, interleave, peak_bytes, spread
from benchmarks.systems import NEEDED, entries
from benchmarks.truth import Truth, assert_ours, errors, is_comparable, truth

Row = dict[str, Any]
SLOW = 10.0  # times the fastest: nothing that a target speaks of


class DeviceLostError(RuntimeError):
    """A system has left the device in a state in which nothing runs any more; `key` says which."""

    def __init__(self, key: str, why: str):
        super().__init__(f"{key} ended the device's context: {why}")
        self.key = key


def rounds(device: torch.device, *, quick: bool = False) -> dict[str, Any]:
    """How often: seconds of turns at the least, the least and the most turns, and from when on a slow system has only a few."""
    if device.type == "cuda":
        return {"seconds": 1 if quick else 5, "least": 20, "most": 100, "slow": SLOW}
    return {"seconds": 1 if quick else 20, "least": 3 if quick else 5, "most": 40, "slow": SLOW}


def measure(
    case: Case, device: torch.device, keys: Collection[str] | None = None, *, strict: bool = True, **turns: Any
) -> tuple[list[Row], list[Absent], dict[str, list[float]]]:
    """A row for each system among `keys` (None: all), who is missing, and each system's times in milliseconds.

    Numerics are asserted before anything is timed. Without `strict` rlvr_ops may be further off than eager, which its row then
    says, or be absent because it failed, so that a rare machine's times are not lost over it.

    Raises:
        AssertionError: rlvr_ops is further from the truth than eager, or computes something else.
        DeviceLostError: a system has broken the device for all.
    """
    chosen = [entry for entry in entries(case) if keys is None or entry.key in {*keys, *NEEDED}]
    batch = case.batch(device)
    systems, absent = _enter(chosen, case)
    bare = bare_matmuls(case, batch)  # its memory is taken now, so that whoever fits beside it also does so when timed
    rows, failed = _numbers(systems, batch, case, device, strict)
    steps = [_step(system, batch, case, bare) for system in systems if system.key in rows]
    if device.type == "cuda":
        interleave(steps, device, seconds=0, least=2, most=2)  # warm up
    times = dict(zip(rows, interleave(steps, device, **(turns or rounds(device))), strict=True))
    for key, row in rows.items():
        row |= spread(times[key])
    return _compared(list(rows.values()), case), absent + failed, times


def _enter(chosen: list[Entry], case: Case) -> tuple[list[System], list[Absent]]:
    entered = [entry.enter(case) for entry in chosen]
    return [s for s in entered if isinstance(s, System)], [s for s in entered if isinstance(s, Absent)]


def _step(system: System, batch: Batch, case: Case, bare: Callable[..., None]) -> Step:
    if system.kind == "products":
        return partial(bare, recompute=system.key == "products-8NVH")
    return partial(compute, system, batch, case)


def _numbers(
    systems: list[System], batch: Batch, case: Case, device: torch.device, strict: bool
) -> tuple[dict[str, Row], list[Absent]]:
    """Errors and memory of each; whoever fails in its first call, or computes something else, is not timed."""
    rows: dict[str, Row] = {}
    failed: list[Absent] = []
    want = truth(case, batch)
    for system in systems:
        row: Row = {"key": system.key, "system": system.name, "kind": system.kind}
        if system.kind == "products":
            rows[system.key] = row
            continue
        _release(device)
        try:
            found, memory = _once(system, batch, case, device, want)
        except Exception as error:  # out of memory, or a kernel that does not know this GPU
            if system.kind == "ours" and strict:
                raise
            failed.append(Absent(system.key, system.name, reason(error), failed=True))
            _check_device(device, system.key)
            continue
        if system.kind == "ours":
            row |= _judged(system, found, rows, case, device, strict)
        if is_comparable(found, case):
            rows[system.key] = row | memory | {"errors": found}
        else:
            assert system.kind != "ours" or not strict, f"{system.name} computes something else: {found}"
            failed.append(Absent(system.key, system.name, f"computes something else here: errors {found}", failed=True))
    _release(device)
    return rows, failed


def _judged(
    system: System, found: dict[str, float], rows: dict[str, Row], case: Case, device: torch.device, strict: bool
) -> Row:
    """Nothing, or what is wrong with our numbers.

    Raises:
        AssertionError: something is, and `strict`.
    """
    eager, dtype = [r["errors"] for r in rows.values() if r["kind"] == "eager"], getattr(torch, case.dtype)
    try:
        assert_ours(system, found, eager, wide=dtype == torch.float32 or widens(device, dtype))
    except AssertionError as error:
        if strict:
            raise
        return {"wrong": str(error)}
    return {}


def _release(device: torch.device) -> None:
    """Give back what the systems before have left, also what an error's traceback held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _check_device(device: torch.device, key: str) -> None:
    """After a failure: an illegal access, unlike a lack of memory, fails every later call as well.

    Raises:
        DeviceLostError: it does.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLostError(key, reason(error)) from error


def _once(
    system: System, batch: Batch, case: Case, device: torch.device, want: Truth
) -> tuple[dict[str, float], dict[str, int]]:
    """Its errors, and its peak memory above the inputs and above the inputs and the returned gradients."""
    got: list[Computed] = []
    if device.type == "cuda":
        compute(system, batch, case)  # what a compiler or a tuner allocates once is not the system's
    peak = peak_bytes(lambda: got.append(compute(system, batch, case)), device)
    memory = {"peak_bytes": peak, "workspace_bytes": max(0, peak - got[0].gradient_bytes)}
    return errors(got[0], want, batch, case, system.kind), memory


def _compared(rows: list[Row], case: Case) -> list[Row]:
    """The rows with their rate and their ratios, to the bare products and to the faster eager form of the same run."""
    products = next(row["median_ms"] for row in rows if row["key"] == "products")
    eager = min((row["median_ms"] for row in rows if row["kind"] == "eager"), default=None)
    for row in rows:
        row["tflops"] = 1e-9 * case.flops / row["median_ms"]
        row["share_of_products"] = products / row["median_ms"]
        row["ratio_to_eager"] = None if eager is None else row["median_ms"] / eager
    return rows
