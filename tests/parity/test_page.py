"""docs/parity.md names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_that_the_page_names_exists():
    page = (HERE.parents[1] / "docs" / "parity.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    files = [*HERE.glob("test_*.py"), *(HERE.parent / "integrations" / "fleet").glob("test_*.py")]
    found = {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert len(named) > 40
    assert named <= found, f"no such test: {sorted(named - found)}"
