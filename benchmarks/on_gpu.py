"""Everything that a machine with an accelerator can tell, in one command and a given time, the most valuable first.

    python -m benchmarks.on_gpu --minutes 20 --out results [--only tests products suite launches graphs scaling tuning]

Needs no network. Each stage runs in processes of its own: what crashes one leaves the others. JSON is written after
every case, so that a run that is cut off counts, and the suite goes on where an earlier run of the same commit with the
same --out has stopped; a copy without .git is told its commit by RLVR_OPS_COMMIT. The suite's files lie in a folder
named after the device, ready to be copied into benchmarks/results/. Tables of all come last.
"""

import argparse
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rlvr_kernels.gemm import FOLD_CANDIDATES, LEAVE_CANDIDATES
from rlvr_kernels.linear_exp import linear_exp
from rlvr_kernels.linear_lse import linear_lse
from rlvr_kernels.logits import LogitMap
from rlvr_kernels.tile import Tile, TileShape

from benchmarks import scaling, targets
from benchmarks.bench_losses import LOST
from benchmarks.cases import Case, cases
from benchmarks.measure import Step, bare_matmuls, interleave, spread
from benchmarks.results import ROOT, commit, device_folder, devices, load, markdown, provenance, write
from benchmarks.systems import reason, systems

SHARES = {"tests": 0.3, "products": 0.1, "suite": 0.7, "launches": 0.2, "graphs": 0.2, "scaling": 0.4, "tuning": 1.0}
"""How much of the time that is left a stage may take; the last one may take all."""
TESTS = {  # no others, which need more packages; a failed capture may leave its process unable to do more
    "tests": (
        "tests/kernels/test_linear_exp.py",
        "tests/kernels/test_linear_lse.py",
        "tests/gpu/test_on_an_accelerator.py",
    ),
    "graphs": ("tests/gpu/test_cuda_graph.py",),
}
TIMED_OUT = 124  # exit code
LAST_WORDS = 15  # seconds for what was interrupted to say what it has found so far
FEW = ("rlvr_ops", "trl")
SHAPES = [(n, 4096, c) for n in (2048, 4096, 8192) for c in (8192, 16384, 32768, 131072)]
Choice = tuple[dict[str, Any], float, Step, Step]  # a label, FLOPs, what is timed, and bare products beside it


class Stage(NamedTuple):
    """Which one, where to write, on what to run, until when (time.monotonic), and whether on toy shapes."""

    name: str
    out: Path
    device: torch.device
    end: float
    tiny: bool = False

    @property
    def log(self) -> Path:
        return self.out / f"{self.name}.log"

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())


def timed(here: Stage, choices: Iterator[Choice]) -> None:
    """Measure each choice in turns with its bare products, by which those minutes apart compare, until time is up."""
    rows: list[dict[str, Any]] = []
    for label, flops, *steps in itertools.takewhile(lambda _: here.left() > 0, choices):
        try:
            interleave(steps, here.device, seconds=0, least=2, most=2)  # warm up
            times = interleave(steps, here.device, seconds=0.3, least=1 if here.tiny else 10, most=50)
            ms, products = (spread(mine)["median_ms"] for mine in times)
            found = {"ms": ms, "tflops": 1e-9 * flops / ms, "x_products": ms / products}
            rows.append(label | {key: round(value, 4) for key, value in found.items()})
        except Exception as error:  # a tile that does not fit, a compiler that gives up
            rows.append(label | {"ms": reason(error)})
        write(here.out / f"{here.name}.json", rows)


def products(here: Stage) -> Iterator[Choice]:
    """The products that the head is made of, written in their operands' dtype, in float32, and added to float32."""
    low, wide = (torch.bfloat16, {"out_dtype": torch.float32}) if here.device.type == "cuda" else (torch.float32, {})
    for n, h, c in [(16, 8, 50)] if here.tiny else SHAPES:
        hidden, weight, tile = (torch.randn(s, device=here.device).to(low) for s in ((n, h), (c, h), (n, c)))
        bare = partial(torch.mm, hidden, weight.T, out=torch.empty_like(tile))
        for name, x, y in (("logits", hidden, weight.T), ("d_hidden", tile, weight), ("d_weight", tile.T, hidden)):
            out, total = (torch.empty(len(x), y.shape[1], device=here.device, dtype=t) for t in (low, torch.float32))
            forms = {name: partial(torch.mm, x, y, out=out), f"{name} fp32": partial(torch.mm, x, y, out=total, **wide)}
            forms[f"{name} += fp32"] = partial(torch.addmm, total, x, y, out=total, **wide)
            for form, step in forms.items():
                yield {"n": n, "h": h, "c": c, "form": form}, 2.0 * n * h * c, step, bare


def tilings(here: Stage) -> Iterator[Choice]:
    """linear_lse and linear_exp with each tiling that could be the one for this GPU, at three shapes."""
    shapes = [(16, 8, 50)] if here.tiny else [(8192, 4096, 131072), (8192, 896, 151936), (16384, 2048, 151936)]
    target = ("cuda", 10 * torch.cuda.get_device_capability()[0]) if here.device.type == "cuda" else ("cpu", 0)
    for n, h, v in shapes:
        case = Case("logps", n, h, v, 4 if here.tiny else 16, "float32" if target[0] == "cpu" else "bfloat16")
        batch = case.batch(here.device)
        hidden, weight, ids = batch.hidden.flatten(0, 1), batch.weight, batch.ids.flatten()
        tile = Tile(TileShape(n, v), hidden.dtype, here.device).part(n, v)
        leave = partial(linear_exp, hidden, weight, ids, LogitMap(torch.ones(n, device=here.device)), tile)
        fold, bare = partial(linear_lse, hidden, weight, ids), bare_matmuls(case, batch)
        for table, module, step, known in (
            ("FOLD", "linear_lse", fold, FOLD_CANDIDATES),
            ("LEAVE", "linear_exp", leave, LEAVE_CANDIDATES),
        ):
            for one in known.get(target, (None,)):
                tiled = step if one is None else mock.patch(f"rlvr_kernels.{module}.tiling", return_value=one)(step)
                yield {"table": table, "shape": (n, h, v), "tiling": str(one)}, case.flops, tiled, bare


def winners(rows: list[dict[str, Any]]) -> list[str]:
    """For each table of gemm.py, the line of the tiling that was fastest over all shapes, as multiples of the products."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["table"], row["tiling"]), []).append(math.log(row.get("x_products", math.inf)))
    best = {
        table: min((sum(x) / len(x), tiling) for (name, tiling), x in found.items() if name == table)
        for table, _ in found
    }
    return [f"fastest: {table}[...] = {tiling}  # {math.exp(x):.3f} x products" for table, (x, tiling) in best.items()]


IN_PROCESS: dict[str, Callable[[Stage], None]] = {
    "products": lambda here: timed(here, products(here)),
    "scaling": lambda here: scaling.measure(here.device, here.out / device_folder(here.device), tiny=here.tiny),
    "tuning": lambda here: timed(here, tilings(here)),
}


def is_there(path: Path, keys: Collection[str]) -> bool:
    """Whether a file has results of this very commit for all these systems, or says that they cannot be had here."""
    if not path.exists() or not commit()["id"] or commit()["dirty"]:
        return False
    stored = json.loads(path.read_text())
    absent = {one["key"] for one in stored["absent"] if not one["key"].startswith("rlvr_ops")}
    return stored["commit"] == commit() and {row["key"] for row in stored["systems"]} | absent >= set(keys)


def remaining(here: Stage, few: bool, lost: Collection[str]) -> list[str]:
    """pytest's names of what is still to be measured, without lost systems and cases."""
    suite, found = cases(here.device.type, quick=here.tiny), []
    short = [case for case in suite if case.rows < 1024][:2]  # so short that the launches count
    chosen = short if here.name == "launches" else suite[:3] if few else suite
    for case in (one for one in chosen if one.name not in lost):
        keys = [one.key for one in systems(case) if one.key not in lost and (one.key in FEW or not few)]
        if not is_there(here.out / device_folder(here.device) / f"{case.name}.json", keys):
            found += [f"benchmarks/bench_losses.py::bench_loss[{case.name}-{key}]" for key in keys]
    return found


def measure(here: Stage) -> int:
    """The suite's first cases with few systems, which takes seconds, then all with all; some compile for minutes.

    pytest ends when a system has broken the device for all, and begins again without it.
    """
    options = [
        "--benchmark",
        f"--benchmark-results={os.path.relpath(here.out, ROOT)}",
        *["--benchmark-quick"] * here.tiny,
    ]
    lost, codes = set[str](), [0]
    for few in (True, False) if here.name == "suite" and not here.tiny else (True,):
        while tests := remaining(here, few, lost):
            codes.append(run(here, "pytest", "-q", *options, *tests))
            named = set(re.findall(LOST, here.log.read_text()))
            if named <= lost:
                break
            lost |= named
    return max(codes)


def perform(here: Stage) -> int:
    """A stage in processes of its own; its exit code."""
    if here.name in ("suite", "launches"):
        return measure(here)
    if here.name in TESTS:
        parallel = ["-n", "8"] if here.name == "tests" and find_spec("xdist") else []
        some = ["-k", "two_runs or captured"] if here.tiny else parallel
        # A device on which everything fails says so after 25 tests; the time is then better spent on measurements.
        return run(here, "pytest", "-q", "-m", "gpu", "--maxfail=25", *some, *TESTS[here.name])
    options = ["--minutes", str(0.95 * here.left() / 60), "--out", str(here.out), "--device", str(here.device)]
    return run(here, "benchmarks.on_gpu", "--stage", here.name, *options, *["--tiny"] * here.tiny)


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
    parser.add_argument("--minutes", type=float, default=20.0, help="when to have finished")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), help="stages to run")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to see that the script itself works")
    parser.add_argument("--stage", choices=IN_PROCESS, help="run this stage in this process")
    given = parser.parse_args(arguments)
    out, device, end = given.out.resolve(), given.device, time.monotonic() + 60 * given.minutes
    if given.stage:
        IN_PROCESS[given.stage](Stage(given.stage, out, device, end, given.tiny))
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs and what they start
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available here; --device cpu --tiny shows that the script works")
    write(out / "machine.json", provenance(device, "python -m benchmarks.on_gpu"))
    failed = False
    for stage in given.only:
        began = time.monotonic()
        seconds = (end - began) * (1 if stage == given.only[-1] else SHARES[stage])
        here = Stage(stage, out, device, began + seconds, given.tiny)
        here.log.unlink(missing_ok=True)
        code = perform(here)
        failed |= code not in (0, TIMED_OUT)
        said = "out of time" if code == TIMED_OUT else f"exit {code}"
        print(f"{stage}: {said}, {time.monotonic() - began:.0f} s of {seconds:.0f}, see {here.log}", flush=True)
    print(table(out))
    return int(failed)


def table(out: Path) -> str:
    """A line for each product and tuned size, a table for each case, what failed in the tests, and targets met or missed."""
    lines: list[str] = []
    for path in filter(Path.exists, (out / "products.json", out / "tuning.json")):
        rows = json.loads(path.read_text())
        lines += [f"{path.stem}: {row}" for row in rows] + (winners(rows) if path.stem == "tuning" else [])
    lines += [markdown(load(place)) for place in devices(out)]
    for log in filter(Path.exists, (out / f"{stage}.log" for stage in SHARES if stage not in IN_PROCESS)):
        said = log.read_text().splitlines()
        kept = [line for line in said[:-1] if re.search(f"^(FAILED|ERROR) |{LOST}", line)]
        lines += [f"{log.stem}: {line.strip()}" for line in kept + said[-1:]]
    lines += [targets.markdown(load(place)) for place in devices(out)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
