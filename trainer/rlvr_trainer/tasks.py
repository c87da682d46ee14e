"""Where problems come from and how answers are judged: reasoning-gym generators and JSON Lines files.

Held-out problems never appear in training: their seeds are disjoint, and a training problem with the prompt of a
held-out one is passed over, since small generators repeat themselves.
"""

import json
import random
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from rlvr_trainer.config import TaskConfig
from rlvr_trainer.parsing import ConfigError, nearest
from rlvr_trainer.verifier import MathVerifier

HELD_OUT_SEED = 2**30  # training seeds stay below it: SEEDS_PER_RUN apart for each run.seed
SEEDS_PER_RUN = 10**6
CHUNK = 256


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

    def score(self, problems: list[Problem], completions: list[str]) -> list[float | None]:
        """A score in [0, 1] per completion; None where the verifier failed."""

    def close(self) -> None:
        """Give back processes, if any."""


def stated_answer(completion: str, extract: str = "whole") -> str:
    """What is judged of a completion: the last `<answer>...</answer>` if there is one, then its last number if asked.

    >>> stated_answer("so <answer> 7 </answer>"), stated_answer("2 + 2 = 4.", "last_number")
    ('7', '4')
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
    text = (tagged[-1] if tagged else completion).strip()
    if extract == "last_number":
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return numbers[-1].rstrip(",") if numbers else text
    return text


def make_task(config: TaskConfig, seed: int = 0) -> Task:
    """The task named by `config.name`: a file if it looks like one, else a reasoning-gym generator.

    Raises:
        ConfigError: an unknown generator or parameter (with the nearest name), or malformed lines, by number.
    """
    if config.name.endswith((".jsonl", ".json")) or Path(config.name).is_file():
        return JsonLinesTask(config, seed)
    return ReasoningGymTask(config, seed)


class ReasoningGymTask:
    """Any generator of reasoning-gym, judged by its own `score_answer`, in this process."""

    def __init__(self, config: TaskConfig, seed: int = 0) -> None:
        self.config = config
        self.first_seed = seed % 1000 * SEEDS_PER_RUN
        self._check()
        self._chunk: tuple[int, Any] = (-1, None)
        self.held_out = self._held_out()
        self._held_out_prompts = {problem.prompt for problem in self.held_out}

    def problems(self, cursor: int, count: int) -> tuple[list[Problem], int]:
        """The next `count` problems whose prompts are not held out."""
        found: list[Problem] = []
        passed_over = 0
        while len(found) < count:
            problem = self._training_problem(cursor)
            cursor += 1
            if problem.prompt not in self._held_out_prompts:
                found.append(problem)
                passed_over = 0
            elif (passed_over := passed_over + 1) > 1000:
                raise ConfigError(
                    f"task.held_out = {self.config.held_out} leaves nothing to train on: every problem of"
                    f" {self.config.name!r} with these parameters is held out."
                )
        return found, cursor

    def score(self, problems: list[Problem], completions: list[str]) -> list[float | None]:
        """The generator's own score of the stated answer; None if it raises."""
        return [self._score(problem, text) for problem, text in zip(problems, completions, strict=True)]

    def close(self) -> None:
        """Nothing to give back."""

    def _score(self, problem: Problem, completion: str) -> float | None:
        try:
            score = float(self._judge.score_answer(stated_answer(completion, self.config.extract), problem.entry))
        except Exception:
            return None
        return score if 0.0 <= score <= 1.0 else None  # NaN included

    def _dataset(self, seed: int, size: int) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset(self.config.name, seed=seed, size=size, **self.config.parameters)

    def _check(self) -> None:
        from reasoning_gym.factory import DATASETS

        name = self.config.name
        if name not in DATASETS:
            raise ConfigError(f"unknown task.name {name!r}{nearest(name, DATASETS)} A file must end in .jsonl")
        known = [f.name for f in fields(DATASETS[name][1]) if f.name not in ("seed", "size")]
        for key in self.config.parameters:
            if key not in known:
                raise ConfigError(f"unknown key task.parameters.{key} for {name!r}{nearest(key, known)}")
        try:
            self._judge = self._dataset(0, 1)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"task.parameters {self.config.parameters} do not suit {name!r}: {error}") from error

    def _problem(self, entry: dict[str, Any]) -> Problem:
        return Problem(entry["question"] + self.config.instruction, str(entry["answer"]), entry)

    def _training_problem(self, cursor: int) -> Problem:
        chunk, index = divmod(cursor, CHUNK)
        if self._chunk[0] != chunk:
            self._chunk = (chunk, self._dataset(self.first_seed + chunk * CHUNK, CHUNK))
        return self._problem(self._chunk[1][index])

    def _held_out(self) -> list[Problem]:
        wanted = self.config.held_out
        dataset = self._dataset(HELD_OUT_SEED, wanted * 50)
        distinct: dict[str, Problem] = {}
        for index in range(wanted * 50):
            problem = self._problem(dataset[index])
            distinct.setdefault(problem.prompt, problem)
            if len(distinct) == wanted:
                return list(distinct.values())
        raise ConfigError(
            f"task.held_out = {wanted}, but {self.config.name!r} with these parameters gave only {len(distinct)}"
            f" different problems in {wanted * 50} tries."
        )


class JsonLinesTask:
    """A file of {"prompt": ..., "answer": ...} lines judged by math-verify; the last lines are held out."""

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
        self._verify = MathVerifier(config.verifier_processes, config.verifier_timeout)
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

    def score(self, problems: list[Problem], completions: list[str]) -> list[float | None]:
        """1.0 where math-verify finds the answers equal, 0.0 where not, None where it failed."""
        extract = self.config.extract
        return self._verify(
            [(p.answer, stated_answer(text, extract)) for p, text in zip(problems, completions, strict=True)]
        )

    def close(self) -> None:
        """End the verifier's processes."""
        self._verify.close()


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
