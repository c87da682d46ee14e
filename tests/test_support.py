"""README's table of versions is what the record says, and the record is what tests said."""

import subprocess
from types import SimpleNamespace

import pytest

from tools import support


def test_the_readmes_table_is_the_record():
    page = support.PAGE.read_text().split(support.BEGIN)[1].split(support.END)[0].strip()
    assert page == support.table(support.recorded())


def test_every_row_passed_something():
    assert support.recorded()
    for row in support.recorded():
        assert row.torch
        assert row.passed
        assert min(row.passed.values()) > 0


def test_a_failure_is_not_recorded(monkeypatch):
    said = SimpleNamespace(returncode=1, stdout="1 failed, 3 passed in 1s\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    with pytest.raises(RuntimeError, match="1 failed, 3 passed"):
        support._passed(support.Path("python"), "losses", [])


def test_an_environment_runs_what_it_has_packages_for(tmp_path):
    everything = dict.fromkeys(support.PACKAGES, "1.0")
    plain = tmp_path / "plain" / "bin" / "python"
    assert list(support.suites(plain, everything)) == ["losses", "kernels", "models"]
    assert list(support.suites(plain, everything | {"triton": "", "transformers": ""})) == ["losses"]
    assert list(support.suites(tmp_path / "verl" / "bin" / "python", everything)) == ["verl"]
