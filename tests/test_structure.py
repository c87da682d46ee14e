"""What the structure must reach; `python -m tools.structure` prints it."""

import re
import statistics

import pytest

from tools import structure


def test_one_forward_makes_few_calls_into_few_files():
    run = structure.forward()
    run()
    calls = structure.calls_of(run)
    assert sum(calls.values()) <= 180
    assert len({file for file, _ in calls}) <= 16


def test_the_library_has_at_most_six_storeys():
    assert max(structure.storeys().values()) <= 6


def test_integrations_stand_on_the_library_and_are_at_most_six_storeys_of_their_own():
    assert max(structure.storeys(integrations=True).values()) <= 6
    above = set(structure.sources(integrations=True))
    assert [name for name, path in structure.sources().items() if structure.imports(path, above)] == []


@pytest.mark.parametrize("integrations", [False, True])
def test_files_are_short(integrations):
    lines = structure.lengths(integrations=integrations)
    assert max(lines.values()) <= 330
    assert statistics.median(lines.values()) <= 130


def test_nothing_is_added_up_in_an_order_that_the_hardware_chooses():
    """Atomic additions would give other bits on another day."""
    atomic = re.compile(r"index_add|scatter_add|scatter_reduce|bincount|histc|tl\.atomic|index_put_?\(.*accumulate")
    folders = structure.PACKAGES.values()
    found = [path.name for folder in folders for path in folder.rglob("*.py") if atomic.search(path.read_text())]
    assert found == []


def test_only_counts_are_added_up_by_cumsum():
    """Of floating numbers torch.cumsum may give other bits each time on an accelerator: see otb.running_sum."""
    others = re.compile(r"(?<!lengths\.)(?<!counts\.)(?<!long\(\)\.)(?<!in advantages\)\]\)\.)cumsum\(")
    folders = structure.PACKAGES.values()
    found = [path.name for folder in folders for path in folder.rglob("*.py") if others.search(path.read_text())]
    assert found == []
