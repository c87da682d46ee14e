"""Write the tables of docs/scaling.md: what the cost model says, and what scaling.json files have beside it.

python -m benchmarks.scaling_page
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlvr_kernels.cost import (
    H100_BF16,
    Problem,
    Rates,
    cheapest,
    cpu_fp32,
    equal_chunks,
    single_pass,
    single_pass_workspace,
    two_pass,
)

from benchmarks import layouts
from benchmarks.layouts import INFINIBAND, NVLINK, SLICE_BYTES, WORKSPACE_BYTES, Job

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
RESULTS = Path(__file__).parent / "results"
END = "<!-- end -->"
H100_SHAPE = Problem(8192, 4096, 131072, scored=8192, active=8192)
CPU_SHAPE = Problem(1024, 896, 151936, 1024, 1024, operand_bytes=4, logit_bytes=4, weight_grad_bytes=4)
GIB, MIB = 1 << 30, 1 << 20
LOGGED = [
    *(
        (512, 512, 512 // chunks, 1, seconds)
        for chunks, seconds in ((16, 10.1), (8, 7.9), (4, 6.6), (2, 5.4), (1, 5.4))
    ),
    (1024, 1024, 256, 2, 5.7),
    (1024, 512, 256, 2, 3.0),
]  # rows, active, chunk rows, threads, seconds: sections 1 and 2 of the performance log


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """Markdown."""
    names = [name.strip() for name in head.split("|")]
    lines = [names, ["---:"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sizes() -> str:
    """One GPU against N, V, H."""
    varied = [
        ("rows", (2048, 8192, 32768, 131072)),
        ("vocabulary", (32768, 131072, 262144)),
        ("hidden", (1024, 4096, 8192)),
    ]
    problems = []
    for name, values in varied:
        for value in values:
            names = ("rows", "scored", "active") if name == "rows" else (name,)
            problems.append(replace(H100_SHAPE, **dict.fromkeys(names, value)))  # type: ignore[arg-type]
    rows = []
    for p in dict.fromkeys(problems):
        cost = cheapest(p, single_pass_workspace(p, WORKSPACE_BYTES), H100_BF16, slice_bytes=SLICE_BYTES)
        floor = 6e3 * p.rows * p.vocabulary * p.hidden / H100_BF16.matmul_flops
        rows.append((
            p.rows, p.hidden, p.vocabulary, cost.schedule, f"{floor:.1f}", f"{1e3 * cost.seconds:.1f}",
            f"{cost.workspace_bytes / 1e9:.2f}", f"{cost.peak_bytes / 1e9:.2f}",
        ))  # fmt: skip
    return table("N | H | V | schedule | 6NVH ms | ms | workspace GB | peak GB above inputs", rows)


def choice() -> str:
    """Single pass or two, for each workspace; and from which active share on the single pass is cheaper."""
    plans = [("H100, bf16", H100_SHAPE, H100_BF16, [512 * MIB, GIB, 2 * GIB, 4 * GIB, 8 * GIB])]
    plans += [(f"CPU, {t} threads", CPU_SHAPE, cpu_fp32(t), [40 * MIB, 80 * MIB, 160 * MIB, 320 * MIB]) for t in (2, 8)]
    rows = []
    for device, p, rates, budgets in plans:
        for budget in budgets:
            chunk = equal_chunks(p, budget)
            single, two = single_pass(p, rates, chunk_rows=chunk).seconds, _two(p, rates, budget)
            rows.append((
                device, budget // MIB, chunk, f"{1e3 * single:.0f}", f"{1e3 * two:.0f}", _share(p, rates, budget, chunk),
                cheapest(p, budget, rates).schedule,
            ))  # fmt: skip
    head = (
        "device | workspace MiB | chunk rows | single pass ms | two passes ms | single pass is faster from active share"
    )
    return table(head + " | chosen with all active", rows)


def _two(p: Problem, rates: Rates, budget: int) -> float:
    return two_pass(p, rates, tile_bytes=budget).seconds


def _share(p: Problem, rates: Rates, budget: int, chunk: int) -> str:
    for percent in range(1, 101):
        some = replace(p, active=p.scored * percent // 100)
        if single_pass(some, rates, chunk_rows=chunk).seconds < _two(some, rates, budget):
            return f"{percent} %"
    return "never"


def log() -> str:
    """The CPU's rates against the performance log."""
    rows = []
    for n, active, chunk, threads, seconds in LOGGED:
        p = replace(CPU_SHAPE, rows=n, scored=active, active=active)
        said = single_pass(p, cpu_fp32(threads), chunk_rows=chunk).seconds
        rows.append((n, active, chunk, threads, f"{said:.1f}", seconds, f"{seconds / said:.2f}"))
    return table("N | active | chunk rows | threads | predicted s | measured s | measured / predicted", rows)


def job(tokens: int, gpus: int, hidden: int, vocabulary: int) -> str:
    """Every layout of one job, and the best."""
    rows, found = [], layouts.layouts(Job(tokens, hidden, vocabulary, gpus))
    for shards, step in found.items():
        parts = (step.compute, step.rows_exchanged, step.weight_reduced, step.seconds)
        rows.append((shards, gpus // shards, *(f"{1e3 * x:.1f}" for x in parts), f"{step.memory_bytes / 1e9:.1f}"))
    head = "vocabulary shards | data parallel groups | head ms | rows exchanged ms | d_weight reduced ms | sum ms"
    best = min(found, key=lambda shards: found[shards].seconds)
    least = min(found, key=lambda shards: found[shards].memory_bytes)
    said = f"Least time: {best} shards, {1e3 * found[best].seconds:.0f} ms. "
    said += f"Least memory: {least} shards, {found[least].memory_bytes / 1e9:.1f} GB."
    return table(head + " | GB a GPU", rows) + f"\n\n{said}"


def domination() -> str:
    """Where communication takes longer than the products."""
    links = [
        ("NVLink, 450 GB/s", NVLINK),
        ("eight adapters a node, 400 GB/s", 8 * INFINIBAND),
        ("one adapter, 50 GB/s", INFINIBAND),
    ]
    rows = [
        (name, *(f"{layouts.rows_dominate(v, links):.0f}" for v in (32768, 131072, 262144)),
         f"{layouts.weights_dominate(links):.0f}")
        for name, links in links
    ]  # fmt: skip
    head = "a GPU's link | vocabulary shards, V = 32768 | V = 131072 | V = 262144"
    return table(head + " | data parallel: tokens a GPU a step below", rows)


def measured() -> str:
    """Each device's points."""
    stored = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/scaling.json"))]
    return "\n\n".join(_device(result) for result in stored) or "No measurement is stored yet."


def _device(result: dict[str, Any]) -> str:
    versions = f"torch {result['versions']['torch']}"
    rates = result["rates"]
    fitted = f"{rates['matmul_flops'] / 1e9:.0f} GFLOP/s and {rates['bytes_per_second'] / 1e9:.1f} GB/s"
    rows = []
    for p in result["points"]:
        rows.append((
            p["varied"], p["rows"], p["hidden"], p["vocabulary"], f"{p['products_ms']:.1f}", f"{p['median_ms']:.1f}",
            f"{p['predicted_ms']:.1f}", f"{p['measured_over_predicted']:.2f}", f"{p['peak_bytes'] / 1e6:.0f}",
            f"{p['predicted_peak_bytes'] / 1e6:.0f}",
        ))  # fmt: skip
    grown = table(
        "varied | exponent of time | exponent of peak memory",
        ((name, f"{found['time']:.2f}", f"{found['memory']:.2f}") for name, found in result["exponents"].items()),
    )
    head = "varied | N | H | V | products ms | head ms | predicted ms | measured / predicted | peak MB | predicted MB"
    said = f"**{result['device']}**, {versions}, `{result['command']}`; fitted rates {fitted}."
    return f"{said}\n\n{grown}\n\n{table(head, rows)}"


SECTIONS = {
    "sizes": sizes,
    "choice": choice,
    "log": log,
    "node": lambda: job(65536, 8, 4096, 131072),
    "cluster": lambda: job(1 << 20, 64, 4096, 262144),
    "cluster-small": lambda: job(1 << 17, 64, 4096, 262144),
    "domination": domination,
    "measured": measured,
}


def rewrite(page: str) -> str:
    """The page with the text after each marker replaced."""
    for name, text in SECTIONS.items():
        marker = f"<!-- {name}: written by python -m benchmarks.scaling_page -->"
        before, rest = page.split(marker)
        page = f"{before}{marker}\n{text()}\n{END}{rest.split(END, 1)[1]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(rewrite(PAGE.read_text()))
