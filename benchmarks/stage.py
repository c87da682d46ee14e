"""A stage of on_gpu that runs in a process of its own: how long it may take, and its rows, each written when it is there."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import check
from benchmarks.results import is_current, provenance, write
from benchmarks.systems import Missing, reason

TIMED_OUT, LOST = 124, 3  # exit codes: there is more to do; nothing runs on the device any more
Row = dict[str, Any]
Work = tuple[Row, Callable[[], Row]]  # a label, and what measures it


class Stage(NamedTuple):
    """Which one, where to write, on what to run, until when (time.monotonic), and whether on toy shapes."""

    name: str
    out: Path
    device: torch.device
    end: float
    tiny: bool = False

    @property
    def log(self) -> Path:
        return self.out / f"{self.name}.log"

    @property
    def rows(self) -> Path:
        return self.out / f"{self.name}.json"

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())


def kept(path: Path) -> list[Row]:
    """The rows of a file that are still good."""
    stored = json.loads(path.read_text()) if path.exists() else None
    return stored["rows"] if stored and is_current(path, stored) else []


def collect(here: Stage, works: Iterator[Work]) -> None:
    """Add a row for each piece of work: its label, and what it finds or the error. What there is already is left out.

    Raises:
        SystemExit: 1 if a row is wrong or an error; TIMED_OUT, or LOST after a row that has broken the device: to be called again.
    """
    command, rows = f"python -m benchmarks.on_gpu --only {here.name}", kept(here.rows)
    for label, find in works:
        if any(label.items() <= row.items() for row in rows):
            continue
        if not here.left():
            raise SystemExit(TIMED_OUT)
        try:
            rows.append(label | find())
        except Missing as error:
            rows.append(label | {"missing": reason(error)})
        except Exception as error:
            rows.append(label | {"error": reason(error)})
        write(here.rows, provenance(here.device, command) | {"rows": rows})
        if check(here.device):
            raise SystemExit(LOST)
    if any("wrong" in row or "error" in row for row in rows):
        raise SystemExit(1)
    if any(row.get("left") for row in rows[-1:]):
        raise SystemExit(TIMED_OUT)
