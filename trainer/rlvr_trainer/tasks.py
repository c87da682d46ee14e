"""Where problems come from and how answers are judged: reasoning-gym generators and JSON Lines files.

Held-out problems never appear in training: their seeds are disjoint, and a training problem with the prompt of a
held-out one is passed over, since small generators repeat themselves.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlvr_trainer.config import TaskConfig
from rlvr_trainer.judging.verdict import Verdict


@dataclass(frozen=True)
class Problem:
    """One prompt and what its verifier needs."""

    prompt: str
    answer: str
    entry: dict[str, Any] = field(default_factory=dict, compare=False)


class Task(Protocol):
    """A stream of training problems addressed by a cursor, some held-out ones, and a judge."""

    held_out: list[Problem]

    def problems(self, cursor: int, count: int) -> tuple[list[Problem], int]:
        """The next `count` training problems and the cursor behind them: the same cursor, the same problems."""

    def score(self, problems: list[Problem], completions: list[str]) -> list[Verdict]:
        """A verdict on each completion."""

    def fingerprint(self) -> str:
        """A digest of everything that decides which problems come: a resumed run must find the same."""

    def close(self) -> None:
        """Give back processes, if any."""


def digest(parts: Iterable[str]) -> str:
    """Sixteen hexadecimal digits that tell lists of texts apart."""
    whole = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        whole.update(len(encoded).to_bytes(8, "little") + encoded)
    return whole.hexdigest()[:16]


def make_task(config: TaskConfig, seed: int = 0) -> Task:
    """The task named by `config.name`: a file if it looks like one, else a reasoning-gym generator.

    Raises:
        ConfigError: an unknown generator or parameter (with the nearest name), or malformed lines, by number.
    """
    from rlvr_trainer.files import JsonLinesTask
    from rlvr_trainer.gym import ReasoningGymTask

    if config.name.endswith((".jsonl", ".json")) or Path(config.name).is_file():
        return JsonLinesTask(config, seed)
    return ReasoningGymTask(config, seed)
