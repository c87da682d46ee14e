"""The suite's cases one after another, a file of results each; a case that fails is said and passed over.

The first cases come twice: with few systems, which takes seconds, and then with all, of which some compile for minutes. What
an earlier run has left in the same folder is not measured again.
"""

import json
import os
import sys
import traceback
from collections.abc import Collection
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.entrants import Absent
from benchmarks.gpu_stage import Stage, stage
from benchmarks.provenance import commit, device_folder
from benchmarks.report import save
from benchmarks.run import NOT_ASKED, DeviceLostError, measure, rounds
from benchmarks.suite import cases
from benchmarks.systems import entries

TINY = [Case("ace", 16, 8, 50, 4), Case("grpo", 16, 8, 50, 4, active=0.5), Case("logps", 16, 8, 50, 4)]
FEW = ("rlvr_ops", "rlvr_ops-two_pass", "rlvr_ops-no_workspace", "products-8NVH", "trl")


def is_there(path: Path, keys: Collection[str]) -> bool:
    """Whether a file has results of this commit for all these systems, or reasons why there are none."""
    if not path.exists():
        return False
    stored = json.loads(path.read_text())
    known = {row["key"] for row in stored["systems"]}
    known |= {one["key"] for one in stored["absent"] if one["reason"] != NOT_ASKED}
    return stored["commit"] == commit() and known >= set(keys)


def of_this(case: Case, keys: Collection[str] | None) -> set[str]:
    """The keys of those that take part in the case, None meaning all."""
    return {entry.key for entry in entries(case) if keys is None or entry.key in keys}


def run(case: Case, keys: set[str], here: Stage, place: Path) -> bool:
    """Measure and store one case; whether all of our own systems went through."""
    turns = {"seconds": 0, "least": 1, "most": 1} if here.tiny else rounds(here.device)
    rows, absent, _ = measure(case, here.device, keys - {*here.without}, strict=False, **turns)
    broke = "ended the device's context in an earlier case"
    absent = [Absent(one.key, one.name, broke if one.key in here.without else one.reason) for one in absent]
    save(case, rows, absent, here.device, "python -m benchmarks.on_gpu", place)
    ours = [one for one in absent if one.key.startswith("rlvr_ops") and one.key in keys]
    for one in ours:
        print(f"{case.name}: {one.name} is absent: {one.reason}", flush=True)
    print(case.name, "done", flush=True)
    return not ours


def begin_again(here: Stage, key: str) -> None:
    """This process anew, without the system that broke the device for it."""
    given = ["--out", str(here.out), "--device", str(here.device), "--seconds", f"{here.left():.0f}"]
    given += ["--tiny"] * here.tiny
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_suite", *given, "--without", *here.without, key])


def main() -> int:
    """Measure until the time is up; 1 if one of our own systems failed."""
    here, outcome = stage(), 0
    place = here.out / device_folder(here.device)
    chosen = TINY if here.tiny else cases(here.device.type, quick=False)
    plan = [(case, FEW) for case in chosen[:4]] + ([] if here.tiny else [(case, None) for case in chosen])
    for case, some in plan:
        keys = of_this(case, some)
        if is_there(place / f"{case.name}.json", keys):
            continue
        if here.over():
            print(f"no time for {case.name}", flush=True)
            continue
        try:
            outcome |= not run(case, keys, here, place)
        except DeviceLostError as lost:
            print(case.name, lost, flush=True)
            begin_again(here, lost.key)
        except Exception:  # out of memory, a kernel that does not compile: the next case may do better
            print(case.name, traceback.format_exc(), flush=True)
            outcome = 1
        if here.device.type == "cuda":
            torch.cuda.empty_cache()
    return int(outcome)


if __name__ == "__main__":
    sys.exit(main())
