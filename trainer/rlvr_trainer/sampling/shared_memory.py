"""Files in the memory that the processes of one machine share, each in a folder that is locked while it is in use."""

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "rlvr-ops-"  # then the process's id


@contextmanager
def shared_file() -> Iterator[Path]:
    """A file in shared memory that this user alone can read, and that is gone at the end."""
    folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY))
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        folder = folder.rename(SHARED_MEMORY / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}")  # locked from the start
        file = folder / "weights"
        file.touch(0o600)
        yield file
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def remove_leftovers() -> None:
    """Remove what nobody holds any more: a kill -9 leaves no time to. Ids of processes say nothing across containers."""
    for folder in SHARED_MEMORY.glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody holds it, or has removed it, or it is another user's
            held = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(held)
