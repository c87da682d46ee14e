"""Time and memory of one system, and the bare matrix products beside it.

Time: the systems take turns, so that a slow minute hits all of them; CUDA events on a GPU. Memory: the most bytes that
the allocator had handed out above what was there before, gradients included; on a CPU from torch.profiler's record of
every allocation, which leaves out the scratch space of the matmul library, on a GPU from torch.cuda's statistics.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.entrants import System

Step = Callable[[], object]
JUDGED = 5


class Computed(NamedTuple):
    """What a system has computed: loss 0-d, logps (B, T), entropy (B, T) or its mean, and the gradients."""

    loss: Tensor | None = None
    logps: Tensor | None = None
    entropy: Tensor | None = None
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None

    @property
    def gradient_bytes(self) -> int:
        """What the returned gradients occupy."""
        return sum(x.nbytes for x in (self.d_hidden, self.d_weight) if x is not None)


def compute(system: System, batch: Batch, case: Case) -> Computed:
    """Everything that the case asks for, once."""
    if case.forward:
        with torch.no_grad():
            return Computed(*system.run(batch))
    hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_(not case.frozen)
    out = system.run(batch._replace(hidden=hidden, weight=weight))
    assert out.loss is not None, system.name
    gradients = torch.autograd.grad(out.loss, (hidden,) if case.frozen else (hidden, weight))
    loss, logps, entropy = (None if x is None else x.detach() for x in out)
    return Computed(loss, logps, entropy, *gradients)


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most that `step` had allocated at one time, above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = step()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def milliseconds(step: Step, device: torch.device) -> float:
    """One run of `step`."""
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


def interleave(
    steps: Sequence[Step], device: torch.device, *, seconds: float, least: int, most: int, slow: float = math.inf
) -> list[list[float]]:
    """Milliseconds of each step, in rounds that begin with another step each time, until `seconds` are over.

    A step that takes over `slow` times as long as the fastest sits out after JUDGED turns, so that it leaves the others more.
    """
    times: list[list[float]] = [[] for _ in steps]
    began, playing = time.perf_counter(), list(range(len(steps)))
    for turn in range(most):
        if turn == min(least, JUDGED):
            typical = [statistics.median(mine) for mine in times]
            playing = [i for i in playing if typical[i] <= slow * min(typical)]
        for i in range(len(playing)):
            which = playing[(turn + i) % len(playing)]
            times[which].append(milliseconds(steps[which], device))
        if turn + 1 >= least and time.perf_counter() - began > seconds:
            break
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, the fastest, and how many."""
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else 9 * times
    found = {"median_ms": statistics.median(times), "p20_ms": cuts[1], "p80_ms": cuts[7], "min_ms": min(times)}
    return found | {"runs": len(times)}


def bare_matmuls(case: Case, batch: Batch) -> Callable[..., None]:
    """The products that the case cannot do without, over the active rows, into memory that is there already: the floor.

    Called with recompute=True it computes the logits twice: the floor of two passes.
    """
    hidden = batch.hidden.detach().flatten(0, 1)[: case.active_rows].contiguous()
    weight = batch.weight.detach()
    logits = torch.empty(case.active_rows, case.vocabulary, dtype=weight.dtype, device=weight.device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step(recompute: bool = False) -> None:
        for _ in range(2 if recompute else 1):
            torch.mm(hidden, weight.T, out=logits)
        if case.products >= 2:
            torch.mm(logits, weight, out=d_hidden)
        if case.products == 3:
            torch.mm(logits.T, hidden, out=d_weight)

    return step
