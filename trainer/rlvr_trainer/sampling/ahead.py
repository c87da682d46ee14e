"""Sampling of the next batch while the present one trains."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Found = TypeVar("Found")


class Ahead(Generic[Found]):
    """Runs `work` in a thread of its own, on as many CPU threads as the thread that starts it.

    Whoever starts it draws no random numbers until `wait` is over: the generators belong to `work`. The thread does not keep
    a process alive that has been told to stop at once.
    """

    def __init__(self, work: Callable[[], Found]) -> None:
        self._found: Found | None = None
        self.error: BaseException | None = None
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, args=(work,), name="sampling-ahead", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Found]) -> None:
        try:
            torch.set_num_threads(self._threads)  # OpenMP counts for each thread
            self._found = work()
        except BaseException as error:
            self.error = error

    def wait(self) -> Found | None:
        """What `work` gave, or None where it failed; then `error` says why."""
        self._thread.join()
        return self._found
