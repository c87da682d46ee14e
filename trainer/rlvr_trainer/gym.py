"""Any generator of reasoning-gym as a task. Small generators repeat themselves, so held-out prompts are passed over in training."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from rlvr_trainer.config import TaskConfig
from rlvr_trainer.judging.verdict import Verdict
from rlvr_trainer.judging.workers import Workers, generated
from rlvr_trainer.parsing import ConfigError, nearest
from rlvr_trainer.tasks import Problem, Prompt, digest

HELD_OUT_SEED = 2**30  # training seeds stay below it: SEEDS_PER_RUN apart for each run.seed
SEEDS_PER_RUN = 10**6
CHUNK = 256


class ReasoningGymTask:
    """Any generator of reasoning-gym, judged by its own `score_answer`."""

    def __init__(self, config: TaskConfig, seed: int = 0, workers: Workers | None = None) -> None:
        self.config = config
        self.notices: list[str] = []
        self._workers = workers or Workers.of(config, generators=True)
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

    def restrict(self, fits: Callable[[Problem], bool]) -> list[Problem]:
        """Drop held-out problems that do not fit; given back with those among the first `CHUNK` training problems."""
        dropped = [problem for problem in self.held_out if not fits(problem)]
        if self.held_out and len(dropped) == len(self.held_out):
            raise ConfigError(f"{self.config.name}: no held-out problem is left, {len(dropped)} were dropped.")
        self.held_out = [problem for problem in self.held_out if problem not in dropped]
        return dropped + [problem for problem in map(self._training_problem, range(CHUNK)) if not fits(problem)]

    def score(self, problems: list[Problem], completions: list[str]) -> list[Verdict]:
        """The generator's own score of what each completion states, found out in worker processes."""
        pairs = zip((problem.entry for problem in problems), completions, strict=True)
        return self._workers(generated(self.config.name, self.config.parameters, pairs, extract=self.config.extract))

    def fingerprint(self) -> str:
        """Changes with anything that decides which problems come."""
        from importlib.metadata import version

        decides = (self.config.name, sorted(self.config.parameters.items()), self.config.instruction, self.first_seed)
        return digest([repr(decides), version("reasoning-gym"), *(p.text for p in self.held_out)])

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def _dataset(self, seed: int, size: int) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset(self.config.name, seed=seed, size=size, **self.config.parameters)

    def _check(self) -> None:
        from reasoning_gym.factory import DATASETS

        name = self.config.name
        if self.config.evaluation:
            raise ConfigError(
                f"task.evaluation is for rows, and task.name {name!r} is a generator, which holds out its own"
            )
        if name not in DATASETS:
            raise ConfigError(
                f"unknown task.name {name!r}{nearest(name, DATASETS)} No file has that name; write a folder as ./NAME."
            )
        known = [f.name for f in fields(DATASETS[name][1]) if f.name not in ("seed", "size")]
        for key in self.config.parameters:
            if key not in known:
                raise ConfigError(f"unknown key task.parameters.{key} for {name!r}{nearest(key, known)}")
        try:
            self._dataset(0, 1)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"task.parameters {self.config.parameters} do not suit {name!r}: {error}") from error

    def _problem(self, entry: dict[str, Any]) -> Problem:
        return Problem(entry["question"] + self.config.instruction, (str(entry["answer"]),), entry)

    def _training_problem(self, cursor: int) -> Problem:
        chunk, index = divmod(cursor, CHUNK)
        if self._chunk[0] != chunk:
            self._chunk = (chunk, self._dataset(self.first_seed + chunk * CHUNK, CHUNK))
        problem = self._problem(self._chunk[1][index])
        return replace(problem, where=f"{self.config.name}, problem {cursor}")

    def _held_out(self) -> list[Problem]:
        wanted = self.config.held_out
        if wanted == 0:
            return []
        dataset = self._dataset(HELD_OUT_SEED, wanted * 50)
        distinct: dict[Prompt, Problem] = {}
        for index in range(wanted * 50):
            problem = replace(self._problem(dataset[index]), where=f"{self.config.name}, held-out problem {index}")
            distinct.setdefault(problem.prompt, problem)
            if len(distinct) == wanted:
                return list(distinct.values())
        raise ConfigError(
            f"task.held_out = {wanted}, but {self.config.name!r} with these parameters gave only {len(distinct)}"
            f" different problems in {wanted * 50} tries."
        )
