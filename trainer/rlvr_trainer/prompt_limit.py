"""Prompts that leave a completion no room: found before the first step, then dropped or refused as the settings say."""

from dataclasses import dataclass
from typing import Literal

from rlvr_trainer.config import Config
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.policies import Policy
from rlvr_trainer.prompts import encode
from rlvr_trainer.tasks import Problem, Task

NAMED = 3  # places that a message names
PASSED_OVER = 1000


def positions(policy: Policy) -> int | None:
    """The longest sequence that the model takes, in tokens, if it says so."""
    found = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


@dataclass(frozen=True)
class PromptLimit:
    """How many tokens a rendered prompt may have, and what happens to longer ones."""

    policy: Policy
    tokens: float  # infinite where nothing limits them
    reason: str
    on_overlong: Literal["refuse", "drop"]

    @classmethod
    def of(cls, policy: Policy, config: Config) -> "PromptLimit":
        """The smaller of `rollout.max_prompt_tokens` and what the model's positions leave.

        Raises:
            ConfigError: the completion alone fills the positions.
        """
        length, longest = config.rollout.max_new_tokens, positions(policy)
        room = float("inf") if longest is None else longest - length
        if room < 1:
            raise ConfigError(
                f"rollout.max_new_tokens = {length} leaves no room for a prompt in the model's {longest} positions"
            )
        asked = config.rollout.max_prompt_tokens or float("inf")
        reason = (
            f"rollout.max_prompt_tokens = {config.rollout.max_prompt_tokens}"
            if asked < room
            else f"the model's {longest} positions less rollout.max_new_tokens = {length}"
        )
        return cls(policy, min(room, asked), reason, config.task.on_overlong)

    def fits(self, problem: Problem) -> bool:
        """Whether the rendered prompt is short enough.

        Raises:
            ConfigError: a prompt that cannot be rendered, or with tokens that the embedding has no row for.
        """
        try:
            (ids,) = encode(self.policy.tokenizer, self.policy.texts([problem.prompt]))
        except ConfigError as error:
            raise ConfigError(f"{_place(problem)}: {error}") from error
        rows = self.policy.model.get_input_embeddings().weight.shape[0]
        if ids and max(ids) >= rows:
            token = self.policy.tokenizer.convert_ids_to_tokens(max(ids))
            raise ConfigError(
                f"{_place(problem)}: token {token!r} has id {max(ids)}, and the policy's embedding only {rows} rows"
            )
        return len(ids) <= self.tokens

    def draw(self, task: Task, cursor: int, count: int) -> tuple[list[Problem], int, int]:
        """The next `count` problems that fit, the cursor behind them, and how many were passed over.

        What a task can count is refused or dropped when it is loaded. In an endless stream a later prompt may be too long:
        it is passed over and counted, for no run should end at its eighth step.

        Raises:
            ConfigError: hardly one fits.
        """
        found: list[Problem] = []
        passed_over: list[Problem] = []
        while len(found) < count:
            problems, cursor = task.problems(cursor, count - len(found))
            for problem in problems:
                (found if self.fits(problem) else passed_over).append(problem)
            if len(passed_over) > PASSED_OVER + len(found):
                raise ConfigError(f"hardly a prompt fits: {self.described(passed_over)}")
        return found, cursor, len(passed_over)

    def described(self, problems: list[Problem]) -> str:
        """How many prompts are too long, and where the first of them are."""
        places = ", ".join(_place(problem) for problem in problems[:NAMED])
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        return f"{len(problems)} prompts are longer than {self.tokens} tokens ({self.reason}): {places}{more}"


REMEDY = ". task.on_overlong=drop leaves them out"


def fit_prompts(policy: Policy, task: Task, config: Config) -> str:
    """Drop the prompts that are too long from the task, held-out ones included; what to say about them, or nothing.

    Raises:
        ConfigError: there are some, and `task.on_overlong` is `refuse`; or none would be left.
    """
    limit = PromptLimit.of(policy, config)
    overlong: list[Problem] = []

    def fits(problem: Problem) -> bool:
        short = limit.fits(problem)
        if not short:
            overlong.append(problem)
        return short

    try:
        task.restrict(fits)
    except ConfigError as error:
        raise ConfigError(f"{error} {limit.described(overlong)}" if overlong else str(error)) from error
    if overlong and limit.on_overlong == "refuse":
        raise ConfigError(limit.described(overlong) + REMEDY)
    return f"dropped: {limit.described(overlong)}" if overlong else ""


def _place(problem: Problem) -> str:
    return problem.where or repr(problem.text[:40])
