"""What takes part in a benchmark: a name and a function from a batch to its loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from benchmarks.cases import Batch

Loss = Callable[[Batch], Tensor]
Logps = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden (B, T, H), weight (V, H), ids (B, T) -> log-probabilities (B, T)."""


@dataclass(frozen=True)
class System:
    """A name, a kind that stays when the name tells a version, and the function."""

    name: str
    kind: str
    loss: Loss


class Absent(NamedTuple):
    """A system that can not take part here, and why."""

    name: str
    reason: str
