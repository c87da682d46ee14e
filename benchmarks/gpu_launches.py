"""What launches cost: a call at 256 rows beside eager, and whether a CUDA graph can hold a forward and backward."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Batch, Case
from benchmarks.entrants import reason
from benchmarks.gpu_choices import loss_step
from benchmarks.gpu_stage import Stage, stage
from benchmarks.report import write
from benchmarks.run import measure

CASE = Case("ace", 256, 4096, 131072, 4, "bfloat16")
TINY = Case("ace", 16, 8, 50, 4)
LIMIT = 1.5
ROUNDING = 1e-2  # of two ways to the same bfloat16 gradient


def overhead(case: Case, here: Stage) -> dict[str, Any]:
    """The whole call beside eager, where launches weigh most."""
    turns: dict[str, Any] = {"seconds": 0, "least": 1, "most": 1} if here.tiny else {}
    rows, *_ = measure(case, here.device, ["rlvr_ops"], strict=False, **turns)
    mine = next(row for row in rows if row["key"] == "rlvr_ops")
    ratio = mine["ratio_to_eager"]
    verdict = "ok" if ratio <= LIMIT else "NOT MET"
    return {
        "what": f"whole call, N={case.rows}",
        "ms": mine["median_ms"],
        "x_eager": ratio,
        "target": LIMIT,
        "is": verdict,
    }


def graph(batch: Batch, schedule: str) -> str:
    """Whether one forward and backward can be captured in a CUDA graph that gives the same gradients when replayed."""
    if batch.hidden.device.type != "cuda":
        return "needs a CUDA GPU"
    step = partial(loss_step, batch, schedule)
    try:
        want: Any = step()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            got: Any = step()
        captured.replay()
        torch.cuda.synchronize()
    except Exception as error:
        return f"FAILED: {reason(error)}"
    norm = torch.linalg.vector_norm
    off = max(float(norm(g.float() - w.float()) / norm(w.float())) for g, w in zip(got, want, strict=True))
    return "passed" if off < ROUNDING else f"FAILED: gradients are {off:.1e} from those without the graph"


def main() -> None:
    """Overhead first: what fails in a capture may leave the device unusable."""
    here = stage()
    case = TINY if here.tiny else CASE
    rows = [overhead(case, here)]
    write(here.out / "launches.json", rows)
    batch = replace(case, rows=4 * case.rows).batch(here.device)
    for schedule in ("auto", "two_pass"):
        rows.append({"what": f"CUDA graph, {schedule}", "is": graph(batch, schedule)})
        write(here.out / "launches.json", rows)


if __name__ == "__main__":
    main()
