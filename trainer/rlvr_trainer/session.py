"""The run around the loop: its folder, which one process at a time may write to, and its clock."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlvr_trainer.checkpoints import CHECKPOINTS, list_checkpoints
from rlvr_trainer.console import METRICS
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.writing import UNFINISHED, remove, writing

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart
    fcntl = None

INITIAL_POLICY = "initial_policy"  # a policy made on the spot is kept here, the reference of a resumed run
LOCK = ".lock"
RESULTS = ("model", "eval", "summary.json", "report.png")  # of a run that came to its end


@contextmanager
def claimed(run: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """The folder of a run, for this process alone. What is in it stays until `start_anew`.

    Raises:
        ConfigError: the folder cannot be written, another process is writing to it, it holds a run that neither `resume`
            nor `overwrite` speaks of, or no run but other things.
    """
    if not resume:
        _refuse_foreign(run)
    with _locked(run):
        if not (resume or overwrite) and ((run / METRICS).exists() or list_checkpoints(run)):
            go_on = f"continue it with --resume {run}, or " if list_checkpoints(run) else ""
            raise ConfigError(f"{run} holds a run already: {go_on}choose another run.out")
        yield


def start_anew(run: Path) -> None:
    """Remove what an earlier run left, once there is something to put in its place."""
    for name in (CHECKPOINTS, INITIAL_POLICY, *RESULTS):
        remove(run / name)


def drop_results(run: Path) -> None:
    """Remove model and report of an end that a run had come to before it was continued."""
    for name in RESULTS:
        if name != "eval":
            remove(run / name)


def _refuse_foreign(run: Path) -> None:
    """A run is known by what only runs write; a `config.yaml` may be anybody's."""
    try:
        names = {path.name for path in run.iterdir() if UNFINISHED not in path.name} if run.is_dir() else set()
    except OSError as error:
        raise ConfigError(f"run.out={run} cannot be read: {error.strerror}") from error
    foreign = sorted(names - {INITIAL_POLICY})
    if foreign and not names & {LOCK, METRICS} and not list_checkpoints(run):
        raise ConfigError(f"{run} is not empty and holds no run ({foreign[0]}, ...): choose another run.out")


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """A lock that the system gives back when the process ends, however it ends."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  open as long as the run
    except OSError as error:
        raise ConfigError(f"run.out={run} cannot be written: {error.strerror}") from error
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise ConfigError(
                    f"{run} is being written to by another run, process {file.read().strip() or 'unknown'}:"
                    " wait for it, or choose another run.out"
                ) from error
            except OSError:
                pass  # a file system without locks
        with writing(run / LOCK):
            file.truncate(0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())  # nothing is left to be flushed when it is closed
        yield


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
