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
from benchmarks.report import Result, save
from benchmarks.run import DeviceLostError, measure, rounds
from benchmarks.suite import cases
from benchmarks.systems import NEEDED, entries

TINY = [Case("ace", 16, 8, 50, 4), Case("grpo", 16, 8, 50, 4, active=0.5), Case("logps", 16, 8, 50, 4)]
FEW = ("rlvr_ops", "rlvr_ops-two_pass", "rlvr_ops-no_workspace", "products-8NVH", "trl")


def is_there(path: Path, keys: Collection[str]) -> bool:
    """Whether a file has results of this very commit for all these systems, or says that they are not to be had here."""
    if not path.exists() or not commit()["id"] or commit()["dirty"]:
        return False
    stored = json.loads(path.read_text())
    if stored["commit"] != commit():
        return False
    again = {one["key"] for one in stored["absent"] if one["failed"] and one["key"].startswith("rlvr_ops")}
    return {row["key"] for row in (*stored["systems"], *stored["absent"])} - again >= set(keys)


def of_this(case: Case, keys: Collection[str] | None) -> set[str]:
    """The keys of those that take part in the case, None meaning all."""
    return {entry.key for entry in entries(case) if keys is None or entry.key in keys}


def run(case: Case, keys: set[str], here: Stage, place: Path) -> bool:
    """Measure and store one case; whether it is sound."""
    turns = {"seconds": 0, "least": 1, "most": 1} if here.tiny else rounds(here.device)
    rows, absent, _ = measure(case, here.device, keys - {*here.without}, strict=False, **turns)
    absent += [Absent(key, key, "has broken the device for all") for key in sorted(keys & {*here.without})]
    return is_sound(save(case, rows, absent, here.device, "python -m benchmarks.on_gpu", place), f"{case.name} done")


def is_sound(result: Result, said: str) -> bool:
    """Whether all of our own systems went through with numbers as they should be; printed after what is `said`."""
    ours = [one for one in result["absent"] if one["failed"] and one["key"].startswith("rlvr_ops")]
    wrong = [f"{one['name']}: {one['reason']}" for one in ours]
    wrong += [row["wrong"] for row in result["systems"] if "wrong" in row]
    print(said, *(f"\n  WRONG {why}" for why in wrong), flush=True)
    return not wrong


def begin_again(here: Stage) -> None:
    """This process anew, with what `here` says of those before: the device's context is beyond repair."""
    given = ["--out", str(here.out), "--device", str(here.device), "--seconds", f"{here.left():.0f}"]
    given += ["--tiny"] * here.tiny + ["--failed"] * here.failed
    given += ["--without", *here.without, "--skip", *here.skip]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_suite", *given])


def is_lost(device: torch.device) -> bool:
    """Whether the device's context answers every call with an error."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception:
        return True
    return False


def main() -> int:
    """Measure until the time is up; 1 if one of our own systems failed."""
    here = stage()
    place = here.out / device_folder(here.device)
    chosen = TINY if here.tiny else cases(here.device.type, quick=False)
    plan = [(case, FEW) for case in chosen[:4]] + ([] if here.tiny else [(case, None) for case in chosen])
    for case, some in plan:
        keys = of_this(case, some)
        if case.name in here.skip:
            continue
        path = place / f"{case.name}.json"
        if is_there(path, keys):
            sound = is_sound(json.loads(path.read_text()), f"{case.name} is there from an earlier run")
            here = here._replace(failed=here.failed | (not sound))
            continue
        if here.over():
            print(f"no time for {case.name}", flush=True)
            continue
        try:
            here = here._replace(failed=here.failed | (not run(case, keys, here, place)))
        except DeviceLostError as lost:
            print(case.name, lost, flush=True)
            if lost.key in here.without or lost.key in NEEDED:
                begin_again(here._replace(skip=(*here.skip, case.name), failed=True))
            begin_again(here._replace(without=(*here.without, lost.key)))
        except Exception:  # out of memory, a kernel that does not compile: the next case may do better
            print(case.name, traceback.format_exc(), flush=True)
            here = here._replace(failed=True)
            if is_lost(here.device):
                begin_again(here._replace(skip=(*here.skip, case.name)))
    return int(here.failed)


if __name__ == "__main__":
    sys.exit(main())
