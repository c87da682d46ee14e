"""Where problems come from and how answers are judged: reasoning-gym generators, rows of data, and mixtures of both.

Held-out problems never appear in training: their seeds are disjoint, and a training problem with the prompt of a
held-out one is passed over, since small generators repeat themselves.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlvr_trainer.config import TaskConfig
from rlvr_trainer.judging.verdict import Verdict
from rlvr_trainer.judging.workers import Workers

Prompt = str | tuple[tuple[str, str], ...]  # text, or messages as (role, content)


@dataclass(frozen=True)
class Problem:
    """One prompt and what its verifier needs. Two are equal if prompt and answers are."""

    prompt: Prompt
    answers: tuple[str, ...]  # any of them is right; a text alone is taken for one
    entry: dict[str, Any] = field(default_factory=dict, compare=False)  # of the generator, or the row as it was read
    where: str = field(default="", compare=False)  # "gsm8k.jsonl, line 7"
    task: str = field(default="", compare=False)  # the part of a mixture that it comes from

    def __post_init__(self) -> None:
        if isinstance(self.answers, str):
            object.__setattr__(self, "answers", (self.answers,))

    @property
    def answer(self) -> str:
        """The first of the right answers."""
        return self.answers[0]

    @property
    def text(self) -> str:
        """The prompt in one piece, for people and for models without a chat template."""
        return plain_text(self.prompt)


def plain_text(prompt: Prompt) -> str:
    """Messages under one another without their roles; text as it is."""
    return prompt if isinstance(prompt, str) else "\n\n".join(content for _, content in prompt if content)


class Task(Protocol):
    """A stream of training problems addressed by a cursor, some held-out ones, and a judge."""

    held_out: list[Problem]
    notices: list[str]  # what a person should know about how the data was read

    def problems(self, cursor: int, count: int) -> tuple[list[Problem], int]:
        """The next `count` training problems and the cursor behind them: the same cursor, the same problems.

        A cursor is 0 or what an earlier call gave; nothing else can be said of its size.
        """

    def restrict(self, fits: Callable[[Problem], bool]) -> list[Problem]:
        """Drop the problems that do not fit, held-out ones included, and give them back. Older cursors mean nothing then.

        An endless stream drops held-out ones only, and gives back those among its first few as well.

        Raises:
            ConfigError: nothing would be left.
        """

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


def make_task(config: TaskConfig, seed: int = 0, workers: Workers | None = None) -> Task:
    """The mixture of `config.mixture` if there is one, else the rows or the reasoning-gym generator of `config.name`.

    `workers` judge; without them the task has its own.

    Raises:
        ConfigError: an unknown generator or parameter (with the nearest name), or malformed rows, by number.
    """
    from rlvr_trainer.files import FileTask
    from rlvr_trainer.gym import ReasoningGymTask
    from rlvr_trainer.mixture import MixtureTask
    from rlvr_trainer.sources import is_source

    kind = MixtureTask if config.mixture else FileTask if is_source(config.name) else ReasoningGymTask
    judges = workers or Workers.of(config, generators=kind is not FileTask)
    try:
        return kind(config, seed, judges)
    except BaseException:
        if workers is None:
            judges.close()
        raise
