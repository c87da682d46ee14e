"""`pytest --benchmark` runs benchmarks/; without the flag nothing there is collected."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the flags exactly: by itself the first would be an abbreviation of the options that pytest-benchmark has."""
    parser.addoption("--benchmark", action="store_true", help="run benchmarks/ instead of the tests")
    parser.addoption("--benchmark-quick", action="store_true", help="with --benchmark: small shapes, under 3 minutes")
    parser.addoption(
        "--benchmark-results", type=Path, metavar="DIR", help="with --benchmark: where to store the results as JSON"
    )


def pytest_configure(config: pytest.Config) -> None:
    """With the flag and no paths, the paths are benchmarks/."""
    if not config.getoption("--benchmark"):
        if config.getoption("--benchmark-quick") or config.getoption("--benchmark-results"):
            raise pytest.UsageError("--benchmark-quick and --benchmark-results go with --benchmark")
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('--benchmark needs pytest-benchmark: pip install -e ".[bench]"')
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(BENCHMARKS)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave benchmarks/ out unless asked for."""
    asked = config.getoption("--benchmark")
    inside = collection_path == BENCHMARKS or BENCHMARKS in collection_path.parents
    return True if inside and not asked else None
