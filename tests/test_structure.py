"""What the structure must reach; `python -m tools.structure` prints it."""

import statistics

from tools import structure


def test_one_forward_makes_few_calls_into_few_files():
    run = structure.forward()
    run()
    calls = structure.calls_of(run)
    assert sum(calls.values()) <= 180
    assert len({file for file, _ in calls}) <= 16


def test_the_library_has_at_most_six_storeys():
    assert max(structure.storeys().values()) <= 6


def test_files_are_short():
    lines = structure.lengths()
    assert max(lines.values()) <= 330
    assert statistics.median(lines.values()) <= 130
