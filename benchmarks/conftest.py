"""Prints the results of a benchmark run at its end, and where they are stored."""

import pytest

from benchmarks.recorder import RECORDER
from benchmarks.report import caption, missing, provenance, table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One table a case."""
    recorder = config.stash.get(RECORDER, None)
    if recorder is None or not recorder.results:
        return
    for result in recorder.results:
        terminalreporter.write_line("")
        for line in [caption(result), *table(result)]:
            terminalreporter.write_line(line)
    for line in ["", *missing(recorder.results), "", provenance(recorder.results)]:
        terminalreporter.write_line(line)
    for place in sorted({str(place) for place in recorder.places}):
        terminalreporter.write_line(f"stored in {place}")
