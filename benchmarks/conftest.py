"""Prints the results of a benchmark run at its end."""

import pytest

from benchmarks.report import SAVED, caption, provenance, table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One table a case."""
    results = config.stash.get(SAVED, [])
    for result in results:
        terminalreporter.write_line("")
        terminalreporter.write_line(caption(result))
        for line in table(result):
            terminalreporter.write_line(line)
    if results:
        terminalreporter.write_line("")
        terminalreporter.write_line(provenance(results))
