"""Hands times that were measured elsewhere to pytest-benchmark, which then does the statistics and the storage.

pytest-benchmark measures one system after the other. Here they take turns, so a case is measured as a whole, and each of
its tests replays its own system's times through the timer that pytest-benchmark calls before and after every round.
"""

from collections.abc import Sequence
from typing import Any


class Replay:
    """A timer for one test at a time."""

    __name__ = "interleaved"

    def __init__(self) -> None:
        self._left: list[float] = []
        self._running = False

    def __call__(self) -> float:
        """Of every two calls the first gives 0 and the second the next duration."""
        self._running = not self._running
        return 0.0 if self._running else self._left.pop(0)

    def into(self, benchmark: Any, seconds: Sequence[float], extra_info: dict[str, Any]) -> None:
        """Let the fixture `benchmark`, whose timer this is, see these durations as its rounds."""
        self._left, self._running = list(seconds), False
        benchmark.extra_info.update(extra_info)
        benchmark.pedantic(_nothing, rounds=len(seconds))


def _nothing() -> None:
    pass


REPLAY = Replay()
