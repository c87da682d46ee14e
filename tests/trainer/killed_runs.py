"""Runs killed at random points and then resumed: `python killed_runs.py CONFIG FOLDER COUNT SEED` makes FOLDER/run-0, run-1, ...

Each runs in a child of this process, which has imported everything and computed nothing: no thread of torch or of the
tokenizers is there that a fork could leave behind. Prints the step that each went on from, -1 where there was nothing yet.
"""

import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rlvr_trainer import checkpoints, loop
from rlvr_trainer.config import Config, load
from rlvr_trainer.parsing import ConfigError


def child(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def last_step(run: Path) -> int:
    try:
        return checkpoints.find(run).step
    except ConfigError:
        return -1


def seen(run: Path, step: int) -> float:
    """The time when the checkpoint of a step is there."""
    while not (checkpoints.folder_of(run, step) / checkpoints.STATE).is_file():
        time.sleep(0.001)
    return time.monotonic()


def import_what_a_run_imports(config: Config) -> None:
    """Once, here, so that the runs that are killed spend their time on training."""
    listed = Path(config.run.out).with_suffix(".modules")

    def work() -> None:
        loop.train(config, quiet=True)
        listed.write_text("\n".join(sys.modules))

    assert wait(child(work)) == 0
    for name in listed.read_text().split():
        with suppress(Exception):
            importlib.import_module(name)


def main(source: str, folder: str, count: str, seed: str) -> None:
    import_what_a_run_imports(load(source, [f"run.out={folder}/first"]))
    points, training = random.Random(int(seed)), (0.0, 0.0)
    for i in range(int(count) + 1):
        config = load(source, [f"run.out={folder}/run-{i}", "run.keep_checkpoints=2"])
        began = time.monotonic()
        pid = child(lambda config=config: loop.train(config, quiet=True))
        if i == 0:  # undisturbed: when its steps begin and end
            training = tuple(seen(Path(config.run.out), step) - began for step in (0, config.run.steps))
            assert wait(pid) == 0
            continue
        anywhere = (0.02, 1.5 * training[1])  # loading and reporting take most of a run, its steps a tenth
        time.sleep(points.uniform(*(training if i % 2 else anywhere)))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        step = last_step(Path(config.run.out))
        assert wait(child(lambda config=config, step=step: loop.train(config, resume=step >= 0, quiet=True))) == 0
        print(step, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
