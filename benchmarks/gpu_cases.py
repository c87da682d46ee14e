"""The benchmark's cases one after another, a file of results each; a case that fails is said and passed over."""

import traceback

import torch

from benchmarks.cases import GPU_CASES, Case
from benchmarks.gpu_stage import stage
from benchmarks.report import save
from benchmarks.run import measure

TINY = [Case("ace", 16, 8, 50, 4), Case("grpo", 16, 8, 50, 4)]


def main() -> None:
    """Measure until the time is up."""
    here = stage()
    turns = {"seconds": 0, "least": 1, "most": 1} if here.tiny else {}
    for case in TINY if here.tiny else GPU_CASES:
        if here.over():
            print(f"no time for {case.name}", flush=True)
            continue
        try:
            rows, absent = measure(case, here.device, **turns)
            save(case, rows, absent, here.device, "python -m benchmarks.on_gpu", here.out / "cases")
            print(case.name, "done", flush=True)
        except (AssertionError, RuntimeError):  # out of memory is a RuntimeError
            print(case.name, traceback.format_exc(), flush=True)
        if here.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
