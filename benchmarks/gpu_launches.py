"""What launches cost: a whole call at 256 rows beside eager. Whether a CUDA graph can hold a step is for the stage `graphs`."""

import sys
from typing import Any

from benchmarks.cases import Case
from benchmarks.entrants import reason
from benchmarks.gpu_stage import Stage, stage
from benchmarks.report import write
from benchmarks.run import measure

CASES = [Case("ace", 256, 4096, 131072, 4, "bfloat16"), Case("ace", 256, 896, 151936, 4, "bfloat16")]
TINY = [Case("ace", 16, 8, 50, 4)]
LIMIT = 1.5


def overhead(case: Case, here: Stage) -> dict[str, Any]:
    """The whole call beside eager, where launches weigh most."""
    turns: dict[str, Any] = {"seconds": 0, "least": 1, "most": 1} if here.tiny else {}
    rows, *_ = measure(case, here.device, ["rlvr_ops"], **turns)
    mine = next(row for row in rows if row["key"] == "rlvr_ops")
    ratio = mine["ratio_to_eager"]
    return {
        "what": f"whole call, {case.name}",
        "ms": mine["median_ms"],
        "x_eager": ratio,
        "target": LIMIT,
        "is": "a toy" if here.tiny else "ok" if ratio <= LIMIT else "NOT MET",
    }


def main() -> int:
    """Write after each case; 1 if one failed."""
    here = stage()
    rows: list[dict[str, Any]] = []
    for case in TINY if here.tiny else CASES:
        try:
            rows.append(overhead(case, here))
        except Exception as error:
            rows.append({"what": f"whole call, {case.name}", "is": f"FAILED: {reason(error)}"})
        write(here.out / "launches.json", rows)
    return int(any(row["is"].startswith("FAILED") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
