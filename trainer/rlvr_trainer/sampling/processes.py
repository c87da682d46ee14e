"""All processes of a session: found by what /proc says, and ended, whatever has become of the one that started them.

`python -m rlvr_trainer.sampling.processes SESSION` ends them when its standard input does, as it does for whoever is killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GRACE = 5.0  # seconds to end in by itself


@contextmanager
def ended_with_us(session: int) -> Iterator[None]:
    """End the session at the end, or at the end of this process, be it by SIGKILL: another one waits for that."""
    command = [sys.executable, "-m", __name__, str(session)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):  # its exit closes the pipe and waits
        yield


def end(session: int) -> None:
    """Ask the first process, which asks the others; then kill what is left, Python's resource tracker last.

    The tracker frees shared memory and semaphores as soon as all who use it are gone.
    """
    with suppress(ProcessLookupError):
        os.kill(session, signal.SIGTERM)
    for left in _left(session):
        if session not in left:
            break
    for left in _left(session):
        _kill([pid for pid in left if not _is_tracker(pid)])
    _kill(members(session))


def members(session: int) -> list[int]:
    """Ids of the processes of a session that have not ended."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(state[3]) == session and state[0] not in "XZ":
                found.append(pid)
    return found


def _left(session: int) -> Iterator[list[int]]:
    """Its processes, again and again until there are none or `GRACE` is over."""
    deadline = time.monotonic() + GRACE
    while (left := members(session)) and time.monotonic() < deadline:
        yield left
        time.sleep(0.05)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    sys.stdin.read()
    end(int(sys.argv[1]))
