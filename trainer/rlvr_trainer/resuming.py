"""What may change when a run goes on, and what may not.

The problems, the policy it began with and the way it is evaluated are the run: with others it would be another one. Length,
speed, logging, learning rate, loss and sampling may change, and a line says what did.
"""

from pathlib import Path

from rlvr_trainer.checkpoints import Checkpoint
from rlvr_trainer.config import Config, load
from rlvr_trainer.names import settings_of
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.tasks import Task

FIXED = ("task.", "policy.", "evaluation.", "run.seed")
FREE = (
    "task.name",  # a file may move: its fingerprint is compared
    "task.evaluation",
    "task.verifier_timeout",
    "task.verifier_processes",
    "policy.device",
    "policy.precision",
    "evaluation.every",
)


def changed_settings(run: Path, config: Config) -> list[str]:
    """`run.steps 100 -> 200` for every setting that is not what it was.

    Raises:
        ConfigError: the folder holds no run, or one changed that cannot.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"cannot resume: {run} holds no config.yaml and so no run")
    before, now = _flat(load(run / "config.yaml")), _flat(config)
    changed = [key for key in now if now[key] != before[key] and key != "run.out"]
    for key in changed:
        if key.startswith(FIXED) and key not in FREE:
            raise ConfigError(
                f"cannot resume: {key} was {before[key]!r} and cannot become {now[key]!r} within a run: start a new one"
            )
    return [f"{key} {before[key]} -> {now[key]}" for key in changed]


def refuse_others(checkpoint: Checkpoint, task: Task, config: Config) -> None:
    """Compare the problems with those that the checkpoint was trained on.

    Raises:
        ConfigError: they are others, or more steps are behind the checkpoint than are asked for.
    """
    if checkpoint.state["fingerprint"] != task.fingerprint():
        raise ConfigError(
            f"cannot resume: the problems of task.name={config.task.name} are not those that this run was trained on:"
            " the file, the generator or its version changed, or which prompts are too long"
        )
    if checkpoint.step > config.run.steps:
        raise ConfigError(
            f"cannot resume: run.steps={config.run.steps} is behind {checkpoint.folder}: ask for more, or go on --from an"
            " earlier one"
        )


def _flat(config: Config) -> dict[str, object]:
    keys = [key.split(".") for key in settings_of(Config)]
    return {f"{section}.{name}": getattr(getattr(config, section), name) for section, name in keys}
