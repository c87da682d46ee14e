"""The sizes that the library has chosen from counts, each beside its neighbours.

What is fastest here is what the constant should be; docs/performance-log.md then says by how much. Every choice takes
turns with the bare matrix products, so that choices which were measured minutes apart can be compared.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.entrants import reason
from benchmarks.gpu_choices import GROUPS
from benchmarks.gpu_stage import Stage, stage
from benchmarks.measure import Step, bare_matmuls, interleave, spread
from benchmarks.report import write

CASE = Case("ace", 8192, 4096, 131072, 16, "bfloat16")
TINY = Case("ace", 16, 8, 50, 4)


def timed(action: Callable[[], object], bare: Step, here: Stage) -> dict[str, Any]:
    """Median milliseconds, also in units of the bare products of the same turns, or why there are none."""
    try:
        action()
        turns: dict[str, Any] = {"seconds": 0.5, "least": 1 if here.tiny else 10, "most": 1 if here.tiny else 30}
        mine, products = (spread(times)["median_ms"] for times in interleave([action, bare], here.device, **turns))
        return {"ms": round(mine, 4), "x_products": round(mine / products, 4)}
    except Exception as error:  # a tile that does not fit, a compiler that gives up
        return {"ms": reason(error)}
    finally:
        if here.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Measure until the time is up."""
    here = stage()
    case = TINY if here.tiny else CASE
    batch = case.batch(here.device)
    forward, whole = bare_matmuls(replace(case, loss="logps"), batch), bare_matmuls(case, batch)
    rows: list[dict[str, Any]] = []
    for group in GROUPS:
        for label, action in group(batch, case):
            if here.over():
                return
            rows.append(label | timed(action, forward if label["what"].startswith("linear_lse") else whole, here))
            write(here.out / "tuning.json", rows)


if __name__ == "__main__":
    main()
