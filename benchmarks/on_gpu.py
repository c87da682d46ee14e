"""Everything that a machine with an accelerator can tell, in one command and a given time, the most valuable first.

    python -m benchmarks.on_gpu --minutes 20 --out results [--only tests products suite launches graphs scaling tuning]

Needs no network. Each stage runs in a process of its own: what crashes one leaves the others. JSON is written after every
single case, so that a run that is cut off still counts, and the suite goes on where an earlier run of the same commit with
the same --out has stopped; a copy without .git is told its commit by RLVR_OPS_COMMIT. The suite's files lie in a folder
named after the device, ready to be copied into benchmarks/results/. A table against the targets comes last.
"""

import argparse
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rlvr_kernels.linear_lse import linear_lse
from rlvr_kernels.linear_lse_tiling import CANDIDATES, Tiling

from benchmarks import scaling
from benchmarks.cases import Case, cases
from benchmarks.measure import DeviceLostError, Step, bare_matmuls, check, interleave, measure, rounds, spread, wrong
from benchmarks.peers import systems
from benchmarks.results import ROOT, commit, compared, device_folder, devices, load, provenance, save, write
from benchmarks.systems import NEEDED, reason

SHARES = {"tests": 0.3, "products": 0.1, "suite": 0.7, "launches": 0.2, "graphs": 0.2, "scaling": 0.4, "tuning": 1.0}
"""How much of the time that is left a stage may take; the last one may take all."""
TESTS = {  # no others, which need packages that the suite does not; a failed capture may leave its process unable to do more
    "tests": ("tests/kernels/test_linear_lse.py", "tests/gpu/test_on_an_accelerator.py"),
    "graphs": ("tests/gpu/test_cuda_graph.py",),
}
TIMED_OUT, AGAIN = 124, 75  # exit codes
LAST_WORDS = 15  # seconds for what was interrupted to say what it has found so far
WORTH_SAYING = r"no time for|WRONG|ended the device|from an earlier"
FEW = ("rlvr_ops", "rlvr_ops-two_pass", "products-8NVH", "trl")
TINY = [Case("ace", 16, 8, 50, 4), Case("grpo", 16, 8, 50, 4, active=0.5), Case("logps", 16, 8, 50, 4)]
LAUNCHES = [Case("ace", 256, 4096, 131072, 4, "bfloat16"), Case("ace", 256, 896, 151936, 4, "bfloat16")]
SCORED = Case("logps", 8192, 4096, 131072, 16, "bfloat16")
Choice = tuple[dict[str, Any], float, Step, Step]  # a label, FLOPs, what is timed, and bare products beside it
SHAPES = [(n, 4096, c) for n in (2048, 4096, 8192) for c in (8192, 16384, 32768, 131072)]


class Stage(NamedTuple):
    """Which one, where to write, on what to run, until when (time.monotonic), and whether on toy shapes."""

    name: str
    out: Path
    device: torch.device
    end: float
    tiny: bool = False

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())


def timed(here: Stage, choices: Iterator[Choice]) -> int:
    """Measure (label, FLOPs, step, bare products) until the time is up, in turns, so that those minutes apart compare."""
    rows: list[dict[str, Any]] = []
    for label, flops, *steps in itertools.takewhile(lambda _: here.left() > 0, choices):
        try:
            interleave(steps, here.device, seconds=0, least=2, most=2)  # warm up
            times = interleave(steps, here.device, seconds=0.3, least=1 if here.tiny else 10, most=50)
            ms, products = (spread(mine)["median_ms"] for mine in times)
            rows.append(label | {"ms": ms, "tflops": 1e-9 * flops / ms, "x_products": ms / products})
        except Exception as error:  # a tile that does not fit, a compiler that gives up
            rows.append(label | {"ms": reason(error)})
        write(here.out / f"{here.name}.json", rows)
    return 0


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
    """linear_lse as it is tiled, as it could be on this GPU, and with tiles that any GPU takes."""
    case = TINY[2] if here.tiny else SCORED
    batch = case.batch(here.device)
    bare = bare_matmuls(case, batch)
    step = partial(linear_lse, batch.hidden.flatten(0, 1), batch.weight, batch.ids.flatten())
    yield {"what": "linear_lse as chosen"}, case.flops, step, bare
    if here.device.type == "cuda":
        sizes = itertools.product(((128, 256), (128, 128), (64, 256)), (32, 64), (4, 8), (3, 4))
        plain = (Tiling(*tile, inner, warps, stages) for tile, inner, warps, stages in sizes)
        for tiling in (*CANDIDATES.get(("cuda", 10 * torch.cuda.get_device_capability()[0]), ()), *plain):
            label = " ".join(f"{name}={value}" for name, value in asdict(tiling).items() if value)
            yield {"what": "linear_lse", "tiling": label}, case.flops, partial(tiled, tiling, step), bare


def tiled(tiling: Tiling, step: Step) -> object:
    with mock.patch("rlvr_kernels.linear_lse.tiling", return_value=tiling):
        return step()


CHOICES = {"products": products, "tuning": tilings}


def is_there(path: Path, keys: Collection[str]) -> bool:
    """Whether a file has results of this very commit for all these systems, or says that they are not to be had here."""
    if not path.exists() or not commit()["id"] or commit()["dirty"]:
        return False
    stored = json.loads(path.read_text())
    again = {one["key"] for one in stored["absent"] if one["failed"] and one["key"].startswith("rlvr_ops")}
    there = {row["key"] for row in (*stored["systems"], *stored["absent"])} - again
    return stored["commit"] == commit() and there >= set(keys)


def run_case(case: Case, keys: set[str], here: Stage, without: Collection[str] = ()) -> bool:
    """Measure and store one case, unless that is done; whether all of our own systems went through with sound numbers."""
    path, how = here.out / device_folder(here.device) / f"{case.name}.json", "is there from an earlier run"
    if not is_there(path, keys):
        turns = {"seconds": 0, "least": 1, "most": 1} if here.tiny else rounds(here.device)
        found, how = measure(case, here.device, keys - {*without}, **turns), "done"
        lost = {"reason": "has broken the device for all", "failed": False}
        found.absent.update({key: {"key": key, "name": key} | lost for key in sorted(keys & {*without})})
        save(case, found, here.device, "python -m benchmarks.on_gpu", path.parent)
    stored = json.loads(path.read_text())
    said = wrong(stored["systems"], stored["absent"])
    print(case.name, how, *(f"\n  WRONG {why}" for why in said), flush=True)
    return not said


def suite(here: Stage, plan: list[tuple[Case, Collection[str] | None]]) -> int:
    """The cases one after another, a file of results each; one that fails is said and passed over.

    What breaks the device for all is remembered in lost.json, for the process that then begins again without it.
    """
    path = here.out / "lost.json"
    lost: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {"systems": [], "cases": []}
    failed = bool(lost["cases"])
    for case, some in plan:
        keys = {system.key for system in systems(case) if some is None or system.key in some}
        if not here.left() or case.name in lost["cases"]:
            print("no time for" if not here.left() else "the device was lost to", case.name, flush=True)
            continue
        try:
            failed |= not run_case(case, keys, here, lost["systems"])
        except Exception as error:  # out of memory, a kernel that does not compile: the next case may do better
            print(case.name, traceback.format_exc(), flush=True)
            failed = True
            if isinstance(error, DeviceLostError) and error.key not in (*NEEDED, *lost["systems"]):
                lost["systems"].append(error.key)
            elif isinstance(error, DeviceLostError) or check(here.device):
                lost["cases"].append(case.name)
            else:
                continue
            write(path, lost)
            return AGAIN
    return int(failed)


def plan(here: Stage) -> list[tuple[Case, Collection[str] | None]]:
    """The first cases come twice: with few systems, which takes seconds, and with all, of which some compile for minutes."""
    if here.name == "launches":
        return [(case, FEW) for case in (TINY[:1] if here.tiny else LAUNCHES)]
    chosen = TINY if here.tiny else cases(here.device.type, quick=False)
    return [*((case, FEW) for case in chosen[:4]), *((case, None) for case in chosen if not here.tiny)]


def perform(here: Stage) -> int:
    commit()  # as it is now, not when the first result is written
    if here.name in CHOICES:
        return timed(here, CHOICES[here.name](here))
    if here.name != "scaling":
        return suite(here, plan(here))
    place = ["--out", str(here.out / device_folder(here.device)), "--device", str(here.device)]
    scaling.main([*place, *(["--tiny"] if here.tiny else ["--seconds", "5"])])
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the stages and print the table; 0 unless a stage failed. One that was out of time has not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="when to have finished")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), help="stages to run")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to see that the script itself works")
    parser.add_argument("--stage", choices=SHARES.keys() - TESTS, help="run this stage in this process")
    given = parser.parse_args(arguments)
    out, device, end = given.out.resolve(), given.device, time.monotonic() + 60 * given.minutes
    if given.stage:
        return perform(Stage(given.stage, out, device, end, given.tiny))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs and what they start
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available here; --device cpu --tiny shows that the script works")
    write(out / "machine.json", provenance(device, "python -m benchmarks.on_gpu"))
    (out / "lost.json").unlink(missing_ok=True)
    failed = False
    for stage in given.only:
        began, code = time.monotonic(), AGAIN
        (out / f"{stage}.log").unlink(missing_ok=True)
        seconds = (end - began) * (1 if stage == given.only[-1] else SHARES[stage])
        while code == AGAIN:
            code = run(Stage(stage, out, device, began + seconds, given.tiny))
        failed |= code not in (0, TIMED_OUT)
        said = "out of time" if code == TIMED_OUT else f"exit {code}"
        log = f", see {out / stage}.log" if code else ""
        print(f"{stage}: {said}, {time.monotonic() - began:.0f} s of {seconds:.0f}{log}", flush=True)
    print(table(out))
    return int(failed)


def run(here: Stage) -> int:
    """A stage in a process of its own, ended when its time is up; its exit code, or TIMED_OUT."""
    seconds = here.left()
    command = ["benchmarks.on_gpu", "--stage", here.name, "--minutes", str(0.95 * seconds / 60), "--out", str(here.out)]
    command += ["--device", str(here.device), *["--tiny"] * here.tiny]
    if here.name in TESTS:
        # A device on which everything fails says so after 25 tests; the time is then better spent on what can be measured.
        command = ["pytest", "-q", "-m", "gpu", "--maxfail=25", *TESTS[here.name]]
        parallel = ["-n", "8"] if find_spec("xdist") else []
        command += [] if here.name != "tests" else ["-k", "two_runs"] if here.tiny else parallel
    paths = [*(str(ROOT / folder) for folder in (".", "kernels", "trainer")), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}  # works without an installation
    environment |= {"RLVR_OPS_TEST_DEVICE": "cpu"} if here.device.type == "cpu" else {}
    options: Any = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    with (here.out / f"{here.name}.log").open("a") as log:
        return ended(subprocess.Popen([sys.executable, "-m", *command], stdout=log, **options), seconds)


def ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code of a process with a session of its own, or TIMED_OUT if it had to be interrupted; nothing of it is left."""
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


def table(out: Path) -> str:
    """A line for each product, tuned size and target that was measured, what the suite left out, and the tests' last lines."""
    lines: list[str] = []
    for path in filter(Path.exists, (out / "products.json", out / "tuning.json")):
        for row in json.loads(path.read_text()):
            cells = (f"{key}={value:{'.4g' if isinstance(value, float) else ''}}" for key, value in row.items())
            lines.append(f"{path.stem}: {'  '.join(cells)}")
    for place in devices(out):
        lines += compared(load(place), place.name.partition("-")[0])
    for log in filter(Path.exists, (out / f"{stage}.log" for stage in SHARES)):
        said = log.read_text().splitlines()
        kept = said[-1:] if log.stem in TESTS else [line for line in said if re.search(WORTH_SAYING, line)]
        lines += [f"{log.stem}: {line.strip()}" for line in kept]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
