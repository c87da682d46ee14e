"""`python -m experiments.ace`: the runs of docs/reproduction.md, a run a core, until all are done or the budget is spent.

What has been run is not run again: results are lines of `experiments/results/TASK.jsonl`. A run that was killed goes on from
what it saved less than a minute before.
"""

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.plan import ARMS, TASKS, Cell, cells

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/ace")


def results(folder: Path = RESULTS) -> dict[Cell, dict[str, Any]]:
    """What has been run. A line that was cut short is none."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                row = json.loads(line)
                found[Cell.named(row["cell"])] = row
    return found


def keep(row: dict[str, Any], folder: Path = RESULTS) -> None:
    """Append a result to its task's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{row['cell'].partition('/')[0]}.jsonl"
    whole = not path.exists() or path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(row, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())


def end_with_parent() -> None:
    """Let this process end when the one that started it does, which else would leave it waiting for work for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)  # a run has saved what it needs

    threading.Thread(target=watch, daemon=True).start()


def work(cell: Cell, home: Path, deadline: float) -> dict[str, Any] | None:
    """Run a cell in a process of its own, which goes on to the next one afterwards."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from experiments.cell import run

    return run(cell, home, lambda: time.time() > deadline)


def run_all(
    todo: list[Cell], minutes: float, processes: int, home: Path = RUNS, folder: Path = RESULTS
) -> tuple[int, int]:
    """Run cells in order, `processes` at a time, and keep their results; how many were finished, and how many failed."""
    deadline, finished, failed, begun = time.time() + 60 * minutes, 0, 0, time.time()
    waiting, todo = dict[Future[Any], Cell](), list(todo)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, end_with_parent) as pool:
        while (todo and time.time() < deadline) or waiting:
            while todo and len(waiting) < processes and time.time() < deadline:
                cell = todo.pop(0)
                waiting[pool.submit(work, cell, home, deadline)] = cell
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                cell = waiting.pop(future)
                try:
                    row = future.result()
                except BrokenExecutor:
                    raise
                except Exception as error:
                    failed += 1
                    print(f"{cell.name} failed", file=sys.stderr)
                    traceback.print_exception(error)
                    continue
                if row is not None:
                    keep(row, folder)
                    finished += 1
                    print(f"{(time.time() - begun) / 60:6.1f} min  {cell.name}  {row['seconds']} s", flush=True)
    return finished, failed


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.ace", description=__doc__)
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="MINUTES", help="stop after these")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    parser.add_argument("--list", action="store_true", help="say what has been run, and what not")
    parser.add_argument("--again", metavar="TASK/ARM/SEED", help="run one cell from its beginning and compare")
    options = parser.parse_args(arguments)
    if not options.budget >= 0:
        parser.error(f"--budget must be 0 minutes or more, got {options.budget}")
    if options.processes < 1:
        parser.error(f"--processes must be 1 or more, got {options.processes}")
    if options.again:
        try:
            cell = Cell.named(options.again)
        except ValueError as error:
            parser.error(f"--again: {error}")
        return again(cell)
    done = results()
    todo = [cell for cell in cells() if cell not in done]
    print(f"{len(done)} of {len(cells())} runs are done: {len(TASKS)} tasks, {len(ARMS)} arms")
    if options.list:
        print("\n".join(cell.name for cell in todo))
        return 0
    finished, failed = run_all(todo, options.budget, options.processes)
    print(f"{finished} runs finished, {failed} failed, {len(todo) - finished} are left")
    return int(failed > 0)


def again(cell: Cell) -> int:
    """Run a cell from its beginning, and say whether its numbers are those of the kept result."""
    import tempfile

    with tempfile.TemporaryDirectory() as home:
        row = work(cell, Path(home), float("inf"))
    assert row is not None
    before = results().get(cell)
    same = before is not None and before["rows"] == row["rows"]
    if before is not None and before["machine"] != row["machine"]:
        print(f"kept: {before['machine']}\nhere: {row['machine']}")
    print(f"{cell.name}: {'the same digits' if same else 'other digits' if before else 'no result is kept'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
