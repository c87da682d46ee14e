"""All processes of a session and the shared memory that they use, ended whatever has become of who started them.

`python -m rlvr_trainer.sampling.processes SESSION FOLDER` ends them when its standard input does, as it does for whoever is
killed.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlvr_trainer.sampling.shared_memory import PREFIX, SHARED_MEMORY

GRACE = 5.0  # seconds to end in by itself
LOOK = 1.0  # seconds between two looks at what shared memory there is


@contextmanager
def ended_with_us(session: int, folder: str) -> Iterator[None]:
    """End the session at the end, or at the end of this process, be it by SIGKILL: another one waits for that.

    Then remove the `folder`, which the session reads from.
    """
    command = [sys.executable, "-m", __name__, str(session), folder]
    watching = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        with watching:  # whose exit closes the pipe, and waits
            yield
    finally:
        end(session)  # should that one have been killed


def end(session: int, shared: set[Path] | None = None) -> None:
    """Ask the first process, which asks the others; then kill what is left, Python's resource tracker last.

    The tracker frees what Python shares as soon as all who use it are gone. The rest is removed here: what is mapped now,
    and what is in `shared`.
    """
    shared = (shared or set()) | mapped_by(session)
    _kill([pid for pid in members(session) if pid == session], signal.SIGTERM)
    for left in _left(session):
        if session not in left:
            break
    for left in _left(session):
        _kill([pid for pid in left if not _is_tracker(pid)])
    _kill(members(session))
    for path in shared:
        with suppress(OSError):
            path.unlink()


def members(session: int) -> list[int]:
    """Ids of the processes of a session that have not ended."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(state[3]) == session and state[0] not in "XZ":
                found.append(pid)
    return found


def mapped_by(session: int) -> set[Path]:
    """The files in shared memory that a session's processes have mapped, but those of a trainer."""
    found = set()
    for pid in members(session):
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
            paths = [Path(line.split(maxsplit=5)[5]) for line in lines if f" {SHARED_MEMORY}/" in line]
            found |= {path for path in paths if not str(path).startswith(f"{SHARED_MEMORY}/{PREFIX}")}
    return found


def _left(session: int) -> Iterator[list[int]]:
    """Its processes, again and again until there are none or `GRACE` is over."""
    deadline = time.monotonic() + GRACE
    while (left := members(session)) and time.monotonic() < deadline:
        yield left
        time.sleep(0.05)


def _kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _main(session: int, folder: str) -> None:
    shared: set[Path] = set()
    while not select.select([sys.stdin], [], [], LOOK)[0]:
        shared |= mapped_by(session)  # who uses it may be the first to die
    end(session, shared)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])
