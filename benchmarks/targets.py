"""What the head is to reach, in targets.csv, against what was measured.

A line names cases and systems by patterns, and a limit for a field of theirs: absolute, or as a multiple of the same field `of`
another system, of the best eager form, of all rows (the same case with every rollout active), or of eager's peak. Two passes have
4/3 of the bare products' FLOPs.
"""

import csv
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.results import Result, case_of, table

TARGETS = Path(__file__).with_name("targets.csv")


def value(row: dict[str, Any], field: str) -> float | None:
    """A field of a system's row, or its error of that name."""
    return row.get(field, row.get("errors", {}).get(field))


def reference(result: Result, results: list[Result], row: dict[str, Any], field: str, of: str) -> float | None:
    """What a value is a multiple of; None if it was not measured."""
    if not of:
        return 1.0
    if of == "all rows":
        whole = case_of(result).name.rsplit("-", 2)[0] + "-100-active"
        same = [one for other in results if case_of(other).name == whole for one in other["systems"]]
        found = [value(one, field) for one in same if one["key"] == row["key"]]
    elif of.startswith("eager") and of != "eager-compiled":
        field = "peak_bytes" if of == "eager's peak" else field
        found = [value(one, field) for one in result["systems"] if one["kind"] == "eager"]
    else:
        found = [value(one, field) for one in result["systems"] if one["key"] == of]
    return min((one for one in found if one is not None), default=None)


def compared(results: list[Result]) -> Iterator[tuple[object, ...]]:
    """(case, system, field, of, limit, measured, whether it is met) of every target that something was measured for."""
    targets = list(csv.DictReader(TARGETS.read_text().splitlines()))
    for target in targets:
        field, of, limit = target["field"], target["of"], float(target["limit"])
        for result in (one for one in results if fnmatch(case_of(one).name, target["case"])):
            for row in (one for one in result["systems"] if fnmatch(one["key"], target["system"])):
                mine, base = value(row, field), reference(result, results, row, field, of)
                if mine is not None and base:
                    met = "met" if mine / base <= limit else "missed"
                    yield case_of(result).name, row["key"], field, of, limit, mine / base, met


def markdown(results: list[Result]) -> str:
    """The comparison as a table, the missed ones first."""
    rows = sorted(compared(results), key=lambda row: row[-1] == "met")
    return table("case | system | what | of | limit | measured | ", "- - - - .4g .4g -", rows)
