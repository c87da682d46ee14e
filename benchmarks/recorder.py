"""Measures a case when its first test asks for it, keeps it for the others, and writes its results at once."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.entrants import Absent
from benchmarks.provenance import commit
from benchmarks.report import SCRATCH, Result, device_folder, folder, save
from benchmarks.run import Row, measure, rounds
from benchmarks.systems import entries

RECORDER = pytest.StashKey["Recorder"]()


class Measured(NamedTuple):
    """A case's rows, absent systems and times in milliseconds, by the system's key."""

    rows: dict[str, Row]
    absent: dict[str, Absent]
    times: dict[str, list[float]]


class Recorder:
    """Results go to `place`; without one to benchmarks/results if they are whole, which quick runs and some of the systems
    are not: those go to a scratch folder."""

    def __init__(
        self, chosen: Iterable[tuple[Case, str]], device: torch.device, command: str, *, quick: bool, place: Path | None
    ):
        self._chosen: dict[Case, set[str]] = defaultdict(set)
        for case, key in chosen:
            self._chosen[case].add(key)
        commit()  # as it is now, not when the first result is written
        self._device, self._command, self._quick, self._place = device, command, quick, place
        self._done: dict[Case, Measured | Exception] = {}
        self.results: list[Result] = []
        self.places: set[Path] = set()

    def of(self, case: Case) -> Measured:
        """The case's measurement, made now if it was not yet.

        Raises:
            AssertionError: rlvr_ops is further from the truth than eager; for every test of the case.
        """
        if case not in self._done:
            try:
                self._done[case] = self._measure(case)
            except Exception as error:
                self._done[case] = error
        found = self._done[case]
        if isinstance(found, Exception):
            raise found
        return found

    def _measure(self, case: Case) -> Measured:
        turns: dict[str, Any] = rounds(self._device, quick=self._quick)
        rows, absent, times = measure(case, self._device, self._chosen[case], **turns)
        place = self._folder(case)
        self.results.append(save(case, rows, absent, self._device, self._command, place))
        self.places.add(place)
        return Measured({row["key"]: row for row in rows}, {one.key: one for one in absent}, times)

    def _folder(self, case: Case) -> Path:
        if self._place is not None:
            return self._place / device_folder(self._device)
        whole = self._chosen[case] == {entry.key for entry in entries(case)}
        return folder(self._device) if whole and not self._quick else SCRATCH / device_folder(self._device)
