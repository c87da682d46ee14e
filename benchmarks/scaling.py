"""How time and memory grow with rows, vocabulary, hidden size and ranks, and how well the cost model foresees it.

python -m benchmarks.scaling [--device cpu] [--seconds 20] [--shape N H V] [--out DIR]

writes DIR/scaling.json, by default under benchmarks/results/<device>/. A sweep varies one size around the base in five
points, which take turns. The model's rates are fitted from the bare matrix products and a copy of the same run, and from
nothing else. The sweep over ranks times one rank's slice of the vocabulary (benchmarks/shards.py), without communication.
"""

import argparse
import math
import os
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rlvr_kernels.cost import Problem, Rates, single_pass, single_pass_workspace, two_pass
from rlvr_kernels.tile import bytes_per_logit, default_workspace_bytes, whole_row_tile

from benchmarks.cases import Batch, Case
from benchmarks.measure import Step, bare_matmuls, interleave, milliseconds, peak_bytes, spread
from benchmarks.provenance import clocks, commit, device_name, versions
from benchmarks.report import folder, write
from benchmarks.shards import Shard, look, pull
from rlvr_ops import ace_loss

Point = dict[str, Any]
BASES = {"cpu": Case("ace", 1024, 896, 32000, 8), "cuda": Case("ace", 8192, 4096, 131072, 16, "bfloat16")}
FACTORS = (0.25, 0.5, 1, 2, 4)
SIZES = {"N": "rows", "V": "vocabulary", "H": "hidden"}
RANKS = (1, 2, 4, 8)
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}


def cases(base: Case, varied: str) -> list[Case]:
    """One sweep: for ranks the vocabulary is divided."""
    if varied == "ranks":
        return [replace(base, vocabulary=base.vocabulary // ranks) for ranks in RANKS]
    return [replace(base, **{SIZES[varied]: round(getattr(base, SIZES[varied]) * factor)}) for factor in FACTORS]


def head(case: Case, batch: Batch, **options: bool) -> Step:
    """Forward and backward of ace_loss in a single pass."""
    hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()

    def step() -> object:
        out = ace_loss(
            hidden, weight, batch.ids, batch.advantages, ref_per_token_logps=batch.ref, old_per_token_logps=batch.old,
            schedule="single_pass", **options,
        )  # fmt: skip
        return torch.autograd.grad(out.loss, (hidden, weight))

    return step


def one_rank(case: Case, batch: Batch) -> Step:
    """What one rank computes: its slice scored, and pulled back once the others' scores are there."""
    hidden, shard, ids = batch.hidden.flatten(0, 1), Shard(0, batch.weight), batch.ids.flatten()
    budget = default_workspace_bytes(hidden.device)
    coef = torch.ones(case.rows, device=hidden.device)

    def step() -> object:
        seen = look(hidden, shard, ids, workspace_bytes=budget)
        return pull(hidden, shard, ids, seen.lse, coef, workspace_bytes=budget)

    return step


def sweep(base: Case, varied: str, device: torch.device, **turns: Any) -> list[Point]:
    """Measure the points of one sweep in turns, each beside its own bare products."""
    plan = cases(base, varied)
    batches = [case.batch(device) for case in plan]
    ours = [(one_rank if varied == "ranks" else head)(case, batch) for case, batch in zip(plan, batches, strict=True)]
    bare = [bare_matmuls(case, batch) for case, batch in zip(plan, batches, strict=True)]
    peaks = [peak_bytes(step, device) for step in ours]  # and warm
    times = [spread(mine) for mine in interleave([*ours, *bare], device, **turns)]
    points = []
    for i, case in enumerate(plan):
        point: Point = {"varied": varied, "rows": case.rows, "hidden": case.hidden, "vocabulary": case.vocabulary}
        point |= {"ranks": RANKS[i]} if varied == "ranks" else {}
        point |= times[i] | {"products_ms": times[len(plan) + i]["median_ms"], "peak_bytes": peaks[i]}
        points.append(point)
    return points


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [milliseconds(partial(target.copy_, source), device) for _ in range(9)]
    return 2e3 * size / statistics.median(times)


def fitted_rates(points: list[Point], bandwidth: float, base: Case, *, overlapped: bool) -> Rates:
    """The products' rate, from their times; where traffic does not overlap, without what it takes at the copy's speed."""
    size, found = getattr(torch, base.dtype).itemsize, []
    for point in points:
        n, h, v = point["rows"], point["hidden"], point["vocabulary"]
        seconds = 1e-3 * point["products_ms"]
        traffic = 0.0 if overlapped else 3 * size * (n * v + v * h + n * h) / bandwidth
        found.append(6.0 * n * h * v / max(seconds - traffic, seconds / 2))
    return Rates(statistics.median(found), bandwidth, overlapped=overlapped)


def predict(point: Point, rates: Rates, base: Case, device: torch.device) -> Point:
    """The model's time and peak, beside what was measured."""
    dtype, budget = getattr(torch, base.dtype), default_workspace_bytes(device)
    n, logit = point["rows"], bytes_per_logit(device, dtype)
    size = dtype.itemsize
    problem = Problem(n, point["hidden"], point["vocabulary"], n, n, size, logit, weight_grad_bytes=size)
    if point["varied"] == "ranks":
        cost = two_pass(problem, rates, tile_bytes=budget)
    else:
        rollout = n // base.rollouts
        whole = whole_row_tile(point["vocabulary"], logit, single_pass_workspace(problem, budget)) // rollout * rollout
        cost = single_pass(problem, rates, chunk_rows=whole)
    ratio = point["median_ms"] / (1e3 * cost.seconds)
    return point | {
        "predicted_ms": 1e3 * cost.seconds, "measured_over_predicted": ratio, "predicted_peak_bytes": cost.peak_bytes
    }  # fmt: skip


def exponent(points: list[Point], size: str, value: str) -> float:
    """Least squares of log value against log size."""
    logs = [(math.log(point[size]), math.log(point[value])) for point in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def result(points: list[Point], bandwidth: float, base: Case, device: torch.device, command: str) -> dict[str, Any]:
    """Everything that is stored."""
    rates = fitted_rates(points, bandwidth, base, overlapped=device.type != "cpu")
    sizes = SIZES | {"ranks": "ranks"}
    found = {
        varied: {"time": exponent(mine, size, "median_ms"), "memory": exponent(mine, size, "peak_bytes")}
        for varied, size in sizes.items()
        if (mine := [point for point in points if point["varied"] == varied])
    }
    return {
        "device": device_name(device),
        "clocks": clocks(device),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
        "commit": commit(),
        "command": command,
        "base": base.describe(),
        "rates": rates._asdict(),
        "points": [predict(point, rates, base, device) for point in points],
        "exponents": found,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, and write after each sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=20, help="of each sweep, at the least")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "H", "V"), help="another base")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    base, command = BASES[device.type], f"python -m benchmarks.scaling --seconds {arguments.seconds:g}"
    if arguments.shape:
        command += f" --shape {' '.join(map(str, arguments.shape))}"
        base = replace(base, **dict(zip(("rows", "hidden", "vocabulary"), arguments.shape, strict=True)))
    if base.rows % (4 * base.rollouts) or base.hidden % 4 or base.vocabulary % 8:
        parser.error(f"--shape: N, H and V must be multiples of {4 * base.rollouts}, 4 and 8, to be divided")
    place = arguments.out or folder(device)
    bandwidth = copy_bandwidth(device, COPIED_BYTES[device.type])
    points: list[Point] = []
    for varied in (*SIZES, "ranks"):
        least = 1 if not arguments.seconds else 20 if device.type == "cuda" else 3
        points += sweep(base, varied, device, seconds=arguments.seconds, least=least, most=100)
        stored = result(points, bandwidth, base, device, command)
        write(place / "scaling.json", stored)
        print(varied, {key: round(value, 3) for key, value in stored["exponents"][varied].items()}, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
