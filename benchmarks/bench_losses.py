"""Every system of every case as a test of its own; the systems of a case are measured together, in turns."""

import shlex
from typing import Any

import pytest
import torch

from benchmarks.recorder import RECORDER, Recorder
from benchmarks.replay import REPLAY
from benchmarks.suite import cases
from benchmarks.systems import entries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {case.name: case for quick in (False, True) for case in cases(DEVICE.type, quick=quick)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    items = []
    for case in cases(DEVICE.type, quick=metafunc.config.getoption("--benchmark-quick")):
        mark = pytest.mark.benchmark(group=case.name, timer=REPLAY)
        items += [pytest.param(case.name, entry.key, marks=mark) for entry in entries(case)]
    metafunc.parametrize(("case", "system"), items)


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Recorder:
    """What this session has measured, of the tests that it was asked for."""
    config = request.config
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    found = Recorder(
        [(CASES[params["case"]], params["system"]) for params in asked if {"case", "system"} <= params.keys()], DEVICE,
        shlex.join(["pytest", *config.invocation_params.args]),
        quick=config.getoption("--benchmark-quick"), place=config.getoption("--benchmark-results"),
    )  # fmt: skip
    config.stash[RECORDER] = found
    return found


@pytest.mark.timeout(3600)
def bench_loss(case: str, system: str, recorder: Recorder, benchmark: Any) -> None:
    """A system's times as pytest-benchmark's rounds, and its row of the table as extra_info."""
    measured = recorder.of(CASES[case])
    if system in measured.absent:
        absent = measured.absent[system]
        pytest.skip(f"{absent.name}: {absent.reason}")
    REPLAY.into(benchmark, [1e-3 * time for time in measured.times[system]], measured.rows[system])
