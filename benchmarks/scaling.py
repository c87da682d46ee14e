"""How time and memory grow with rows, vocabulary and hidden size, and how well the cost model foresees it.

One size at a time varies around a base. The model's rates are fitted from the bare matrix products and a copy of the
same run alone. `python -m benchmarks.on_gpu --only scaling` measures, `python -m benchmarks.chart` writes the page.
"""

import itertools
import json
import math
import statistics
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rlvr_kernels import cost
from rlvr_kernels.cost import H100_BF16, H200_BF16, Problem, Rates, single_pass_workspace
from rlvr_kernels.tile import CPU_ROWS, default_workspace_bytes, whole_row_tile

from benchmarks.cases import LEADING, Case
from benchmarks.measure import bare_matmuls, interleave, milliseconds, peak_bytes, spread
from benchmarks.peers import PEERS
from benchmarks.results import Result, devices, provenance, table, write
from benchmarks.systems import compute, ours

BASES = {"cpu": Case("ace", 1024, 896, 32000, 8), "cuda": Case("ace", 8192, 4096, 131072, 16, "bfloat16")}
BASES["tiny"] = Case("ace", 32, 8, 80, 8)
FACTORS = (0.25, 0.5, 1, 2, 4)
SIZES = {"N": "rows", "V": "vocabulary", "H": "hidden"}
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
GPU_SHAPES = [(8192, 4096, 131072), (8192, 4096, 151936), (4096, 4096, 128256), (16384, 2048, 151936)]
GPU_SHAPES += [(65536, 2048, 151936), (8192, 896, 151936), (256, 4096, 151936)]


def cases(base: Case, varied: str) -> list[Case]:
    return [replace(base, **{SIZES[varied]: round(getattr(base, SIZES[varied]) * factor)}) for factor in FACTORS]


def measured_point(case: Case, device: torch.device, **turns: Any) -> Result:
    """Time and peak memory of the head, in turns with its bare products."""
    batch = case.batch(device)
    step = partial(compute, ours(case, schedule="single_pass"), batch, case)
    peak = peak_bytes(step, device)  # and warm
    head, products = (spread(mine) for mine in interleave([step, bare_matmuls(case, batch)], device, **turns))
    shape = {"rows": case.rows, "hidden": case.hidden, "vocabulary": case.vocabulary}
    return shape | head | {"products_ms": products["median_ms"], "peak_bytes": peak}


def copy_bandwidth(device: torch.device) -> float:
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    return 2e3 * source.numel() / statistics.median(milliseconds(copy, device) for _ in range(9))


def fitted_rates(points: list[Result], speed: float, base: Case, *, overlapped: bool) -> Rates:
    """The products' rate from their times; where traffic does not overlap, less what it takes at the copy's speed."""
    size, found = getattr(torch, base.dtype).itemsize, []
    for point in points:
        n, h, v, seconds = point["rows"], point["hidden"], point["vocabulary"], 1e-3 * point["products_ms"]
        traffic = 0.0 if overlapped else 3 * size * (n * v + v * h + n * h) / speed
        found.append(6.0 * n * h * v / max(seconds - traffic, seconds / 2))
    return Rates(statistics.median(found), speed, overlapped=overlapped)


def predict(point: Result, rates: Rates, base: Case, device: torch.device) -> Result:
    """The model's time and peak, beside what was measured."""
    size, n = getattr(torch, base.dtype).itemsize, point["rows"]
    kind = {"logit_bytes": size, "weight_grad_bytes": size, "fused": device.type != "cpu"}
    problem = Problem(n, point["hidden"], point["vocabulary"], n, n, size, **kind)
    room, rollout = single_pass_workspace(problem, default_workspace_bytes(device)), n // base.rollouts
    most = whole_row_tile(problem.vocabulary, problem.logit_bytes, room)
    whole = (min(most, CPU_ROWS) if device.type == "cpu" else most) // rollout * rollout
    said = cost.single_pass(problem, rates, chunk_rows=whole)
    ms = 1e3 * said.seconds
    found = {"predicted_ms": ms, "measured_over_predicted": point["median_ms"] / ms}
    return point | found | {"predicted_peak_bytes": said.peak_bytes}


def exponent(points: list[Result], size: str, value: str) -> float:
    logs = [(math.log(point[size]), math.log(point[value])) for point in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def of_a_step(p: Problem, rates: Rates) -> cost.Cost:
    """A single pass with the default workspace of a GPU."""
    room = single_pass_workspace(p, default_workspace_bytes(torch.device("cuda"), whole_rows=True))
    return cost.single_pass(p, rates, chunk_rows=cost.equal_chunks(p, room))


def predicted() -> str:
    """Both schedules in bf16 with the default workspaces, and peers, on two chips: before a GPU has run it."""
    rows, others, slices = [], [], default_workspace_bytes(torch.device("cuda"), whole_rows=False)
    for (chip, rates), (n, h, v) in itertools.product({"H100": H100_BF16, "H200": H200_BF16}.items(), GPU_SHAPES):
        p = Problem(n, h, v, scored=n, active=n)
        once, fewer = (of_a_step(q, rates) for q in (p, replace(p, scored=n // 2, active=n // 2)))
        twice, scored = cost.two_pass(p, rates, tile_bytes=slices), cost.forward_only(p, rates, tile_bytes=slices)
        product = 2 * n * v * h / rates.matmul_flops
        shares = once.seconds / product / 3, twice.seconds / product / 4, scored.seconds / product
        sizes = (1e-9 * (one.peak_bytes - 2 * h * (n + v)) for one in (once, twice))
        rows.append((chip, n, h, v, 3e3 * product, 1e3 * once.seconds, *shares, fewer.seconds / once.seconds, *sizes))
        if (n, h, v) in LEADING:
            theirs = [peer.seconds(n, h, v, rates) for peer in PEERS]
            half = fewer.seconds / theirs[[peer.key for peer in PEERS].index("trl")]
            others.append((chip, n, h, v, *(once.seconds / seconds for seconds in theirs), half))
    head = (
        "chip | N | H | V | 6NVH ms | single pass ms | x 6NVH | two passes x 8NVH | scoring x 2NVH | half active x all"
    )
    ours = table(f"{head} | workspace GB | of two passes", "- - - - .1f .1f .2f .2f .2f .2f .2f .2f", rows)
    head = " | ".join(["chip | N | H | V", *(f"x {peer.name}" for peer in PEERS), "half active x TRL, all active"])
    return f"{ours}\n\n{table(head, '- - - - ' + '.2f ' * (len(PEERS) + 1), others)}"


def measured(results: Path) -> str:
    """Every device's sweeps beside the model, and their plot."""
    found = []
    for path in filter(Path.exists, (place / "scaling.json" for place in devices(results))):
        stored, name = json.loads(path.read_text()), path.parent.name
        flops, speed = stored["rates"]["matmul_flops"] / 1e9, stored["rates"]["bytes_per_second"] / 1e9
        said = f"**{stored['device']}**, torch {stored['versions']['torch']}, `{stored['command']}`; "
        found.append(f"{said}fitted rates {flops:.0f} GFLOP/s and {speed:.1f} GB/s.")
        found.append(f"![scaling on {name}](plots/{name}-scaling.svg)")
        rows = []
        for point in (one for one in stored["points"] if one["varied"] in SIZES):
            shape = (point[key] for key in ("varied", "rows", "hidden", "vocabulary"))
            times = (point[key] for key in ("products_ms", "median_ms", "predicted_ms", "measured_over_predicted"))
            rows.append((*shape, *times, point["peak_bytes"] / 1e6, point["predicted_peak_bytes"] / 1e6))
        head = (
            "varied | N | H | V | products ms | head ms | predicted ms | measured / predicted | peak MB | predicted MB"
        )
        found.append(table(head, "- - - - .1f .1f .1f .2f .0f .0f", rows))
    return "\n\n".join(found) or "No measurement is stored yet."


def measure(device: torch.device, place: Path, *, tiny: bool = False) -> None:
    """Measure every sweep, on a toy shape if `tiny`, and write scaling.json after each."""
    base, least = BASES["tiny" if tiny else device.type], 20 if device.type == "cuda" else 3
    speed, points, exponents = copy_bandwidth(device), [], {}
    for varied, size in SIZES.items():
        sweep = [measured_point(case, device, seconds=1, least=least, most=5 * least) for case in cases(base, varied)]
        points += [{"varied": varied} | point for point in sweep]
        exponents[varied] = {"time": exponent(sweep, size, "median_ms"), "memory": exponent(sweep, size, "peak_bytes")}
        rates = fitted_rates(points, speed, base, overlapped=device.type != "cpu")
        found = provenance(device, "python -m benchmarks.on_gpu --only scaling")
        found |= {"base": asdict(base), "rates": rates._asdict(), "exponents": exponents}
        found["points"] = [predict(point, rates, base, device) for point in points]
        write(place / "scaling.json", found)
