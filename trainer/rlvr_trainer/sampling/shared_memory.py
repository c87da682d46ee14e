"""Files in the memory that the processes of one machine share, by the name of the process that made them."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "rlvr-ops-"  # then the process's id


@contextmanager
def shared_file() -> Iterator[Path]:
    """A path in shared memory that this user alone can read, and that is gone at the end."""
    path = SHARED_MEMORY / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink()


def remove_leftovers() -> None:
    """Remove the files of processes that are no more: a kill -9 leaves no time to."""
    for path in SHARED_MEMORY.glob(f"{PREFIX}*"):
        pid = path.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not _lives(int(pid)):
            with suppress(OSError):
                path.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
