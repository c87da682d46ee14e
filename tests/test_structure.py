"""What the structure must reach; `python -m tools.structure` prints it."""

import re
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


def test_nothing_is_added_up_in_an_order_that_the_hardware_chooses():
    """Atomic additions would give other bits on another day."""
    atomic = re.compile(r"index_add|scatter_add|scatter_reduce|bincount|histc|tl\.atomic|index_put_?\(.*accumulate")
    folders = structure.PACKAGES.values()
    found = [path.name for folder in folders for path in folder.rglob("*.py") if atomic.search(path.read_text())]
    assert found == []
