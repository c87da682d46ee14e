"""The run around the loop: its folder, its clock, and Ctrl-C."""

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlvr_trainer import checkpoints
from rlvr_trainer.console import METRICS
from rlvr_trainer.parsing import ConfigError

INITIAL_POLICY = "initial_policy"  # a policy made on the spot is kept here, the reference of a resumed run


def claim_folder(run: Path, *, resume: bool, overwrite: bool) -> Path:
    """Make sure that `run` may be written to, and give the folder of its initial policy.

    Raises:
        ConfigError: nothing to resume from, a run that neither `resume` nor `overwrite` speaks of, or a folder with
            other things in it.
    """
    if resume:
        checkpoints.latest(run)
        return run / INITIAL_POLICY
    foreign = [path.name for path in run.iterdir() if path.name != INITIAL_POLICY] if run.is_dir() else []
    if foreign and not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not empty and holds no run ({foreign[0]}, ...): choose another run.out")
    if (run / METRICS).exists() and not overwrite:
        raise ConfigError(f"{run} holds a run already: continue it with --resume {run}, or choose another run.out")
    shutil.rmtree(run / INITIAL_POLICY, ignore_errors=True)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return run / INITIAL_POLICY


class Clock:
    """Seconds by kind of work."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> float:
        """The seconds since the last lap, booked under `name`."""
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        self.total[name] = self.total.get(name, 0.0) + spent
        return spent


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that the step can finish and be saved; the second one interrupts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)
        print("\nfinishing this step, then saving (Ctrl-C again: stop now, nothing saved)", flush=True)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
