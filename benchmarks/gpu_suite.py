"""The suite's cases one after another, a file of results each; a case that fails is said and passed over.

The first cases come twice: with few systems, which takes seconds, and then with all, of which some compile for minutes.
"""

import traceback

import torch

from benchmarks.cases import Case
from benchmarks.gpu_stage import stage
from benchmarks.provenance import device_folder
from benchmarks.report import save
from benchmarks.run import measure, rounds
from benchmarks.suite import cases

TINY = [Case("ace", 16, 8, 50, 4), Case("grpo", 16, 8, 50, 4, active=0.5), Case("logps", 16, 8, 50, 4)]
FEW = ("rlvr_ops", "rlvr_ops-two_pass", "rlvr_ops-no_workspace", "products-8NVH", "trl")


def main() -> None:
    """Measure until the time is up."""
    here = stage()
    place = here.out / device_folder(here.device)
    turns = {"seconds": 0, "least": 1, "most": 1} if here.tiny else rounds(here.device)
    chosen = TINY if here.tiny else cases(here.device.type, quick=False)
    plan = [(case, FEW) for case in chosen[:4]] + ([] if here.tiny else [(case, None) for case in chosen])
    for case, keys in plan:
        if here.over():
            print(f"no time for {case.name}", flush=True)
            continue
        try:
            rows, absent, _ = measure(case, here.device, keys, strict=False, **turns)
            save(case, rows, absent, here.device, "python -m benchmarks.on_gpu", place)
            print(case.name, "done", flush=True)
        except Exception:  # out of memory, a kernel that does not compile: the next case may do better
            print(case.name, traceback.format_exc(), flush=True)
        if here.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
