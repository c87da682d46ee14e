"""The results: JSON under benchmarks/results/<device>/, one file a case, and the same as tables.

python -m benchmarks.report [DEVICE_FOLDER]      print the tables of stored results as Markdown
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.entrants import Absent
from benchmarks.provenance import ROOT, clocks, commit, device_folder, device_name, versions

RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / ".benchmarks" / "results"
"""Where quick and partial runs go: git does not see it."""
Result = dict[str, Any]

HEADER = [
    "| system | median ms | p20 .. p80 (runs) | TFLOP/s | products' share | x eager | peak MB | workspace MB "
    "| error logp | d_hidden | d_weight |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
]


def save(
    case: Case, rows: list[Result], absent: list[Absent], device: torch.device, command: str, place: Path
) -> Result:
    """Write one case's results to a file of its own in `place`."""
    result = {
        "case": case.describe(),
        "device": device_name(device),
        "clocks": clocks(device),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": commit(),
        "command": command,
        "systems": rows,
        "absent": [one._asdict() for one in absent],
    }
    write(place / f"{case.name}.json", result)
    return result


def write(path: Path, value: Any) -> None:
    """Replace the file whole, so that a cut-off run leaves no half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def folder(device: torch.device) -> Path:
    """Where the results of `device` lie."""
    return RESULTS / device_folder(device)


def devices(place: Path = RESULTS) -> list[Path]:
    """The folders of the devices that there are results of, GPUs first."""
    found = [path for path in place.iterdir() if path.is_dir() and any(path.glob("*.json"))]
    return sorted(found, key=lambda path: (path.name.startswith("cpu"), path.name))


def load(place: Path) -> list[Result]:
    """The stored cases of one device: the largest shape first, and of one shape what everybody asks for first."""
    results = [json.loads(path.read_text()) for path in sorted(place.glob("*.json"))]
    return sorted((result for result in results if "case" in result), key=_order)


def _order(result: Result) -> tuple[Any, ...]:
    case = result["case"]
    size = case["rows"] * case["hidden"] * case["vocabulary"]
    variation = case["peaked"] + 2 * case["entropy"] + 3 * case["frozen"]
    return -size, ("ace", "logps", "grpo").index(case["loss"]), variation, -case["active"]


def row_of(result: Result, key: str) -> Result | None:
    """A system's row, if it took part."""
    return next((row for row in result["systems"] if row["key"] == key), None)


def caption(result: Result) -> str:
    """What was computed on what, in one line."""
    case = result["case"]
    words = {
        "logps": "log-probabilities, forward only",
        "ace": "ace_loss forward and backward",
        "grpo": "grpo_loss forward and backward",
    }
    shape = f"(N, H, V) = ({case['rows']}, {case['hidden']}, {case['vocabulary']})"
    kinds = [words[case["loss"]], shape, case["dtype"]]
    kinds += ["frozen weight"] if case["frozen"] else []
    kinds += ["with entropy"] if case["entropy"] else []
    kinds += ["peaked logits" if case["peaked"] else "random logits"]
    if case["loss"] != "logps":
        kinds += [f"{case['active_rows']} of {case['rows']} rows in rollouts with an advantage"]
    clock = result["clocks"].get("mean") or result["clocks"].get("clocks.sm")
    return f"{', '.join(kinds)}; load average {result['load_average']:.1f}" + (f", clock {clock}" if clock else "")


def table(result: Result) -> list[str]:
    """One case as the lines of a Markdown table, the fastest first."""
    lines = list(HEADER)
    for row in sorted(result["systems"], key=lambda row: row["median_ms"]):
        errors = row.get("errors", {})
        name = f"**{row['system']}**" if row["kind"] == "ours" else row["system"]
        cells = [
            f"{name} (floor)" if row["kind"] == "floor" else name,
            _time(row["median_ms"]),
            f"{_time(row['p20_ms'])} .. {_time(row['p80_ms'])} ({row['runs']})",
            f"{row['tflops']:.3g}",
            f"{row['share_of_products']:.0%}",
            _cell(row["ratio_to_eager"], ".2f"),
            _megabytes(row.get("peak_bytes")),
            _megabytes(row.get("workspace_bytes")),
            *(_cell(errors.get(name), ".1e") for name in ("logps", "d_hidden", "d_weight")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds >= 10 else f"{milliseconds:.2f}"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f}" if count >= 1e7 else f"{count / 1e6:.1f}"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(results: Iterable[Result]) -> str:
    """All cases, each with its caption, and who did not take part."""
    results = list(results)
    cases = ["\n".join([f"**{caption(result)}**", "", *table(result)]) for result in results]
    return "\n\n".join([*cases, *missing(results)])


def missing(results: list[Result]) -> list[str]:
    """A paragraph on the systems that were absent, each with its reason and the cases, or nothing."""
    where: dict[tuple[str, str], int] = {}
    for result in results:
        for one in result["absent"]:
            where[one["name"], one["reason"]] = where.get((one["name"], one["reason"]), 0) + 1
    if not where:
        return []
    lines = [f"- {name}: {why} ({count} of the cases)" for (name, why), count in sorted(where.items())]
    return ["\n".join(["Not measured on this device:", "", *lines])]


def provenance(results: list[Result]) -> str:
    """Device, versions, commits and commands."""
    packages = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    commits = sorted({_commit(**result["commit"]) for result in results})
    commands = sorted({f"`{result['command']}`" for result in results})
    precision = results[0]["float32_matmul_precision"]
    return (
        f"{results[0]['device']}; {packages}; float32 matmul precision `{precision}`; "
        f"commit {', '.join(commits)}; {', '.join(commands)}"
    )


def _commit(id: str | None, dirty: bool | None) -> str:
    return (id or "unknown")[:12] + (" with changes" if dirty else "")


if __name__ == "__main__":
    for chosen in [Path(sys.argv[1])] if len(sys.argv) > 1 else devices():
        stored = load(chosen)
        if not stored and len(sys.argv) > 1:
            sys.exit(f"no results of cases in {chosen}: a device's folder of JSON files is wanted")
        if not stored:
            continue
        print(f"{provenance(stored)}{os.linesep}{os.linesep}{markdown(stored)}")
