"""What the stages of `on_gpu` share: their arguments and their clock."""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.provenance import commit


class Stage(NamedTuple):
    """Where to write, on what to run, until when, and whether on toy shapes."""

    out: Path
    device: torch.device
    end: float
    tiny: bool
    without: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    failed: bool = False

    def left(self) -> float:
        """Seconds until the time is up."""
        return self.end - time.monotonic()

    def over(self) -> bool:
        """Whether the time is up."""
        return self.left() <= 0


def stage() -> Stage:
    """The stage that the command line describes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--without", nargs="*", default=[], help="systems that have broken the device before")
    parser.add_argument("--skip", nargs="*", default=[], help="cases that have")
    parser.add_argument("--failed", action="store_true", help="something has failed before")
    given = parser.parse_args()
    commit()  # as it is now, not when the first result is written
    end = time.monotonic() + given.seconds
    device, without, skip = torch.device(given.device), tuple(given.without), tuple(given.skip)
    return Stage(given.out, device, end, given.tiny, without, skip, given.failed)
