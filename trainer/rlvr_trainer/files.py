"""A file of problems as a task; its last lines are held out."""

import json
import random
from pathlib import Path
from typing import Any

from rlvr_trainer.config import TaskConfig
from rlvr_trainer.judging.verdict import Verdict
from rlvr_trainer.judging.workers import Workers, answers
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.tasks import Problem, digest


class JsonLinesTask:
    """A file of {"prompt": ..., "answer": ...} lines judged by `judging`; the last lines are held out."""

    def __init__(self, config: TaskConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        everything = list(dict.fromkeys(read_problems(Path(config.name), config.instruction)))
        if len(everything) <= config.held_out:
            raise ConfigError(
                f"{config.name} holds {len(everything)} different problems and task.held_out = {config.held_out}:"
                " none is left to train on."
            )
        self.held_out = everything[-config.held_out :]
        held_out_prompts = {problem.prompt for problem in self.held_out}
        self._training = [p for p in everything[: -config.held_out] if p.prompt not in held_out_prompts]
        if not self._training:
            raise ConfigError(f"{config.name}: every prompt outside the held-out lines is also a held-out one.")
        self._workers = Workers(config.verifier_processes, config.verifier_timeout)
        self._order: tuple[int, list[int]] = (-1, [])

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
        """Whether each completion states its problem's answer, found out in worker processes."""
        pairs = (([problem.answer], text) for problem, text in zip(problems, completions, strict=True))
        return self._workers(
            answers(pairs, extract=self.config.extract, accept_unevaluated=self.config.accept_unevaluated)
        )

    def fingerprint(self) -> str:
        """Changes with any problem, its place in the file, and the number of those held out."""
        everything = [[p.prompt, p.answer] for p in (*self._training, *self.held_out)]
        return digest([str(self.seed), str(len(self.held_out)), json.dumps(everything)])

    def close(self) -> None:
        """End the workers."""
        self._workers.close()


def read_problems(path: Path, instruction: str = "") -> list[Problem]:
    """The problems of a JSON Lines file; blank lines are skipped.

    Raises:
        ConfigError: no such file, or malformed lines: all of them (the first ten) by number and reason.
    """
    if not path.is_file():
        raise ConfigError(f"task.name: no file {str(path)!r}")
    problems, wrong = [], []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}: line {number} is not UTF-8: {error.reason}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            problems.append(_problem(json.loads(line), instruction))
        except ValueError as error:
            wrong.append(f"  line {number}: {error}")
    if wrong:
        listed = "\n".join(wrong[:10]) + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise ConfigError(f'{path} has {len(wrong)} malformed lines, each must be {{"prompt", "answer"}}:\n{listed}')
    return problems


def _problem(row: Any, instruction: str) -> Problem:
    if not isinstance(row, dict):
        raise ValueError(f"an object is wanted, got {type(row).__name__}")
    for key in ("prompt", "answer"):
        value = row.get(key)
        if key not in row:
            raise ValueError(f"no {key!r}, only {', '.join(map(repr, row)) or 'nothing'}")
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise ValueError(f"{key!r} must be text that is not empty, got {value!r}")
    return Problem(str(row["prompt"]) + instruction, str(row["answer"]))
