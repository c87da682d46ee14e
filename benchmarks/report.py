"""The results: JSON under benchmarks/results/<device>/, one file a case, and the same as a table.

python -m benchmarks.report [DEVICE_FOLDER]      print the tables of stored results as Markdown
"""

import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.entrants import Absent

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("rlvr-ops", "torch", "triton", "trl", "verl", "liger-kernel")
Result = dict[str, Any]
SAVED = pytest.StashKey[list[Result]]()


def device_name(device: torch.device) -> str:
    """The hardware, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text())
        model = names[0] if names else model
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def folder(device: torch.device) -> Path:
    """Where the results of `device` lie."""
    words = re.sub(r"\((?:r|tm)\)|processor|cpu", "", device_name(device).lower())
    return RESULTS / f"{device.type}-{'-'.join(re.findall(r'[a-z0-9]+', words))}"


def versions() -> dict[str, str]:
    """Of Python and of every package that takes part and is there."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save(
    case: Case, rows: list[Result], absent: list[Absent], device: torch.device, command: str, place: Path | None = None
) -> Result:
    """Write one case's results, under RESULTS unless told where; ratios are to the faster of the eager implementations."""
    eager = min(row["median_ms"] for row in rows if row["kind"] == "eager")
    for row in rows:
        row["ratio_to_eager"] = row["median_ms"] / eager
    result = {
        "case": case.describe(),
        "device": device_name(device),
        "versions": versions(),
        "command": command,
        "systems": rows,
        "absent": dict(absent),
        "load_average": os.getloadavg()[0],
    }
    place = place or folder(device)
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{case.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def load(place: Path) -> list[Result]:
    """The stored results of one device, small shapes first."""
    results = [json.loads(path.read_text()) for path in sorted(place.glob("*.json"))]
    return sorted(
        results, key=lambda r: (r["case"]["loss"], r["case"]["rows"] * r["case"]["vocabulary"], -r["case"]["active"])
    )


def caption(result: Result) -> str:
    """The shape and what it stands on, in one line."""
    case = result["case"]
    shape = f"(N, H, V) = ({case['rows']}, {case['hidden']}, {case['vocabulary']})"
    kind = "peaked logits" if case["peaked"] else "random logits"
    active = f"{case['active_rows']} of {case['rows']} rows in rollouts with an advantage"
    load = f"load average {result['load_average']:.1f}"
    return f"{case['loss']}_loss forward and backward, {shape}, {case['dtype']}, {kind}, {active}; {load}"


def table(result: Result) -> list[str]:
    """One case as the lines of a Markdown table."""
    lines = [
        "| system | median ms | p20 .. p80 (runs) | x eager | peak MB above inputs | error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(result["systems"], key=lambda row: row["median_ms"]):
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        lines.append(
            f"| {row['system']} | {row['median_ms']:.1f} | {row['p20_ms']:.1f} .. {row['p80_ms']:.1f} ({row['runs']}) "
            f"| {row['ratio_to_eager']:.2f} | {peak} | {error} |"
        )
    return lines + [f"| {name} | {reason} | | | | |" for name, reason in result["absent"].items()]


def markdown(results: Iterable[Result]) -> str:
    """All cases, each with its caption."""
    return "\n\n".join("\n".join([f"**{caption(result)}**", "", *table(result)]) for result in results)


def provenance(results: list[Result]) -> str:
    """Device, versions and commands."""
    packages = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    commands = ", ".join(sorted({f"`{result['command']}`" for result in results}))
    return f"{results[0]['device']}; {packages}; {commands}"


if __name__ == "__main__":
    for chosen in [Path(sys.argv[1])] if len(sys.argv) > 1 else sorted(RESULTS.iterdir()):
        stored = load(chosen)
        print(f"{provenance(stored)}{os.linesep}{os.linesep}{markdown(stored)}")
