"""Results: a JSON file a case under benchmarks/results/<device>/, and the same as tables."""

import functools
import json
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT as ROOT
from benchmarks.cases import Case, cases
from benchmarks.measure import Measured
from benchmarks.systems import INSTALLED

RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / ".benchmarks" / "results"  # quick and partial runs: git does not see it
PACKAGES = ("rlvr-ops", "torch", "triton", "trl", "verl", "liger-kernel", "cut-cross-entropy", "nvidia-cutlass-dsl",
            "pytest-benchmark")  # fmt: skip
CPUINFO = Path("/proc/cpuinfo")
BEGAN = "RLVR_OPS_RUN_BEGAN"  # seconds since the epoch, set by on_gpu for its stages
Result = dict[str, Any]


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
    """Device, a GPU's clock right after the work, load, versions and commit."""
    versions = {"python": platform.python_version()} | {name: INSTALLED[name] for name in PACKAGES if name in INSTALLED}
    versions |= {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}
    clock = _said("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader") if device.type == "cuda" else None
    found: Result = {"device": device_name(device), "clocks": {"sm": clock} if clock else {}, "versions": versions}
    found |= {"load_average": os.getloadavg()[0], "float32_matmul_precision": torch.get_float32_matmul_precision()}
    return found | {"commit": commit(), "command": command}


@functools.cache
def commit() -> Result:
    """The commit checked out when the run began, and whether tracked files differed, results and pages aside."""
    found = _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if found is None:  # a copy without its .git
        return {"id": os.environ.get("RLVR_OPS_COMMIT"), "dirty": None}
    aside = (":!benchmarks/results", ":!docs")
    changed = _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".", *aside)
    return {"id": found, "dirty": bool(changed)}


def is_current(path: Path, stored: Result) -> bool:
    """Whether a file is of this very commit; where that is not known or has changes, whether this run has written it."""
    if commit()["id"] and not commit()["dirty"]:
        return bool(stored["commit"] == commit())
    return path.stat().st_mtime >= float(os.environ.get(BEGAN, "inf"))


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save(case: Case, found: Measured, device: torch.device, command: str, place: Path) -> Result:
    result: Result = {"case": asdict(case)} | provenance(device, command)
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
    """The stored cases of one device, in the order of the suite."""
    suite = [case.name for case in cases(place.name.partition("-")[0], quick=False)]
    paths = [path for path in sorted(place.glob("*.json")) if path.stem != "scaling"]
    paths.sort(key=lambda path: suite.index(path.stem) if path.stem in suite else len(suite))
    return [json.loads(path.read_text()) for path in paths]


def caption(case: Case) -> str:
    computed = "token_logps" if case.forward else f"{case.loss}_loss, {case.active:.0%} of rollouts active"
    shape = f"(N, H, V) = ({case.rows}, {case.hidden}, {case.vocabulary})"
    return ", ".join([computed, shape, case.dtype, *case.kinds])


def table(head: str, forms: str, rows: Iterable[Iterable[object]]) -> str:
    """Markdown; forms: how the cells are written, "-" as they are, None as nothing."""
    names = head.split(" | ")
    written = [zip(row, forms.split(), strict=True) for row in rows]
    cells = [["" if cell is None else format(cell, form.strip("-")) for cell, form in row] for row in written]
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, ["---:"] * len(names), *cells))


def of_systems(result: Result) -> str:
    """One case as a table of its systems, the fastest first."""
    rows = []
    for row in sorted(result["systems"], key=lambda row: row["median_ms"]):
        name = {"ours": "**{}**", "floor": "{} (floor)"}.get(row["kind"], "{}").format(row["system"])
        times = (row[key] for key in ("median_ms", "p20_ms", "p80_ms", "runs", "tflops"))
        sizes = (row[key] / 1e6 if key in row else None for key in ("peak_bytes", "workspace_bytes"))
        errors = (row.get("errors", {}).get(what) for what in ("logps", "d_hidden", "d_weight"))
        rows.append((name, *times, row["share_of_products"], row["ratio_to_eager"], *sizes, *errors))
    head = "system | median ms | p20 | p80 | runs | TFLOP/s | products' share | x eager | peak MB | workspace MB"
    return table(f"{head} | error logp | d_hidden | d_weight", "- .2f .2f .2f - .3g .0% .2f .1f .1f .1e .1e .1e", rows)


def markdown(results: list[Result]) -> str:
    """All cases, each with its caption, and who did not take part, why, and how often."""
    parts = []
    for result in results:
        clock = "".join(f", clock {clock}" for clock in result["clocks"].values())
        parts.append(f"**{caption(case_of(result))}**; load average {result['load_average']:.1f}{clock}")
        parts.append(of_systems(result))
    absent = Counter((one["name"], one["reason"]) for result in results for one in result["absent"])
    lines = [f"- {name}: {why} ({count} of the cases)" for (name, why), count in sorted(absent.items())]
    return "\n\n".join([*parts, *(["Not measured on this device:", "\n".join(lines)] if lines else [])])


def origin(results: list[Result]) -> str:
    device, precision = results[0]["device"], f"float32 matmul precision `{results[0]['float32_matmul_precision']}`"
    packages = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    found = (result["commit"] for result in results)
    commits = {(one["id"] or "unknown")[:12] + " with changes" * bool(one["dirty"]) for one in found}
    commands = {f"`{result['command']}`" for result in results}
    return "; ".join([device, packages, precision, f"commit {', '.join(sorted(commits))}", ", ".join(sorted(commands))])
