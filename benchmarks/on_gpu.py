"""Everything that a machine with an accelerator can tell, in one command and a given time, the most valuable first.

    python -m benchmarks.on_gpu --minutes 15 --out results [--only kernels main waits suite rows tuning ...]

Needs no network. Each stage runs in processes of its own: what crashes one leaves the others. JSON is written after
every case, so that a run that is cut off counts, and goes on where an earlier run of the same commit with the same --out
has stopped; a copy without .git is told its commit by RLVR_OPS_COMMIT. The suite's files lie in a folder named after the
device, ready to be copied into benchmarks/results/. What failed and the table of targets come last.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import correct, scaling, sweeps, targets, training
from benchmarks.bench_losses import LOST as LOST_BY
from benchmarks.cases import cases, leading
from benchmarks.results import BEGAN, ROOT, device_folder, devices, is_current, load, markdown, provenance, write
from benchmarks.stage import LOST, TIMED_OUT, Stage, collect, kept
from benchmarks.systems import reason, systems

PLAN = {
    "kernels": 60,
    "main": 120,
    "waits": 30,
    "suite": 120,
    "rows": 30,
    "tuning": 60,
    "demo": 45,
    "training": 90,
    "tests": 90,
    "graphs": 30,
    "products": 30,
    "scaling": 60,
}
"""Seconds of a stage's turn. A stage that has more to do gets another turn when all others had theirs."""
IN_PROCESS: dict[str, Callable[[Stage], None]] = {
    "kernels": lambda here: collect(here, correct.kernels(here)),
    "waits": lambda here: collect(here, correct.waits(here)),
    "rows": lambda here: collect(here, sweeps.few_rows(here)),
    "tuning": lambda here: collect(here, sweeps.tilings(here)),
    "demo": lambda here: collect(here, training.demos(here)),
    "training": lambda here: collect(here, training.runs(here)),
    "products": lambda here: collect(here, sweeps.products(here)),
    "scaling": lambda here: scaling.measure(here.device, here.out / device_folder(here.device), tiny=here.tiny),
}
TESTS = {  # no others, which need more packages; a failed capture may leave its process unable to do more
    "tests": (
        "tests/kernels/test_linear_exp.py",
        "tests/kernels/test_linear_lse.py",
        "tests/gpu/test_on_an_accelerator.py",
    ),
    "graphs": ("tests/gpu/test_cuda_graph.py",),
}
FAILED = 70  # exit code of a stage that could not be started
LAST_WORDS = 15  # seconds for what was interrupted to say what it has found so far
FEW = ("rlvr_ops", "trl")


def is_there(path: Path, keys: Collection[str]) -> bool:
    """Whether a file has results that are still good for all these systems, or says that they cannot be had here."""
    if not path.exists():
        return False
    stored = json.loads(path.read_text())
    absent = {one["key"] for one in stored["absent"] if not one["key"].startswith("rlvr_ops")}
    return is_current(path, stored) and {row["key"] for row in stored["systems"]} | absent >= set(keys)


def said(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def remaining(here: Stage, lost: Collection[str]) -> list[str]:
    """pytest's names of what is still to be measured, without lost systems and cases."""
    suite, found, few = cases(here.device.type, quick=here.tiny), [], here.name == "main" or here.tiny
    chosen = leading(suite) if here.name == "main" else suite[1:2] if here.tiny else suite
    for case in (one for one in chosen if one.name not in lost):
        keys = [one.key for one in systems(case) if one.key not in lost and (one.key in FEW or not few)]
        if not is_there(here.out / device_folder(here.device) / f"{case.name}.json", keys):
            found += [f"benchmarks/bench_losses.py::bench_loss[{case.name}-{key}]" for key in keys]
    return found


def measure(here: Stage) -> int:
    """The leading cases with few systems, or the suite with all; some compile for minutes.

    pytest ends when a system has broken the device for all, and begins again without it.
    """
    options = ["--benchmark", f"--benchmark-results={os.path.relpath(here.out, ROOT)}"]
    options += ["--benchmark-quick"] * here.tiny
    lost, codes = set(re.findall(LOST_BY, said(here.log))), [0]
    while tests := remaining(here, lost):
        codes.append(run(here, "pytest", "-q", *options, *tests))
        named = set(re.findall(LOST_BY, said(here.log)))
        if named <= lost:
            break
        lost |= named
    return max(codes)


def perform(here: Stage) -> int:
    """A stage in processes of its own; its exit code."""
    if here.name in ("main", "suite"):
        return measure(here)
    if here.name in TESTS:
        parallel = ["-n", "8"] if here.name == "tests" and find_spec("xdist") else []
        some = ["-k", "two_runs or captured"] if here.tiny else parallel
        # A device on which everything fails says so after 25 tests; the time is then better spent on measurements.
        return run(here, "pytest", "-q", "-m", "gpu", "--maxfail=25", *some, *TESTS[here.name])
    options = ["--until", str(here.end), "--out", str(here.out), "--device", str(here.device)]
    while (code := run(here, "benchmarks.on_gpu", "--stage", here.name, *options, *["--tiny"] * here.tiny)) == LOST:
        pass  # each time with a row more, which is not tried again
    return code


def run(here: Stage, *command: str) -> int:
    """A module with its arguments in a process of its own, ended when the time is up; its exit code, or TIMED_OUT."""
    paths = [*(str(ROOT / folder) for folder in (".", "kernels", "trainer")), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}  # works without an installation
    environment |= {"RLVR_OPS_TEST_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""} if here.device.type == "cpu" else {}
    options: Any = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    with here.log.open("a") as log:
        return ended(subprocess.Popen([sys.executable, "-m", *command], stdout=log, **options), here.left())


def ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code of a process with its own session, or TIMED_OUT if it was interrupted; nothing of it is left."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then says what has failed so far
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
        return TIMED_OUT
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Run the stages and print the table; 0 unless a stage failed. One that was out of time has not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="when to have finished")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=PLAN, default=list(PLAN), help="stages to run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to see that the script itself works")
    parser.add_argument("--stage", choices=IN_PROCESS, help="run this stage in this process")
    parser.add_argument("--until", type=float, help="when that is to end, as time.monotonic says")
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        parser.error(f"--minutes must be > 0, got {given.minutes}")
    out, device, seconds = given.out.resolve(), torch.device(given.device), 60 * given.minutes
    end = time.monotonic() + max(seconds - LAST_WORDS, seconds / 2)
    if given.stage:
        IN_PROCESS[given.stage](Stage(given.stage, out, device, given.until or end, given.tiny))
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs and what they start
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available here; --device cpu --tiny shows that the script works")
    with mock.patch.dict(os.environ, {BEGAN: str(time.time())}):
        try:
            codes = take_turns(out, device, end, given.only, tiny=given.tiny)
        finally:
            print(report(out))
    return int(any(code not in (0, TIMED_OUT) for code in codes.values()))


def take_turns(out: Path, device: torch.device, end: float, stages: list[str], *, tiny: bool) -> dict[str, int]:
    """Each stage's exit code: a turn each, and again those that were out of time; the last one left may take all."""
    path, head = out / "stages.json", provenance(device, "python -m benchmarks.on_gpu")
    codes = {row["stage"]: row["exit"] for row in kept(path) if row["exit"] == 0}
    write(path, head | {"rows": [{"stage": name, "exit": code} for name, code in codes.items()]})
    for stage in stages:
        (out / f"{stage}.log").unlink(missing_ok=True)
    while todo := [stage for stage in stages if codes.get(stage, TIMED_OUT) == TIMED_OUT]:
        for stage in todo:
            began = time.monotonic()
            seconds = end - began if len(todo) == 1 else min(end - began, PLAN[stage])
            if seconds < 1:
                return codes
            here = Stage(stage, out, device, began + seconds, tiny)
            try:
                code = perform(here)
            except Exception as error:  # whatever it is, the others go on
                code = FAILED
                print(f"{stage}: {reason(error)}", flush=True)
            codes[stage] = code
            write(path, head | {"rows": [{"stage": name, "exit": code} for name, code in codes.items()]})
            how = "out of time" if code == TIMED_OUT else f"exit {code}"
            print(f"{stage}: {how}, {time.monotonic() - began:.0f} s of {seconds:.0f}, see {here.log}", flush=True)
    return codes


def report(out: Path) -> str:
    """Tables of the cases, what was found besides, what failed, and targets met or missed."""
    found = {stage: json.loads(path.read_text())["rows"] for stage in PLAN if (path := out / f"{stage}.json").exists()}
    lines = [markdown(load(place)) for place in devices(out)]
    lines += [f"{row['shape']} {row['kernel']}: {row.get('x_products')} x products" for row in found.get("rows", [])]
    lines += sweeps.winners(found.get("tuning", [])) + [
        f"{stage}: {row}" for stage in ("demo", "training") for row in found.get(stage, [])
    ]
    for stage in (one for one in ("kernels", "waits") if one in found):
        bad = [row for row in found[stage] if "wrong" in row or "error" in row]
        lines += [f"{stage}: {len(found[stage]) - len(bad)} right", *(f"{stage}: {row}" for row in bad)]
    for log in filter(Path.exists, (out / f"{stage}.log" for stage in PLAN if stage not in IN_PROCESS)):
        *before, last = said(log).splitlines() or [""]
        failed = [line for line in before if re.search(f"^(FAILED|ERROR) |{LOST_BY}", line)]
        lines += [f"{log.stem}: {line.strip()}" for line in [*failed, last]]
    return "\n".join(lines + [targets.markdown(load(place)) for place in devices(out)])


if __name__ == "__main__":
    sys.exit(main())
