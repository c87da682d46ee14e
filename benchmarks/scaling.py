"""How time and memory grow with rows, vocabulary, hidden size and GPUs, and how well the cost model foresees it.

python -m benchmarks.scaling [--device cpu] [--seconds 20] [--out DIR]
python -m benchmarks.scaling --page

The first writes DIR/scaling.json, by default under benchmarks/results/<device>/. A sweep varies one size around the base in
five points, which take turns. The model's rates are fitted from the bare matrix products and a copy of the same run, and from
nothing else. The sweep over ranks times one rank's slice of the vocabulary in two passes, without communication.

The second writes the tables of docs/scaling.md. A head on several GPUs: groups of `shards` GPUs divide the vocabulary; the
groups are data parallel to each other. A group gathers the hidden states of its GPUs' tokens, combines three float32 a row,
and scatters the sums of d_hidden; between groups each GPU's slice of d_weight is all-reduced once a step. Nothing overlaps.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rlvr_kernels import cost
from rlvr_kernels.cost import H100_BF16, Problem, Rates, cheapest, cpu_fp32, single_pass_workspace
from rlvr_kernels.tile import default_workspace_bytes, whole_row_tile

from benchmarks.cases import Batch, Case
from benchmarks.measure import bare_matmuls, interleave, milliseconds, peak_bytes, spread
from benchmarks.results import RESULTS, ROOT, Result, device_folder, provenance, write
from benchmarks.systems import Outputs, compute, ours
from rlvr_ops import token_logps

BASES = {"cpu": Case("ace", 1024, 896, 32000, 8), "cuda": Case("ace", 8192, 4096, 131072, 16, "bfloat16")}
TINY = Case("ace", 32, 8, 80, 8)
FACTORS, RANKS = (0.25, 0.5, 1, 2, 4), (1, 2, 4, 8)
SIZES = {"N": "rows", "V": "vocabulary", "H": "hidden", "ranks": "ranks"}
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
PAGE, END = ROOT / "docs" / "scaling.md", "<!-- end -->"
H100_SHAPE = Problem(8192, 4096, 131072, scored=8192, active=8192)
CPU_SHAPE = Problem(1024, 896, 151936, 1024, 1024, operand_bytes=4, weight_grad_bytes=4)
WORKSPACE, SLICES = (default_workspace_bytes(torch.device("cuda"), whole_rows=whole) for whole in (True, False))
CHUNKS = {32: 10.1, 64: 7.9, 128: 6.6, 256: 5.4, 512: 5.4}  # seconds of 512 rows on one thread, by the chunk's rows
LOGGED = [(512, 512, chunk, 1, seconds) for chunk, seconds in CHUNKS.items()]
LOGGED += [(1024, 1024, 256, 2, 5.7), (1024, 512, 256, 2, 3.0)]
"""rows, active, chunk rows, threads, seconds: sections 1 and 2 of the performance log."""
NVLINK = 450e9  # bytes/s in each direction of an H100 SXM: the vendor's figure
INFINIBAND = 50e9  # bytes/s of a 400 Gb/s adapter, one for each GPU: the vendor's figure
GPUS_PER_NODE = 8
HIDDEN, SUMMED = 2, 4  # bytes; sums of d_hidden and of d_weight travel in float32
STATE = 12  # bytes of a row: maximum, sum of exponentials, target logit


def cases(base: Case, varied: str) -> list[Case]:
    """One sweep: for ranks the vocabulary is divided."""
    if varied == "ranks":
        return [replace(base, vocabulary=base.vocabulary // ranks) for ranks in RANKS]
    return [replace(base, **{SIZES[varied]: round(getattr(base, SIZES[varied]) * factor)}) for factor in FACTORS]


def one_rank(batch: Batch) -> Outputs:
    """What one rank computes: its slice scored, and pulled back once the others' scores are there."""
    room = default_workspace_bytes(batch.hidden.device)
    return Outputs(token_logps(batch.hidden, batch.weight, batch.ids, workspace_bytes=room).logps.sum())


def sweep(base: Case, varied: str, device: torch.device, **turns: Any) -> list[Result]:
    """Measure the points of one sweep in turns, each beside its own bare products."""
    plan = [(case, case.batch(device)) for case in cases(base, varied)]
    runs = [one_rank if varied == "ranks" else ours(case, "single_pass") for case, _ in plan]
    steps = [partial(compute, run, batch, case) for run, (case, batch) in zip(runs, plan, strict=True)]
    peaks = [peak_bytes(step, device) for step in steps]  # and warm
    times = [spread(mine) for mine in interleave([*steps, *(bare_matmuls(*one) for one in plan)], device, **turns)]
    points = []
    for i, (case, _) in enumerate(plan):
        point: Result = {"varied": varied, "rows": case.rows, "hidden": case.hidden, "vocabulary": case.vocabulary}
        point |= {"ranks": RANKS[i]} if varied == "ranks" else {}
        points.append(point | times[i] | {"products_ms": times[len(plan) + i]["median_ms"], "peak_bytes": peaks[i]})
    return points


def copy_bandwidth(device: torch.device) -> float:
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    return 2e3 * source.numel() / statistics.median(milliseconds(copy, device) for _ in range(9))


def fitted_rates(points: list[Result], speed: float, base: Case, *, overlapped: bool) -> Rates:
    """The products' rate, from their times; where traffic does not overlap, without what it takes at the copy's speed."""
    size, found = getattr(torch, base.dtype).itemsize, []
    for point in points:
        n, h, v, seconds = point["rows"], point["hidden"], point["vocabulary"], 1e-3 * point["products_ms"]
        traffic = 0.0 if overlapped else 3 * size * (n * v + v * h + n * h) / speed
        found.append(6.0 * n * h * v / max(seconds - traffic, seconds / 2))
    return Rates(statistics.median(found), speed, overlapped=overlapped)


def predict(point: Result, rates: Rates, base: Case, device: torch.device) -> Result:
    """The model's time and peak, beside what was measured."""
    size, room, n = getattr(torch, base.dtype).itemsize, default_workspace_bytes(device), point["rows"]
    problem = Problem(n, point["hidden"], point["vocabulary"], n, n, size, weight_grad_bytes=size)
    if point["varied"] == "ranks":
        said = cost.two_pass(problem, rates, tile_bytes=room)
    else:
        rollout, room = n // base.rollouts, single_pass_workspace(problem, room)
        whole = whole_row_tile(problem.vocabulary, problem.logit_bytes, room) // rollout * rollout
        said = cost.single_pass(problem, rates, chunk_rows=whole)
    ratio, peak = point["median_ms"] / (1e3 * said.seconds), said.peak_bytes
    return point | {"predicted_ms": 1e3 * said.seconds, "measured_over_predicted": ratio, "predicted_peak_bytes": peak}


def exponent(points: list[Result], size: str, value: str) -> float:
    logs = [(math.log(point[size]), math.log(point[value])) for point in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


class Step(NamedTuple):
    """Of one GPU: seconds of arithmetic, of exchanging rows within the group, of all-reducing d_weight, and their sum;
    and bytes of the weight's slice, its gradient and accumulator, the group's hidden states and gradient, the workspace."""

    compute: float
    rows_exchanged: float
    weight_reduced: float
    seconds: float
    memory_bytes: float


def bandwidth(gpus: int, stride: int = 1) -> float:
    """Bytes/s of one GPU in a ring of `gpus`, every stride-th one: within a node its link, else the node's adapters shared
    by the ring's GPUs there."""
    within = gpus * stride <= GPUS_PER_NODE
    return NVLINK if within else min(NVLINK, INFINIBAND * max(1, GPUS_PER_NODE // stride))


def layout(tokens: int, hidden: int, vocabulary: int, gpus: int, shards: int) -> Step:
    """One optimiser step of the head alone with groups of `shards` GPUs; 1 is data parallel alone."""
    groups, part = gpus // shards, -(-vocabulary // shards)
    rows = tokens // groups
    problem = Problem(rows, hidden, part, scored=rows, active=rows)
    found = cheapest(problem, single_pass_workspace(problem, WORKSPACE), H100_BF16)
    row_bytes = hidden * (HIDDEN + SUMMED) + 2 * STATE
    exchanged = (shards - 1) / shards * rows * row_bytes / bandwidth(shards)
    reduced = 2 * (groups - 1) / groups * part * hidden * SUMMED / bandwidth(groups, shards)
    memory = (part + rows) * hidden * HIDDEN + found.peak_bytes
    return Step(found.seconds, exchanged, reduced, found.seconds + exchanged + reduced, memory)


def layouts(tokens: int, hidden: int, vocabulary: int, gpus: int) -> dict[int, Step]:
    return {2**n: layout(tokens, hidden, vocabulary, gpus, 2**n) for n in range(gpus.bit_length())}


def rows_dominate(vocabulary: int, link: float) -> float:
    """The size r of a group from which exchanging rows takes longer than the products: 6NH (r - 1) / r / link > 6NHV / r / F."""
    return 1 + vocabulary * link / H100_BF16.matmul_flops


def weights_dominate(link: float) -> float:
    """The tokens N a GPU below which all-reducing d_weight takes longer than the products: 8VH / link > 6NVH / F."""
    return 2 * SUMMED / 6 * H100_BF16.matmul_flops / link


def table(head: str, forms: str, rows: Iterable[Iterable[object]]) -> str:
    """Markdown; forms: how the cells are written, "-" as they are."""
    names = head.split(" | ")
    cells = [[format(x, form.strip("-")) for x, form in zip(row, forms.split(), strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, ["---:"] * len(names), *cells))


def sizes() -> str:
    """One GPU against N, V, H."""
    varied: list[dict[str, Any]] = [{"rows": n, "scored": n, "active": n} for n in (2048, 8192, 32768, 131072)]
    varied += [{"vocabulary": v} for v in (32768, 262144)] + [{"hidden": h} for h in (1024, 8192)]
    rows = []
    for p in (replace(H100_SHAPE, **changed) for changed in varied):
        found = cheapest(p, single_pass_workspace(p, WORKSPACE), H100_BF16, slice_bytes=SLICES)
        floor = 6e3 * p.rows * p.vocabulary * p.hidden / H100_BF16.matmul_flops
        memory = found.workspace_bytes / 1e9, found.peak_bytes / 1e9
        rows.append((p.rows, p.hidden, p.vocabulary, found.schedule, floor, 1e3 * found.seconds, *memory))
    head = "N | H | V | schedule | 6NVH ms | ms | workspace GB | peak GB above inputs"
    return table(head, "- - - - .1f .1f .2f .2f", rows)


def choice() -> str:
    """Single pass or two, for each workspace; and from which active share on the single pass is cheaper."""
    plans: list[Any] = [("H100, bf16", H100_SHAPE, H100_BF16, (512, 1024, 2048, 4096, 8192))]
    plans += [(f"CPU, {threads} threads", CPU_SHAPE, cpu_fp32(threads), (40, 80, 160, 320)) for threads in (2, 8)]
    rows = []
    for device, p, rates, mib in ((*plan, mib) for *plan, budgets in plans for mib in budgets):
        chunk, times = cost.equal_chunks(p, mib << 20), {}
        for percent in range(1, 101):
            some = replace(p, active=p.scored * percent // 100)
            once = cost.single_pass(some, rates, chunk_rows=chunk).seconds
            times[percent] = 1e3 * once, 1e3 * cost.two_pass(some, rates, tile_bytes=mib << 20).seconds
        share = next((f"{percent} %" for percent, (once, twice) in times.items() if once < twice), "never")
        rows.append((device, mib, chunk, *times[100], share, cheapest(p, mib << 20, rates).schedule))
    head = "device | workspace MiB | chunk rows | single pass ms | two passes ms"
    head += " | single pass is faster from active share | chosen with all active"
    return table(head, "- - - .0f .0f - -", rows)


def log() -> str:
    """The CPU's rates against the performance log."""
    rows = []
    for n, active, chunk, threads, seconds in LOGGED:
        p = replace(CPU_SHAPE, rows=n, scored=active, active=active)
        said = cost.single_pass(p, cpu_fp32(threads), chunk_rows=chunk).seconds
        rows.append((n, active, chunk, threads, said, seconds, seconds / said))
    head = "N | active | chunk rows | threads | predicted s | measured s | measured / predicted"
    return table(head, "- - - - .1f - .2f", rows)


def job(tokens: int, hidden: int, vocabulary: int, gpus: int) -> str:
    """Every layout of one job, and the best."""
    found = layouts(tokens, hidden, vocabulary, gpus)
    rows = [(n, gpus // n, *(1e3 * x for x in step[:4]), step.memory_bytes / 1e9) for n, step in found.items()]
    fast, small = min(found, key=lambda n: found[n].seconds), min(found, key=lambda n: found[n].memory_bytes)
    head = "vocabulary shards | data parallel groups | head ms | rows exchanged ms | d_weight reduced ms | sum ms | GB a GPU"
    said = f"Least time: {fast} shards, {1e3 * found[fast].seconds:.0f} ms. "
    said += f"Least memory: {small} shards, {found[small].memory_bytes / 1e9:.1f} GB."
    return f"{table(head, '- - .1f .1f .1f .1f .1f', rows)}\n\n{said}"


def domination() -> str:
    """Where communication takes longer than the products."""
    rows = []
    for name, link in (("NVLink", NVLINK), ("eight adapters a node", 8 * INFINIBAND), ("one adapter", INFINIBAND)):
        shards = (rows_dominate(vocabulary, link) for vocabulary in (32768, 131072, 262144))
        rows.append((f"{name}, {link / 1e9:.0f} GB/s", *shards, weights_dominate(link)))
    head = "a GPU's link | vocabulary shards, V = 32768 | V = 131072 | V = 262144"
    return table(head + " | data parallel: tokens a GPU a step below", "- .0f .0f .0f .0f", rows)


def measured() -> str:
    found = []
    for stored in (json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/scaling.json"))):
        flops, speed = stored["rates"]["matmul_flops"] / 1e9, stored["rates"]["bytes_per_second"] / 1e9
        said = f"**{stored['device']}**, torch {stored['versions']['torch']}, `{stored['command']}`; "
        found.append(f"{said}fitted rates {flops:.0f} GFLOP/s and {speed:.1f} GB/s.")
        grown = ((name, one["time"], one["memory"]) for name, one in stored["exponents"].items())
        found.append(table("varied | exponent of time | exponent of peak memory", "- .2f .2f", grown))
        keys = ("varied", "rows", "hidden", "vocabulary", "products_ms", "median_ms", "predicted_ms")
        memory = ("peak_bytes", "predicted_peak_bytes")
        rows = [
            (*(p[key] for key in keys), p["measured_over_predicted"], *(p[key] / 1e6 for key in memory))
            for p in stored["points"]
        ]
        head = "varied | N | H | V | products ms | head ms | predicted ms | measured / predicted"
        found.append(table(head + " | peak MB | predicted MB", "- - - - .1f .1f .1f .2f .0f .0f", rows))
    return "\n\n".join(found) or "No measurement is stored yet."


def rewrite(page: str) -> str:
    texts = {section.__name__: section() for section in (sizes, choice, log, domination, measured)}
    texts["node"] = job(65536, 4096, 131072, 8)
    texts["cluster"], texts["cluster-small"] = (job(tokens, 4096, 262144, 64) for tokens in (1 << 20, 1 << 17))
    for name, text in texts.items():
        marker = f"<!-- {name}: written by python -m benchmarks.scaling --page -->"
        before, rest = page.split(marker)
        page = f"{before}{marker}\n{text}\n{END}{rest.split(END, 1)[1]}"
    return page


def main(argv: list[str] | None = None) -> None:
    """Write the page; or measure, and write after each sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the tables of docs/scaling.md, and measure nothing")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=20, help="of each sweep, at the least")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a toy shape, once, to see that the script itself works")
    given = parser.parse_args(argv)
    if given.page:
        PAGE.write_text(rewrite(PAGE.read_text()))
        return
    device, base = given.device, TINY if given.tiny else BASES[given.device.type]
    command = f"python -m benchmarks.scaling --{'tiny' if given.tiny else f'seconds {given.seconds:g}'}"
    turns: dict[str, Any] = {"seconds": given.seconds, "least": 20 if device.type == "cuda" else 3, "most": 100}
    turns = {"seconds": 0, "least": 1, "most": 1} if given.tiny else turns
    speed, points, exponents = copy_bandwidth(device), [], {}
    for varied, size in SIZES.items():
        mine = sweep(base, varied, device, **turns)
        points += mine
        exponents[varied] = {"time": exponent(mine, size, "median_ms"), "memory": exponent(mine, size, "peak_bytes")}
        rates = fitted_rates(points, speed, base, overlapped=device.type != "cpu")
        found = provenance(device, command) | {"base": asdict(base), "rates": rates._asdict(), "exponents": exponents}
        found["points"] = [predict(point, rates, base, device) for point in points]
        write((given.out or RESULTS / device_folder(device)) / "scaling.json", found)
        print(varied, {key: round(value, 3) for key, value in exponents[varied].items()}, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
