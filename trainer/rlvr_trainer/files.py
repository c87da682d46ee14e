"""Rows of data as a task: the last of them are held out, or those of another source."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlvr_trainer.config import TaskConfig
from rlvr_trainer.formats import choose_format
from rlvr_trainer.judging.verdict import Verdict
from rlvr_trainer.judging.workers import Workers, answers
from rlvr_trainer.parsing import ConfigError, listed
from rlvr_trainer.references import readable
from rlvr_trainer.sources import read_rows
from rlvr_trainer.tasks import Problem, digest


class FileTask:
    """Problems from rows, judged by `judging`.

    Held out are the last `held_out` problems, or the first `held_out` of `evaluation`, if that is set. What is held out
    is never trained on: a row with such a prompt is passed over.
    """

    def __init__(self, config: TaskConfig, seed: int = 0, workers: Workers | None = None) -> None:
        self.config, self.seed = config, seed
        self._workers = workers or Workers.of(config)
        self.notices: list[str] = []
        everything, self.held_out = self._read()
        held_out_prompts = {problem.prompt for problem in self.held_out}
        self._training = [problem for problem in everything if problem.prompt not in held_out_prompts]
        if not self._training:
            raise ConfigError(f"{config.name}: every prompt to train on is also a held-out one.")
        self._order: tuple[int, list[int]] = (-1, [])

    def _read(self) -> tuple[list[Problem], list[Problem]]:
        config = self.config
        everything = self._readable(config)
        if config.evaluation:
            other = replace(config, name=config.evaluation, split=config.evaluation_split)
            held_out = self._readable(other, "task.evaluation")
            if not held_out:
                raise ConfigError(f"task.evaluation: {config.evaluation} holds no problem")
            return everything, held_out[: config.held_out]
        training = len(everything) - config.held_out
        if training <= 0:
            raise ConfigError(
                f"{config.name} holds {len(everything)} different problems and task.held_out = {config.held_out}:"
                " none is left to train on."
            )
        return everything[:training], everything[training:]

    def _readable(self, config: TaskConfig, setting: str = "task.name") -> list[Problem]:
        problems, said = readable(list(dict.fromkeys(read_problems(config, setting))), self._workers, config)
        if said:
            self.notices.append(said)
        return problems

    def problems(self, cursor: int, count: int) -> tuple[list[Problem], int]:
        """The next `count` problems; every epoch has its own order, which depends on the seed and the epoch alone."""
        found = []
        for position in range(cursor, cursor + count):
            epoch, index = divmod(position, len(self._training))
            if self._order[0] != epoch:
                order = list(range(len(self._training)))
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
                self._order = (epoch, order)
            found.append(self._training[self._order[1][index]])
        return found, cursor + count

    def score(self, problems: list[Problem], completions: list[str]) -> list[Verdict]:
        """Whether each completion states one of its problem's answers, found out in worker processes."""
        pairs = zip((problem.answers for problem in problems), completions, strict=True)
        return self._workers(
            answers(pairs, extract=self.config.extract, accept_unevaluated=self.config.accept_unevaluated)
        )

    def restrict(self, fits: Callable[[Problem], bool]) -> list[Problem]:
        """Drop the problems that do not fit and give them back."""
        dropped = [problem for problem in (*self._training, *self.held_out) if not fits(problem)]
        gone, wanted = set(dropped), bool(self.held_out)
        self._training = [problem for problem in self._training if problem not in gone]
        self.held_out = [problem for problem in self.held_out if problem not in gone]
        if not self._training or (wanted and not self.held_out):
            kind = "held-out problem" if self._training else "problem to train on"
            raise ConfigError(f"{self.config.name}: no {kind} is left, {len(dropped)} were dropped.")
        self._order = (-1, [])
        return dropped

    def fingerprint(self) -> str:
        """Changes with any problem, its place in the file, the number of those held out, and what was dropped."""
        everything = [[p.prompt, p.answers] for p in (*self._training, *self.held_out)]
        return digest([str(self.seed), str(len(self.held_out)), json.dumps(everything)])

    def close(self) -> None:
        """End the workers."""
        self._workers.close()


def read_problems(config: TaskConfig, setting: str = "task.name") -> list[Problem]:
    """The problems of `config.name` in their order; `setting` is what an error calls it.

    Raises:
        ConfigError: no such source, an unknown format, or malformed rows: all of them (the first ten) by place and reason.
    """
    rows = read_rows(config.name, split=config.split, subset=config.subset, setting=setting)
    try:
        form = choose_format(config.format, config.columns, rows)
    except ConfigError as error:
        raise ConfigError(f"{config.name}, {error}") from error
    problems, wrong = [], []
    for row in rows:
        try:
            if row.fault:
                raise ValueError(row.fault)
            where = f"{Path(config.name).name}, {row.where}"
            problems.append(replace(form.problem(row.value, config.instruction), where=where))
        except ValueError as error:
            wrong.append(f"  {row.where}: {error}")
    if wrong:
        count = "1 malformed row" if len(wrong) == 1 else f"{len(wrong)} malformed rows"
        raise ConfigError(
            f"{config.name} has {count}, each needs {form.prompt!r} and {form.answer!r}:\n{listed(wrong)}"
        )
    return problems
