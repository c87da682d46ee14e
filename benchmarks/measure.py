"""A case, measured: every system's numbers and memory, then the times of all, taken in turns.

Time: the systems take turns, so that a slow minute hits all of them; CUDA events on a GPU. Memory: the most bytes that
the allocator had handed out above what was there before, gradients included; on a CPU from torch.profiler's record of
every allocation, which leaves out the scratch space of the matmul library. Numbers: against eager PyTorch in float64.
"""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Batch, Case
from benchmarks.systems import NEEDED, Missing, Outputs, Run, compute, eager, reason, systems

FLOAT32_NOISE = 1e-5  # below it two float32 results differ by the order of their operations alone
ROUNDING = 2.0**-9  # of a number in bfloat16, relative
TIE = 1.05  # two systems that round as often, but not the same numbers, differ by less (docs/kernels.md, numerics)
NOT_COMPARABLE = {"float32": 1e-3, "bfloat16": 0.25}  # beyond it a system computes something else
Step = Callable[[], object]
Row = dict[str, Any]


class Measured(NamedTuple):
    """By the systems' keys: their rows, who is absent and why, and milliseconds."""

    rows: dict[str, Row]
    absent: dict[str, Row]
    times: dict[str, list[float]]


class DeviceLostError(RuntimeError):
    """What this names, a system or a case, has left the device in a state in which nothing runs any more."""


def truth(case: Case, batch: Batch) -> Outputs:
    """Eager in float64, a rollout at a time, so that the logits of all never exist together; entropy is the mean."""
    case, parts, d_weight = replace(case, entropy=True), [], None
    wide = Batch(*(x.double() if x.is_floating_point() else x for x in batch))
    for b in range(case.rollouts):
        *found, last = compute(eager(case), Batch(*(x if x is wide.weight else x[b : b + 1] for x in wide)), case)
        parts.append(found)
        d_weight = last if d_weight is None or last is None else d_weight.add_(last)
    loss, logps, entropy, d_hidden = ([x for x in each if x is not None] for each in zip(*parts, strict=True))
    if case.forward:
        return Outputs(None, torch.cat(logps), torch.cat(entropy).mean())
    gradients = torch.cat(d_hidden) / case.rollouts, None if d_weight is None else d_weight.div_(case.rollouts)
    return Outputs(torch.stack(loss).mean(), torch.cat(logps), torch.cat(entropy).mean(), *gradients)


def errors(got: Outputs, want: Outputs, batch: Batch, case: Case) -> dict[str, float]:
    """Distances from the truth. logps: root mean square in nats, over the rows that have a gradient. Gradients: norms,
    |got - want| / |want|. loss, entropy: absolute, because losses of right and wrong rollouts may cancel.
    """
    found: dict[str, float] = {}
    for name, mine, true in zip(Outputs._fields, got, want, strict=True):
        if mine is not None and true is not None:
            off = (mine.double().mean() if name == "entropy" else mine.double()) - true
            off = off[batch.advantages != 0] if name == "logps" and not case.forward else off
            found[name] = float(off.norm() / (true.norm() if name.startswith("d_") else off.numel() ** 0.5))
    return found


def too_far(mine: dict[str, float], eager: list[dict[str, float]], *, wide: bool) -> str | None:
    """What of ours is further from the truth than the best eager form of the same dtype, in words; None if nothing is.

    Loss and entropy are single numbers, whose rounding may cancel by chance: they have eager's error in the
    log-probabilities as a bound, too. Unless the products are `wide`, written in float32, what a gradient sums up of
    several of them is rounded once more (bfloat16 on a CPU).
    """
    for name, error in mine.items():
        alike = (name, "logps") if name in ("loss", "entropy") else (name,)
        bounds = [max(other[n] for n in alike if n in other) for other in eager if name in other]
        bound = max(FLOAT32_NOISE, TIE * min(bounds, default=math.inf))
        if not wide and name in ("d_hidden", "d_weight"):
            bound = math.hypot(bound, ROUNDING)
        if not error <= bound:
            return f"{name} is {error:.2e} from the truth, the best eager form {bound:.2e}"
    return None


def wrong(found: Measured) -> list[str]:
    """Which systems of ours have failed or are too far off, and why."""
    failed = [f"{one['name']}: {one['reason']}" for key, one in found.absent.items() if key.startswith("rlvr_ops")]
    return failed + [row["wrong"] for row in found.rows.values() if "wrong" in row]


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most that `step` had allocated at one time, above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    found: Any = seen.profiler
    events = sorted(found.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))


def milliseconds(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


def interleave(steps: list[Step], device: torch.device, *, seconds: float, least: int, most: int) -> list[list[float]]:
    """Milliseconds of each step, in rounds that begin with another step each time, until `seconds` are over."""
    times: list[list[float]] = [[] for _ in steps]
    began = time.perf_counter()
    for turn in range(most):
        for which in (i % len(steps) for i in range(turn, turn + len(steps))):
            times[which].append(milliseconds(steps[which], device))
        if turn + 1 >= least and time.perf_counter() - began > seconds:
            break
    return times


def rounds(device: torch.device, *, quick: bool = False) -> dict[str, Any]:
    """How often: seconds of turns at the least, the least and the most turns."""
    if device.type == "cuda":
        return {"seconds": 1 if quick else 5, "least": 20, "most": 100}
    return {"seconds": 1 if quick else 20, "least": 3 if quick else 5, "most": 40}


def spread(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, the fastest, and how many."""
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else 9 * times
    found = {"median_ms": statistics.median(times), "p20_ms": cuts[1], "p80_ms": cuts[7], "min_ms": min(times)}
    return found | {"runs": len(times)}


def bare_matmuls(case: Case, batch: Batch) -> Step:
    """The products that a case cannot do without, of the active rows, into memory that is there already: the floor."""
    hidden, weight = batch.hidden.detach().flatten(0, 1)[: case.active_rows].contiguous(), batch.weight.detach()
    logits = hidden.new_empty(case.active_rows, case.vocabulary)
    products = [partial(torch.mm, hidden, weight.T, out=logits)]
    products += [partial(torch.mm, logits, weight, out=torch.empty_like(hidden))] * (case.products >= 2)
    products += [partial(torch.mm, logits.T, hidden, out=torch.empty_like(weight))] * (case.products == 3)
    return lambda: [product() for product in products]


def measure(case: Case, device: torch.device, keys: Collection[str] | None = None, **turns: Any) -> Measured:
    """The systems among `keys` (None: all) and those that every case needs; DeviceLostError if one breaks the device.

    A system of ours that is further from the truth than eager says so in its row, under "wrong". Who cannot take part,
    fails in the first call or computes something else is absent, and not timed.
    """
    batch = case.batch(device)
    bare, want = bare_matmuls(case, batch), truth(case, batch)  # who fits beside them also does so when timed
    found, steps = Measured({}, {}, {}), {}
    for system in systems(case):
        if keys is not None and system.key not in {*keys, *NEEDED}:
            continue
        try:
            run = system.enter(case)
            numbers = {} if system.kind == "products" else _first_call(run, batch, case, want)
        except Exception as error:  # not installed, out of memory, or a kernel that does not know this GPU
            found.absent[system.key] = {"key": system.key, "name": system.title, "reason": reason(error)}
            if check(device):
                raise DeviceLostError(case.name if system.key in NEEDED else system.key) from error
            continue
        others = [other["errors"] for other in found.rows.values() if other["kind"] == "eager"]
        wide = case.dtype == "float32" or device.type == "cuda"
        if system.kind == "ours" and (off := too_far(numbers["errors"], others, wide=wide)):
            numbers["wrong"] = f"{system.name}: {off}"
        found.rows[system.key] = {"key": system.key, "system": system.title, "kind": system.kind} | numbers
        steps[system.key] = bare if system.kind == "products" else partial(compute, run, batch, case)
    release(device)
    found.times.update(zip(steps, interleave([*steps.values()], device, **turns), strict=True))
    for key, row in found.rows.items():
        row |= spread(found.times[key])
    best = min((row["median_ms"] for row in found.rows.values() if row["kind"] == "eager"), default=None)
    for row in found.rows.values():
        row["tflops"] = 1e-9 * case.flops / row["median_ms"]
        row["share_of_products"] = found.rows["products"]["median_ms"] / row["median_ms"]
        row["ratio_to_eager"] = None if best is None else row["median_ms"] / best
    return found


def _first_call(run: Run, batch: Batch, case: Case, want: Outputs) -> Row:
    """Errors, and peak memory above the inputs and above the inputs and the returned gradients."""
    got: list[Outputs] = []
    device = batch.hidden.device
    release(device)
    if device.type == "cuda":
        compute(run, batch, case)  # what a compiler or a tuner allocates once is not the system's
    peak = peak_bytes(lambda: got.append(compute(run, batch, case)), device)
    found = errors(got[0], want, batch, case)
    if not all(error <= NOT_COMPARABLE[case.dtype] for error in found.values()):  # nor is NaN
        raise Missing(f"computes something else here: errors {found}")
    gradients = sum(x.nbytes for x in (got[0].d_hidden, got[0].d_weight) if x is not None)
    return {"peak_bytes": peak, "workspace_bytes": max(0, peak - gradients), "errors": found}


def release(device: torch.device) -> None:
    """Give back what the systems before have left, also what an error's traceback held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def check(device: torch.device) -> str | None:
    """Why nothing runs on the device any more, if so: an illegal access, unlike lack of memory, fails every call."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return reason(error)
    return None
