"""Reference answers that no judge can read: found when the rows are, by place, and refused or dropped."""

from rlvr_trainer.config import TaskConfig
from rlvr_trainer.judging.compare import check
from rlvr_trainer.judging.equality import is_mathematics
from rlvr_trainer.judging.workers import Workers, references
from rlvr_trainer.parsing import ConfigError, listed
from rlvr_trainer.tasks import Problem


def readable(problems: list[Problem], workers: Workers, config: TaskConfig) -> tuple[list[Problem], str]:
    """The problems whose every answer can be read, and what to say about the others, if any.

    Raises:
        ConfigError: there are others, and `task.on_bad_reference` is `refuse`: the first ten by place and reason.
    """
    faults = unreadable({answer for problem in problems for answer in problem.answers}, workers)
    bad = {problem: [faults[answer] for answer in problem.answers if answer in faults] for problem in problems}
    wrong = [f"  {problem.where}: {found[0]}" for problem, found in bad.items() if found]
    if not wrong:
        return problems, ""
    said = f"{config.name}: the answers of {len(wrong)} rows cannot be read"
    if config.on_bad_reference == "refuse":
        raise ConfigError(f"{said}; task.on_bad_reference=drop leaves them out:\n{listed(wrong)}")
    return [problem for problem in problems if not bad[problem]], f"dropped: {said}:\n{listed(wrong)}"


def unreadable(answers: set[str], workers: Workers) -> dict[str, str]:
    """The answers that cannot be read, each with what is wrong with it. Numbers and words need no worker to say so."""
    asked = sorted(filter(is_mathematics, answers))
    verdicts = dict(zip(asked, workers(references(asked)), strict=True))
    verdicts |= {answer: check(answer) for answer in answers if answer not in verdicts}
    return {answer: verdict.read_reference for answer, verdict in verdicts.items() if verdict.score is None}
