"""Time, memory and error of one system, and of the bare matrix products beside it.

Time: the systems take turns, so that a slow minute hits all of them; CUDA events on a GPU. Memory: the most bytes that
the allocator had handed out above what was there before, gradients included; on a CPU from torch.profiler's record of
every allocation, which leaves out the scratch space of the matmul library, on a GPU from torch.cuda's statistics.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.entrants import System

Step = Callable[[], object]
Gradients = tuple[Tensor, Tensor, Tensor]


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
    steps: Sequence[Step], device: torch.device, *, seconds: float, least: int, most: int
) -> list[list[float]]:
    """Milliseconds of each step, in rounds that begin with another step each time, until `seconds` are over."""
    times: list[list[float]] = [[] for _ in steps]
    began = time.perf_counter()
    for turn in range(most):
        for i in range(len(steps)):
            which = (turn + i) % len(steps)
            times[which].append(milliseconds(steps[which], device))
        if turn + 1 >= least and time.perf_counter() - began > seconds:
            break
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, the fastest, and how many."""
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else 9 * times
    found = {"median_ms": statistics.median(times), "p20_ms": cuts[1], "p80_ms": cuts[7], "min_ms": min(times)}
    return found | {"runs": len(times)}


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest |got - want| of the losses, and |got - want| / |want| (norms) of the gradients.

    The loss is not divided: advantages are -1, 0 and 1, and the losses of right and wrong rollouts may cancel.
    """
    norm = torch.linalg.vector_norm
    loss = (got[0].float() - want[0].float()).abs()
    return max(
        float(loss),
        *(float(norm(g.float() - w.float()) / norm(w.float())) for g, w in zip(got[1:], want[1:], strict=True)),
    )


def differentiate(system: System, batch: Batch) -> Gradients:
    """The loss and its gradients for hidden states and weight."""
    hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()
    loss = system.loss(batch._replace(hidden=hidden, weight=weight))
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), d_hidden, d_weight


def bare_matmuls(case: Case, batch: Batch) -> Step:
    """The three products of 6NVH over the active rows, into memory that is there already: the floor."""
    hidden = batch.hidden.detach().flatten(0, 1)[: case.active_rows].contiguous()
    weight = batch.weight.detach()
    logits = torch.empty(case.active_rows, case.vocabulary, dtype=weight.dtype, device=weight.device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return step
