"""`pytest --benchmark` runs benchmarks/; without the flag nothing there is collected."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the flag exactly: by itself it would be an abbreviation of the options that pytest-benchmark has."""
    parser.addoption("--benchmark", action="store_true", help="run benchmarks/ instead of the tests")


def pytest_configure(config: pytest.Config) -> None:
    """With the flag and no paths, the paths are benchmarks/."""
    if config.getoption("--benchmark") and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(BENCHMARKS)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave benchmarks/ out unless asked for."""
    asked = config.getoption("--benchmark")
    inside = collection_path == BENCHMARKS or BENCHMARKS in collection_path.parents
    return True if inside and not asked else None
