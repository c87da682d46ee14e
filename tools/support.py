"""Run the tests in several environments and write README's table of what was seen to work.

    python -m tools.support .venv/bin/python .venvs/trl/bin/python ...     # run, record, and write the table

An environment is an interpreter with pytest and kernels. What is installed there decides which tests run: the losses and the
kernels' twins everywhere, the kernels in Triton's interpreter with triton, models with transformers and peft, and TRL's or
verl's own tests in the environment that `.ci/setup` makes for each. A row says which versions ran together and how many tests
passed; a row with a failure, or with nothing that passed, is not recorded. Run all environments anew before a release: rows of
environments that are not named stay, with their date.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

RECORD, PAGE = Path("docs/support.json"), Path("README.md")
BEGIN, END = "<!-- support: written by tools.support -->", "<!-- end of support -->"
PACKAGES = ("torch", "triton", "transformers", "trl", "verl")
FRAMEWORKS = ("trl", "verl", "fleet")
VERSIONS = f"""
import importlib.metadata as m, json, platform
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return ""
print(json.dumps({{"python": platform.python_version()}} | {{name: version(name) for name in {PACKAGES}}}))
"""
CPU = "not interpret and not compile and not gpu and not parity"


@dataclass(frozen=True)
class Row:
    """The versions of one environment, the day, and how many tests of each kind passed there."""

    day: str
    python: str
    torch: str
    triton: str = ""
    transformers: str = ""
    trl: str = ""
    verl: str = ""
    passed: dict[str, int] = field(default_factory=dict)

    @property
    def versions(self) -> tuple[str, ...]:
        """What tells environments apart."""
        return (self.python, *[getattr(self, name) for name in PACKAGES])


def suites(interpreter: Path, versions: dict[str, str]) -> dict[str, list[str]]:
    """pytest's arguments for each suite that an environment has the packages for."""
    framework = interpreter.parent.parent.name
    if framework in FRAMEWORKS:
        return {framework: [f"tests/integrations/{framework}"]}
    found = {"losses": ["tests/losses", "tests/advantages", "tests/kernels", "-m", CPU]}
    if versions["triton"]:
        found["kernels"] = ["tests/kernels", "-m", "interpret"]
    if versions["transformers"]:
        found["models"] = ["tests/models"]
    return found


def run(interpreter: Path) -> Row:
    """Run an environment's suites.

    Raises:
        RuntimeError: a test failed; the message ends with what pytest said.
    """
    versions = json.loads(
        subprocess.run([interpreter, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    )
    # Not what was tested: beside the losses stands verl without what it needs, and in the fleet the TRL that ms-swift wants.
    beside = {".venv": "verl", "fleet": "trl"}.get(interpreter.parent.parent.name)
    if beside:
        versions[beside] = ""
    passed = {name: _passed(interpreter, name, arguments) for name, arguments in suites(interpreter, versions).items()}
    return Row(datetime.date.today().isoformat(), **versions, passed=passed)


def _passed(interpreter: Path, name: str, arguments: list[str]) -> int:
    here = {"PYTHONPATH": os.pathsep.join(str(Path(folder).resolve()) for folder in (".", "kernels", "trainer"))}
    more = {"TRITON_INTERPRET": "1"} if name == "kernels" else {}
    command = [str(interpreter), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env=os.environ | here | more, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-2000:]
    print(f"{interpreter}: {name}: {last}", flush=True)
    passed = re.findall(r"(\d+) passed", last)
    if done.returncode or not passed:
        raise RuntimeError(f"{interpreter}, {name}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return int(passed[0])


def table(rows: list[Row]) -> str:
    """Markdown, newest first."""
    lines = [
        "| Python | torch | triton | transformers | TRL | verl | tests that passed | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_order, reverse=True):
        passed = ", ".join(f"{count:,} {name}" for name, count in row.passed.items())
        lines.append("| " + " | ".join([*(version or "–" for version in row.versions), passed, row.day]) + " |")
    return "\n".join(lines)


def _order(row: Row) -> list[list[int]]:
    return [
        [int(part) for part in re.findall(r"\d+", version)[:3]] for version in (row.torch, row.python, row.transformers)
    ]


def recorded() -> list[Row]:
    """The rows on record."""
    return [Row(**row) for row in json.loads(RECORD.read_text())] if RECORD.exists() else []


def record(rows: list[Row]) -> None:
    """Write the rows, and README's table of them."""
    rows = sorted(rows, key=_order, reverse=True)
    RECORD.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Run the environments that are named; keep the rows of others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interpreters", nargs="+", type=Path, metavar="PYTHON", help="an environment's bin/python")
    for interpreter in parser.parse_args().interpreters:
        row = run(interpreter.absolute())
        record([row, *[other for other in recorded() if other.versions != row.versions]])
    print(table(recorded()))


if __name__ == "__main__":
    main()
