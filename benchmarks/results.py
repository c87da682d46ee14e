"""Results: a JSON file a case under benchmarks/results/<device>/, the same as tables, and beside the targets.

The targets of targets.csv were set before anything was measured.
"""

import csv
import functools
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.measure import Measured

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / ".benchmarks" / "results"  # quick and partial runs: git does not see it
PACKAGES = ("rlvr-ops", "torch", "triton", "trl", "verl", "liger-kernel", "cut-cross-entropy", "quack-kernels",
            "nvidia-cutlass-dsl", "pytest-benchmark")  # fmt: skip
NVIDIA_SMI = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
CPUINFO = Path("/proc/cpuinfo")
Result = dict[str, Any]
HEADER = ["system", "median ms", "p20 .. p80 (runs)", "TFLOP/s", "products' share", "x eager", "peak MB", "workspace MB",
          "error logp", "d_hidden", "d_weight"]  # fmt: skip
ERRORS = ("logps", "d_hidden", "d_weight")
TARGETS = list(csv.DictReader((ROOT / "benchmarks" / "targets.csv").read_text().splitlines()))
"""In which cases a system's figure is to be at most `limit` times the same of another."""
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}  # of the targets
SMALLEST = 100_000  # a language model's vocabulary: the targets are of such shapes


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.*)", CPUINFO.read_text()) if CPUINFO.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def device_folder(device: torch.device) -> str:
    words = re.sub(r"\((?:r|tm)\)|processor|cpu", "", device_name(device).lower())
    return f"{device.type}-{'-'.join(re.findall(r'[a-z0-9]+', words))}"


def provenance(device: torch.device, command: str) -> Result:
    """Device, clocks right after the work (nvidia-smi's own words, the mean MHz of a CPU), load, versions and commit."""
    clocks, versions = {}, {"python": platform.python_version()}
    if device.type == "cuda":
        asked = (f"--id={torch.cuda.current_device()}", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader")
        clocks = dict(zip(NVIDIA_SMI.split(","), (_said("nvidia-smi", *asked) or "").split(", "), strict=False))
        versions["cuda"] = str(torch.version.cuda)
    elif mhz := re.findall(r"cpu MHz\s*: ([\d.]+)", CPUINFO.read_text() if CPUINFO.exists() else ""):
        clocks["mean"] = f"{statistics.mean(map(float, mhz)):.0f} MHz"
    there = {one.name.lower().replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    versions |= {name: there[name] for name in PACKAGES if name in there}
    found: Result = {"device": device_name(device), "clocks": clocks, "load_average": os.getloadavg()[0]}
    found |= {"versions": versions, "float32_matmul_precision": torch.get_float32_matmul_precision()}
    return found | {"commit": commit(), "command": command}


@functools.cache
def commit() -> Result:
    """The commit that was checked out when the run began, and whether tracked files differed; results and pages aside.

    A copy without its .git is told by the environment variable RLVR_OPS_COMMIT, if at all.
    """
    found = _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if found is None:
        return {"id": os.environ.get("RLVR_OPS_COMMIT"), "dirty": None}
    aside = (":!benchmarks/results", ":!docs")
    changed = _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".", *aside)
    return {"id": found, "dirty": bool(changed)}


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save(case: Case, found: Measured, device: torch.device, command: str, place: Path) -> Result:
    counted = {"active_rows": case.active_rows, "products": case.products}
    result: Result = {"case": asdict(case) | counted} | provenance(device, command)
    result |= {"systems": list(found.rows.values()), "absent": list(found.absent.values())}
    write(place / f"{case.name}.json", result)
    return result


def write(path: Path, value: Any) -> None:
    """Replace the file whole, so that a cut-off run leaves no half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def devices(place: Path = RESULTS) -> list[Path]:
    """The folders of the devices that there are results of, GPUs first."""
    found = [path for path in place.iterdir() if path.is_dir() and any(path.glob("*.json"))]
    return sorted(found, key=lambda path: (path.name.startswith("cpu"), path.name))


def case_of(result: Result) -> Case:
    return Case(**{name: result["case"][name] for name in Case.__dataclass_fields__})


def load(place: Path) -> list[Result]:
    """The stored cases of one device: the largest shape first, and of one shape what everybody asks for first."""

    def order(result: Result) -> tuple[Any, ...]:
        case = case_of(result)
        variation = case.peaked + 2 * case.entropy + 3 * case.frozen
        size = case.rows * case.hidden * case.vocabulary
        return -size, ("ace", "logps", "grpo").index(case.loss), variation, -case.active

    results = [json.loads(path.read_text()) for path in sorted(place.glob("*.json"))]
    return sorted((result for result in results if "case" in result), key=order)


def caption(result: Result) -> str:
    case, clocks = case_of(result), result["clocks"]
    computed = "log-probabilities, forward only" if case.forward else f"{case.loss}_loss forward and backward"
    words = [computed, f"(N, H, V) = ({case.rows}, {case.hidden}, {case.vocabulary})", case.dtype]
    words += ["frozen weight"] * case.frozen + ["with entropy"] * case.entropy
    words += ["peaked logits" if case.peaked else "random logits"]
    words += [f"{case.active_rows} of {case.rows} rows in rollouts with an advantage"] * (not case.forward)
    clock = clocks.get("mean") or clocks.get("clocks.sm")
    return f"{', '.join(words)}; load average {result['load_average']:.1f}" + (f", clock {clock}" if clock else "")


def table(result: Result) -> list[str]:
    """One case as the lines of a Markdown table, the fastest first."""
    lines = [f"| {' | '.join(HEADER)} |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    for row in sorted(result["systems"], key=lambda row: row["median_ms"]):
        name = {"ours": "**{}**", "floor": "{} (floor)"}.get(row["kind"], "{}").format(row["system"])
        ms, low, high = (f"{row[key]:.{1 if row[key] >= 10 else 2}f}" for key in ("median_ms", "p20_ms", "p80_ms"))
        sizes = [row[key] / 1e6 if key in row else None for key in ("peak_bytes", "workspace_bytes")]
        figures = [(row["tflops"], ".3g"), (row["share_of_products"], ".0%"), (row["ratio_to_eager"], ".2f")]
        figures += [(size, ".0f" if size and size >= 10 else ".1f") for size in sizes]
        figures += [(row.get("errors", {}).get(what), ".1e") for what in ERRORS]
        cells = ["" if figure is None else format(figure, form) for figure, form in figures]
        lines.append("| " + " | ".join([name, ms, f"{low} .. {high} ({row['runs']})", *cells]) + " |")
    return lines


def missing(results: Iterable[Result]) -> list[str]:
    """A paragraph on the systems that were absent, each with its reason and how often, or nothing."""
    counts = Counter((one["name"], one["reason"]) for result in results for one in result["absent"])
    lines = [f"- {name}: {why} ({count} of the cases)" for (name, why), count in sorted(counts.items())]
    return ["\n".join(["Not measured on this device:", "", *lines])] if lines else []


def markdown(results: list[Result]) -> str:
    """All cases, each with its caption, and who did not take part."""
    return "\n\n".join([*("\n".join([f"**{caption(one)}**", "", *table(one)]) for one in results), *missing(results)])


def origin(results: list[Result]) -> str:
    device, precision = results[0]["device"], f"float32 matmul precision `{results[0]['float32_matmul_precision']}`"
    packages = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    found = (result["commit"] for result in results)
    commits = {(one["id"] or "unknown")[:12] + " with changes" * bool(one["dirty"]) for one in found}
    commands = {f"`{result['command']}`" for result in results}
    return "; ".join([device, packages, precision, f"commit {', '.join(sorted(commits))}", ", ".join(sorted(commands))])


def compared(results: list[Result], device_type: str) -> Iterator[str]:
    """Every target that the results have both sides of, with what was measured, in the dtype that the device's targets are for."""
    found = {case_of(one): {row["key"]: row | row.get("errors", {}) for row in one["systems"]} for one in results}
    for case, rows in found.items():
        eager = [row for row in rows.values() if row["kind"] == "eager"]
        fields = {"median_ms", "peak_bytes", *ERRORS}.intersection(*eager)
        best = {field: min(row[field] for row in eager) for field in fields} if eager else {}
        others = rows | {"eager": best, "MB": {"workspace_bytes": 1e6}}
        others["eager's peak"] = {"workspace_bytes": best.get("peak_bytes")}
        whole = found.get(replace(case, active=1.0), {})
        if {"rlvr_ops", "products"} <= whole.keys() & rows.keys():
            # In units of each run's own products, whose work halves: the two are minutes apart, and a clock may change.
            slower = rows["products"]["median_ms"] / whole["products"]["median_ms"] / case.active
            others["all rows"] = {"median_ms": whole["rlvr_ops"]["median_ms"] * slower}
        plain, all_rows = case.vocabulary >= SMALLEST and not case.kinds, case.all_rows
        cases = {"all": plain and all_rows and case.rows >= 1024, "few": plain and all_rows and case.rows < 1024}
        cases |= {"half": plain and case.active == 0.5, "forward": plain and case.forward, "any": True}
        for target in TARGETS:
            system, field, limit = target["system"], target["field"], float(target["limit"])
            mine, other = rows.get(system, {}).get(field), others.get(target["of"], {}).get(field)
            applies = target["device"] == device_type and case.dtype == DTYPE[device_type] and cases[target["cases"]]
            if applies and mine is not None and other:
                verdict = "ok" if mine / other <= limit else "NOT MET"
                yield f"{case.name}  {system}: {mine / other:.3g} {target['unit']} (target {limit:.3g}) {verdict}"
