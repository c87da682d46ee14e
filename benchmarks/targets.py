"""What the head is to reach, and a line for each figure that has been measured against it."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.report import Result, row_of
from benchmarks.truth import TIE

SMALLEST = 100_000  # a language model's vocabulary: the targets are of such shapes
MAIN = "rlvr_ops", "rlvr_ops-two_pass"


class Target(NamedTuple):
    """A system's time is at most `limit` times another's in the same case, where `applies` to the case as stored."""

    system: str
    other: str
    limit: float
    applies: Callable[[dict[str, Any]], bool]


def _plain(case: dict[str, Any]) -> bool:
    return case["vocabulary"] >= SMALLEST and not (case["peaked"] or case["entropy"] or case["frozen"])


def _all_rows(case: dict[str, Any]) -> bool:
    return _plain(case) and case["active"] == 1 and case["loss"] != "logps"


def _half(case: dict[str, Any]) -> bool:
    return _plain(case) and case["active"] == 0.5


def _forward(case: dict[str, Any]) -> bool:
    return _plain(case) and case["loss"] == "logps"


ON_GPU = [
    Target("rlvr_ops", "products", 1.15, _all_rows),
    Target("rlvr_ops", "trl", 0.80, _all_rows),
    Target("rlvr_ops", "liger-scaled_ce", 0.85, _all_rows),
    Target("rlvr_ops", "liger-grpo-tf32", 0.40, _all_rows),
    Target("rlvr_ops", "verl-torch", 0.50, _all_rows),
    Target("rlvr_ops", "eager", 0.85, _all_rows),
    Target("rlvr_ops-two_pass", "products-8NVH", 1.12, _all_rows),
    Target("rlvr_ops-two_pass", "trl", 0.97, _all_rows),
    Target("rlvr_ops", "trl", 0.50, _half),
    Target("rlvr_ops", "products", 1.15, _forward),
    Target("rlvr_ops-no_workspace", "products", 1.25, _forward),
]
ON_CPU = [
    Target("rlvr_ops", "products", 1.10, _all_rows),
    Target("rlvr_ops", "eager", 0.85, _all_rows),
    Target("rlvr_ops", "trl", 0.60, _all_rows),
    Target("rlvr_ops", "liger-grpo", 0.45, _all_rows),
]
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
HALF_OF_ALL = {"cuda": 0.60, "cpu": 0.55}
TWO_PASS_BYTES = 600e6
CPU_SHARE_OF_EAGERS_PEAK = 1 / 7


def compared(results: list[Result], device_type: str) -> list[str]:
    """Every target that the results have both sides of, with what was measured, in the dtype that the device's targets are for."""
    lines = []
    results = [result for result in results if result["case"]["dtype"] == DTYPE[device_type]]
    for result in results:
        name, case = _name(result), result["case"]
        for target in ON_GPU if device_type == "cuda" else ON_CPU:
            mine, other = row_of(result, target.system), _other(result, target.other)
            if target.applies(case) and mine and other:
                ratio = mine["median_ms"] / other["median_ms"]
                lines.append(_line(name, target.system, f"x {target.other}", ratio, target.limit))
        lines += _memory(result, name, device_type)
        if device_type == "cuda":  # in float32 all are at the noise
            lines += _errors(result, name)
    lines += _half_of_all(results, device_type)
    return lines


def _line(name: str, system: str, what: str, value: float, limit: float) -> str:
    verdict = "ok" if value <= limit else "NOT MET"
    return f"{name}  {system}: {value:.3g} {what} (target {limit:.3g}) {verdict}"


def _name(result: Result) -> str:
    case = result["case"]
    kinds = [kind for kind in ("peaked", "entropy", "frozen") if case[kind]]
    shape = f"{case['rows']}x{case['hidden']}x{case['vocabulary']}"
    return " ".join([case["loss"], shape, f"{case['active']:.0%}", *kinds])


def _other(result: Result, key: str) -> Result | None:
    """A system's row; for "eager" the faster of its forms."""
    if key != "eager":
        return row_of(result, key)
    return min(
        (row for row in result["systems"] if row["kind"] == "eager"), key=lambda row: row["median_ms"], default=None
    )


def _memory(result: Result, name: str, device_type: str) -> Iterator[str]:
    """The workspace beside TRL's and the constant, on a CPU beside eager's peak."""
    if not _all_rows(result["case"]):
        return
    single, two, trl = (row_of(result, key) for key in (*MAIN, "trl"))
    eager = min((row["peak_bytes"] for row in result["systems"] if row["kind"] == "eager"), default=None)
    if device_type == "cuda":
        if two:
            yield _line(name, MAIN[1], "MB of workspace", two["workspace_bytes"] / 1e6, TWO_PASS_BYTES / 1e6)
        if single and trl:
            ratio = single["workspace_bytes"] / max(trl["workspace_bytes"], 1)
            yield _line(name, MAIN[0], "x TRL's workspace", ratio, 1.0)
    elif single and eager:
        share = single["workspace_bytes"] / eager
        yield _line(name, MAIN[0], "x eager's peak in workspace", share, CPU_SHARE_OF_EAGERS_PEAK)


def _errors(result: Result, name: str) -> Iterator[str]:
    """Each error beside TRL's and the better eager form's."""
    trl = row_of(result, "trl")
    rivals = {"TRL's": [trl] if trl else [], "eager's": [row for row in result["systems"] if row["kind"] == "eager"]}
    for key, (whose, rows), what in itertools.product(MAIN, rivals.items(), ("logps", "d_hidden", "d_weight")):
        mine = (row_of(result, key) or {}).get("errors", {}).get(what)
        best = min((row["errors"][what] for row in rows if what in row["errors"]), default=None)
        if mine is not None and best is not None:
            yield _line(name, key, f"x {whose} error of {what}", mine / max(best, 1e-30), TIE)


def _half_of_all(results: list[Result], device_type: str) -> Iterator[str]:
    """Half of the rollouts inactive beside our own time for all: each in units of its own run's products, whose work halves.

    The two cases are measured minutes apart, and a machine's clock may not be the same.
    """
    wholes = {_shape(result): result for result in results if _all_rows(result["case"])}
    for result in results:
        whole = wholes.get(_shape(result))
        if not _half(result["case"]) or whole is None:
            continue
        mine, all_rows = (_by_products(each) for each in (result, whole))
        if mine and all_rows:
            ratio = result["case"]["active"] * mine / all_rows
            yield _line(_name(result), MAIN[0], "x our own time for all rows", ratio, HALF_OF_ALL[device_type])


def _by_products(result: Result) -> float | None:
    """Our time over the bare products' of the same run."""
    mine, products = row_of(result, MAIN[0]), row_of(result, "products")
    return mine["median_ms"] / products["median_ms"] if mine and products else None


def _shape(result: Result) -> tuple[Any, ...]:
    case = result["case"]
    return case["loss"], case["rows"], case["hidden"], case["vocabulary"]
