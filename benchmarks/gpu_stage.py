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

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.end


def stage() -> Stage:
    """The stage that the command line describes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    commit()  # as it is now, not when the first result is written
    return Stage(given.out, torch.device(given.device), time.monotonic() + given.seconds, given.tiny)
