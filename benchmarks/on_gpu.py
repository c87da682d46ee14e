"""Everything that a machine with an accelerator can tell, in one command and a given time, the most valuable first.

    python -m benchmarks.on_gpu --minutes 20 --out results [--only tests products suite launches graphs scaling tuning]

Needs no network. In order: what the device is; the tests marked gpu; the matrix products that the schedules are built from;
the cases of the suite, measured as `pytest --benchmark` measures them; launch overhead, CUDA graphs, sweeps over each size, and
the sizes that the library has chosen without measuring. JSON is written after every single one, so that a run that is cut off still
counts, and the suite goes on where an earlier run of the same commit with the same --out has stopped; a copy without .git is told
its commit by RLVR_OPS_COMMIT.
Each stage runs in a process of its own: what crashes one leaves the others. A short table against the targets comes last.
The suite's files lie in a folder named after the device, ready to be copied into benchmarks/results/.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.provenance import ROOT, clocks, commit, device_folder, device_name, versions
from benchmarks.report import Result, devices, load, write
from benchmarks.targets import compared

SHARES = {"tests": 0.3, "products": 0.1, "suite": 0.7, "launches": 0.2, "graphs": 0.2, "scaling": 0.4, "tuning": 1.0}
"""How much of the time that is left a stage may take; the last one may take all."""

# No others, which need packages that the suite does not. A capture that fails may leave its process unable to do more.
TESTS = {
    "tests": ("tests/kernels/test_linear_lse.py", "tests/gpu/test_on_an_accelerator.py"),
    "graphs": ("tests/gpu/test_cuda_graph.py",),
}
TIMED_OUT = 124
LAST_WORDS = 15  # seconds for what was interrupted to say what it has found so far
PATHS = [*(str(ROOT / folder) for folder in (".", "kernels", "trainer")), *filter(None, [os.environ.get("PYTHONPATH")])]


class Budget:
    """Seconds until the end."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """What remains, never below 0."""
        return max(0.0, self._end - time.monotonic())


def main(arguments: list[str] | None = None) -> int:
    """Run the stages and print the table; 0 unless a stage failed. One that was out of time has not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="when to have finished")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), help="stages to run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to see that the script itself works")
    chosen = parser.parse_args(arguments)
    # A shell's background jobs ignore it, and so would what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available here; --device cpu --tiny shows that the script works")
    chosen.out = chosen.out.resolve()
    chosen.out.mkdir(parents=True, exist_ok=True)
    budget = Budget(chosen.minutes)
    write(chosen.out / "machine.json", machine(torch.device(chosen.device)))
    outcome = 0
    for stage in chosen.only:
        seconds = budget.left() * (1 if stage == chosen.only[-1] else SHARES[stage])
        began = time.monotonic()
        code = run(stage, chosen, seconds)
        outcome |= code not in (0, TIMED_OUT)
        said = "out of time" if code == TIMED_OUT else f"exit {code}"
        log = f", see {chosen.out / stage}.log" if code else ""
        print(f"{stage}: {said}, {time.monotonic() - began:.0f} s of {seconds:.0f}{log}", flush=True)
    print(table(chosen.out))
    return int(outcome)


def run(stage: str, chosen: argparse.Namespace, seconds: float) -> int:
    """One stage in a process of its own, ended after its seconds; its exit code, 124 if it was ended."""
    if stage in TESTS:
        report = f"--junit-xml={chosen.out / stage}.xml"
        # A device on which everything fails says so after 25 tests; the time is then better spent on what can be measured.
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--maxfail=25", report, *TESTS[stage]]
        command += ["-n", "8"] if stage == "tests" and not chosen.tiny and find_spec("xdist") else []
        command += ["-k", "two_runs"] if chosen.tiny and stage == "tests" else []
    elif stage == "scaling":
        place = chosen.out / device_folder(torch.device(chosen.device))
        command = [sys.executable, "-m", "benchmarks.scaling", "--out", str(place), "--device", chosen.device]
        command += ["--seconds", "0", "--shape", "64", "8", "64"] if chosen.tiny else ["--seconds", "5"]
    else:
        command = [sys.executable, "-m", f"benchmarks.gpu_{stage}", "--out", str(chosen.out), "--device", chosen.device]
        command += ["--seconds", str(seconds * 0.95), *(["--tiny"] if chosen.tiny else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}  # works without an installation
    environment |= {"RLVR_OPS_TEST_DEVICE": "cpu"} if chosen.device == "cpu" else {}
    with (chosen.out / f"{stage}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        return ended(process, seconds)


def ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code of a process with a session of its own, or 124 if it had to be interrupted; nothing of it is left."""
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


def machine(device: torch.device) -> Result:
    """The device, its clocks and the versions."""
    return {"device": device_name(device), "clocks": clocks(device), "versions": versions(), "commit": commit()}


def table(out: Path) -> str:
    """A line for each product, tuned size and target that was measured, what the suite left out, and the tests' last lines."""
    lines: list[str] = []
    for name in ("products", "tuning", "launches"):
        if (out / f"{name}.json").exists():
            rows = json.loads((out / f"{name}.json").read_text())
            lines += [f"{name}: " + "  ".join(f"{key}={_short(value)}" for key, value in row.items()) for row in rows]
    for place in devices(out):
        lines += compared(load(place), place.name.partition("-")[0])
    suite = out / "suite.log"
    said = suite.read_text().splitlines() if suite.exists() else []
    lines += [
        f"suite: {line.strip()}"
        for line in said
        if re.search(r"no time for|WRONG|ended the device|from an earlier", line)
    ]
    for stage in TESTS:
        log = out / f"{stage}.log"
        lines += [f"{stage}: {line}" for line in (log.read_text().splitlines()[-1:] if log.exists() else [])]
    return "\n".join(lines)


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
