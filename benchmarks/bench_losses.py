"""Every system of every case as a test of its own; the systems of a case are measured together, in turns."""

import itertools
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, cases
from benchmarks.measure import Measured, measure, rounds, wrong
from benchmarks.peers import systems
from benchmarks.results import RESULTS, SCRATCH, Result, caption, commit, device_folder, missing, origin, save, table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {case.name: case for quick in (False, True) for case in cases(DEVICE.type, quick=quick)}


class Replay:
    """pytest-benchmark's timer, which it reads before and after every round, of times that were measured before.

    pytest-benchmark measures one system after the other. Here they take turns, so a case is measured as a whole.
    """

    __name__ = "interleaved"

    def __call__(self) -> float:
        return next(self._ticks)

    def into(self, benchmark: Any, seconds: Sequence[float], extra_info: dict[str, Any]) -> None:
        """Let the fixture `benchmark`, whose timer this is, see these durations as its rounds."""
        self._ticks = itertools.chain.from_iterable((0.0, one) for one in seconds)
        benchmark.extra_info.update(extra_info)
        benchmark.pedantic(lambda: None, rounds=len(seconds))


REPLAY = Replay()


class Recorder:
    """Measures a case when its first test asks for it, keeps it for the others, and stores it at once.

    That goes to `results`; without it to benchmarks/results if it is whole, which quick runs and some of the systems are
    not: those go to a scratch folder.
    """

    def __init__(
        self,
        chosen: Iterable[tuple[Case, str]],
        device: torch.device,
        command: str,
        *,
        quick: bool,
        results: Path | None,
    ):
        self._keys: dict[Case, set[str]] = defaultdict(set)
        for case, key in chosen:
            self._keys[case].add(key)
        commit()  # as it is now, not when the first result is written
        self._device, self._command, self._quick, self._place = device, command, quick, results
        self._done: dict[Case, Measured | Exception] = {}
        self.results: list[Result] = []

    def of(self, case: Case) -> Measured:
        """The case's measurement, made now if it was not yet; AssertionError for all its tests if a system of ours is wrong."""
        if case not in self._done:
            try:
                found = measure(case, self._device, self._keys[case], **rounds(self._device, quick=self._quick))
                if said := wrong(found.rows.values(), found.absent.values()):
                    raise AssertionError("; ".join(said))
                self.results.append(save(case, found, self._device, self._command, self.folder(case)))
                self._done[case] = found
            except Exception as error:
                self._done[case] = error
        if isinstance(done := self._done[case], Exception):
            raise done
        return done

    def folder(self, case: Case) -> Path:
        whole = not self._quick and self._keys[case] == {system.key for system in systems(case)}
        return (self._place or (RESULTS if whole else SCRATCH)) / device_folder(self._device)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        lines = [line for result in self.results for line in ("", caption(result), *table(result))]
        lines += ["", *missing(self.results), "", origin(self.results)] if self.results else []
        for line in [*lines, *sorted({f"stored in {self.folder(case)}" for case in self._done})]:
            terminalreporter.write_line(line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    items = []
    for case in cases(DEVICE.type, quick=metafunc.config.getoption("--benchmark-quick")):
        mark = pytest.mark.benchmark(group=case.name, timer=REPLAY)
        items += [pytest.param(case.name, system.key, marks=mark) for system in systems(case)]
    metafunc.parametrize(("case", "system"), items)


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Recorder:
    """What this session has measured, of the tests that it was asked for."""
    config = request.config
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = [(CASES[one["case"]], one["system"]) for one in params if {"case", "system"} <= one.keys()]
    options: Any = {name: config.getoption(f"--benchmark-{name}") for name in ("quick", "results")}
    found = Recorder(chosen, DEVICE, shlex.join(["pytest", *config.invocation_params.args]), **options)
    config.pluginmanager.register(found)
    return found


@pytest.mark.timeout(3600)
def bench_loss(case: str, system: str, recorder: Recorder, benchmark: Any) -> None:
    """A system's times as pytest-benchmark's rounds, and its row of the table as extra_info."""
    found = recorder.of(CASES[case])
    if system in found.absent:
        pytest.skip(f"{found.absent[system]['name']}: {found.absent[system]['reason']}")
    REPLAY.into(benchmark, [1e-3 * time for time in found.times[system]], found.rows[system])
