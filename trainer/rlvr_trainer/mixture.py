"""Several tasks at once, each with its share of the problems, its own held-out ones and its own way of judging."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, count
from pathlib import PurePath

from rlvr_trainer.config import TaskConfig
from rlvr_trainer.judging.verdict import Verdict
from rlvr_trainer.judging.workers import Workers
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.sources import ENDINGS, is_source
from rlvr_trainer.task_parts import parts_of
from rlvr_trainer.tasks import Problem, Task, digest, make_task

GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 fill the unit interval evenly, however many are taken
BITS = 48  # of a part's cursor inside the mixture's
PASSED_OVER = 1000


class MixtureTask:
    """Problem n comes from the part into whose share of [0, 1) the n-th multiple of the golden ratio falls.

    So every stretch of n problems has each part's share up to a few, and nothing has to be remembered but a cursor per
    part. The mixture's cursor is all of these in one integer: n in the lowest `BITS` bits, then part by part.
    """

    def __init__(self, config: TaskConfig, seed: int = 0, workers: Workers | None = None) -> None:
        weights, parts = zip(*parts_of(config), strict=True)
        self._bounds = [bound / sum(weights) for bound in accumulate(weights)]
        self._workers = workers or Workers.of(config, generators=not all(is_source(part.name) for part in parts))
        self._tasks = [_made(f"task.mixture[{i}]", part, seed, self._workers) for i, part in enumerate(parts)]
        self.notices = [notice for task in self._tasks for notice in task.notices]
        self.names = _names(parts)
        self._gather()
        for i in range(len(parts)):
            self._next(i, 0)  # a part whose every problem another one holds out is refused now

    def problems(self, cursor: int, count: int) -> tuple[list[Problem], int]:
        """The next `count` problems of all parts, none of which any part has held out."""
        n, *cursors = _unpacked(cursor, 1 + len(self._tasks))
        found = []
        for position in range(n, n + count):
            i = self._part_of(position)
            problem, cursors[i] = self._next(i, cursors[i])
            found.append(problem)
        return found, _packed([n + count, *cursors])

    def restrict(self, fits: Callable[[Problem], bool]) -> list[Problem]:
        """Drop the problems of every part that do not fit, and give them back."""
        dropped = [problem for task in self._tasks for problem in task.restrict(fits)]
        self._gather()
        return dropped

    def score(self, problems: list[Problem], completions: list[str]) -> list[Verdict]:
        """Each part judges its own problems, all with the same workers."""
        found: dict[int, Verdict] = {}
        for name, task in zip(self.names, self._tasks, strict=True):
            rows = [i for i, problem in enumerate(problems) if problem.task == name]
            given = task.score([problems[i] for i in rows], [completions[i] for i in rows])
            found |= zip(rows, given, strict=True)
        return [found[i] for i in range(len(problems))]

    def fingerprint(self) -> str:
        """Changes with any part, its name, its share, and their order."""
        return digest([repr(self._bounds), *self.names, *(task.fingerprint() for task in self._tasks)])

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def _gather(self) -> None:
        named = zip(self.names, self._tasks, strict=True)
        self.held_out = [replace(problem, task=name) for name, task in named for problem in task.held_out]
        self._held_out_prompts = {problem.prompt for problem in self.held_out}

    def _part_of(self, position: int) -> int:
        place = (position + 0.5) * GOLDEN % 1.0
        return next((i for i, bound in enumerate(self._bounds) if place < bound), len(self._bounds) - 1)

    def _next(self, i: int, cursor: int) -> tuple[Problem, int]:
        """The part's next problem that no other part holds out."""
        for _ in range(PASSED_OVER):
            (problem,), cursor = self._tasks[i].problems(cursor, 1)
            if problem.prompt not in self._held_out_prompts:
                return replace(problem, task=self.names[i]), cursor
        raise ConfigError(
            f"task.mixture[{i}]: other parts hold out {PASSED_OVER} problems of {self.names[i]!r} in a row"
        )


def _made(where: str, part: TaskConfig, seed: int, workers: Workers) -> Task:
    try:
        return make_task(part, seed, workers)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _names(parts: tuple[TaskConfig, ...]) -> list[str]:
    """The last part of a path without its ending; a second one of a name gets a number."""
    names: list[str] = []
    for part in parts:
        base = PurePath(part.name).name
        while base.endswith(ENDINGS):
            base = base.rpartition(".")[0]
        numbered = (f"{base}-{number}" for number in count(2))
        names.append(base if base not in names else next(name for name in numbered if name not in names))
    return names


def _packed(cursors: list[int]) -> int:
    return sum(cursor << (BITS * i) for i, cursor in enumerate(cursors))


def _unpacked(cursor: int, count: int) -> list[int]:
    return [cursor >> (BITS * i) & (2**BITS - 1) for i in range(count)]
