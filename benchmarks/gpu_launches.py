"""What launches cost: a whole call at 256 rows beside eager. Whether a CUDA graph can hold a step is for the stage `graphs`."""

from typing import Any

from benchmarks.cases import Case
from benchmarks.gpu_stage import Stage, stage
from benchmarks.report import write
from benchmarks.run import measure

CASES = [Case("ace", 256, 4096, 131072, 4, "bfloat16"), Case("ace", 256, 896, 151936, 4, "bfloat16")]
TINY = [Case("ace", 16, 8, 50, 4)]
LIMIT = 1.5


def overhead(case: Case, here: Stage) -> dict[str, Any]:
    """The whole call beside eager, where launches weigh most."""
    turns: dict[str, Any] = {"seconds": 0, "least": 1, "most": 1} if here.tiny else {}
    rows, absent, _ = measure(case, here.device, ["rlvr_ops"], strict=False, **turns)
    what, why = f"whole call, {case.name}", {one.key: one.reason for one in absent}
    if "rlvr_ops" in why:
        return {"what": what, "is": f"FAILED: {why['rlvr_ops']}"}
    mine = next(row for row in rows if row["key"] == "rlvr_ops")
    ratio = mine["ratio_to_eager"]
    return {
        "what": what,
        "ms": mine["median_ms"],
        "x_eager": ratio,
        "target": LIMIT,
        "is": "ok" if ratio <= LIMIT else "NOT MET",
    }


def main() -> None:
    """Write after each case."""
    here = stage()
    rows: list[dict[str, Any]] = []
    for case in TINY if here.tiny else CASES:
        rows.append(overhead(case, here))
        write(here.out / "launches.json", rows)


if __name__ == "__main__":
    main()
