"""Lines for people, which end when nobody reads any more."""

import os
import sys
from contextlib import suppress


def say(text: str) -> None:
    """Print a line. After a closed pipe or a closed terminal whoever says it goes on in silence."""
    try:
        print(text, flush=True)
    except OSError:
        mute()


def mute() -> None:
    """Send standard output nowhere, what is still buffered included."""
    with suppress(OSError, ValueError):  # no file at all, as in a notebook
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
