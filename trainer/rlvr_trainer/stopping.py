"""Ctrl-C, SIGTERM and SIGHUP: a run stops where nothing is lost, and says where it goes on."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAME_REQUEST = (
    1.0  # seconds in which a second signal is the first one again: a closing terminal sends two, `timeout` too
)


class Signalled(KeyboardInterrupt):
    """A signal ended what was going on. No `Exception`: what catches the errors of a verifier or a model lets it through."""

    what_now = ""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: {self.what_now}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that the signal ended: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


class Stopped(Signalled):
    """At a point where nothing is lost."""

    what_now = "stopped before training began, nothing was lost: the same command starts again"


class StoppedAtOnce(Signalled):
    """Somewhere, because somebody insisted."""

    what_now = "stopped at once, nothing more was saved"


class Stop:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._asked_at = 0.0
        self._at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that can be given up at any point, because it is done again from the same state.

        Raises:
            Stopped: a signal came, now or before.
        """
        self._at_once = True
        try:
            self._check()
            yield
            self._check()  # Python drops what is raised in a destructor
        finally:
            self._at_once = False

    def handle(self, number: int, frame: Any) -> None:
        """What a signal does: the first is a request, another one a second later is an order."""
        now = time.monotonic()
        if self.number is not None:
            if now - self._asked_at > SAME_REQUEST:
                raise StoppedAtOnce(number)
            return
        self.number, self._asked_at = number, now
        if self._at_once:
            self._check()
        with suppress(OSError):  # print may be what was interrupted, and the terminal may be gone
            os.write(2, b"\nstopping as soon as nothing is lost by it (once more: at once, without saving)\n")

    def _check(self) -> None:
        if self.number is not None:
            raise Stopped(self.number)


@contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """Watch for signals. One that was ignored before stays so, as under nohup; outside the main thread nothing is watched."""
    stop = Stop()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
