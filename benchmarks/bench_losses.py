"""Every system of every case as a test of its own; the systems of a case are measured together, in turns."""

import shlex
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, cases
from benchmarks.measure import DeviceLostError, Measured, check, measure, rounds, wrong
from benchmarks.results import RESULTS, SCRATCH, device_folder, markdown, save
from benchmarks.systems import systems

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {case.name: case for quick in (False, True) for case in cases(DEVICE.type, quick=quick)}
LOST = r"LOST (\S+): "  # what a session says of the system or the case after which nothing runs on the device any more
TICKS: deque[float] = deque()
MEASURED = pytest.StashKey[dict[str, Measured | AssertionError]]()


def interleaved() -> float:
    """pytest-benchmark's timer, read before and after every round: of times that were measured before, in turns."""
    return TICKS.popleft()


def record(case: Case, keys: set[str], command: str, *, quick: bool, results: Path | None) -> Measured:
    """Measure a case and store it in `results`, or else in benchmarks/results if it is whole; quick runs and some of
    the systems go to a scratch folder. AssertionError if a system of ours is wrong, which only `results` keeps.
    """
    try:
        found = measure(case, DEVICE, keys, **rounds(DEVICE, quick=quick))
    except Exception as error:
        if why := check(DEVICE):
            pytest.exit(f"LOST {error if isinstance(error, DeviceLostError) else case.name}: {why}", 1)
        raise
    said, whole = wrong(found), not quick and keys == {system.key for system in systems(case)}
    if results or not said:
        place = (results or (RESULTS if whole else SCRATCH)) / device_folder(DEVICE)
        print(f"\n\n{markdown([save(case, found, DEVICE, command, place)])}\n\nstored in {place}")
    assert not said, "; ".join(said)
    return found


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """A case with the systems that this session was asked for: measured once, for the tests of all.

    A fixture of the module's scope would be made again wherever pytest, which groups tests by their systems too, comes back.
    """
    known = request.config.stash.setdefault(MEASURED, {})
    if request.param not in known:
        try:
            known[request.param] = _measured(request)
        except AssertionError as error:
            known[request.param] = error
    found = known[request.param]
    if isinstance(found, AssertionError):
        raise found
    return found


def _measured(request: pytest.FixtureRequest) -> Measured:
    config = request.config
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    keys = {one["system"] for one in params if one.get("measured") == request.param}
    command = shlex.join(["pytest", *(arg for arg in config.invocation_params.args if "::" not in arg)])
    options: Any = {name: config.getoption(f"--benchmark-{name}") for name in ("quick", "results")}
    capture: Any = config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        return record(CASES[request.param], keys, command, **options)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    items = []
    for case in cases(DEVICE.type, quick=metafunc.config.getoption("--benchmark-quick")):
        name, mark = case.name, pytest.mark.benchmark(group=case.name, timer=interleaved)
        items += [pytest.param(name, system.key, marks=mark) for system in systems(case)]
    metafunc.parametrize(("measured", "system"), items, indirect=["measured"])


@pytest.mark.timeout(3600)
def bench_loss(measured: Measured, system: str, benchmark: Any) -> None:
    """A system's times as pytest-benchmark's rounds, and its row of the table as extra_info."""
    if system in measured.absent:
        pytest.skip(f"{measured.absent[system]['name']}: {measured.absent[system]['reason']}")
    TICKS.extend(tick for ms in measured.times[system] for tick in (0.0, 1e-3 * ms))
    benchmark.extra_info.update(measured.rows[system])
    benchmark.pedantic(lambda: None, rounds=len(measured.times[system]))
