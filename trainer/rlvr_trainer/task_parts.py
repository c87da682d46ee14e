"""The parts of a mixture: sections like `task` itself, which give what they do not say."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlvr_trainer.parsing import ConfigError, build, convert

if TYPE_CHECKING:
    from rlvr_trainer.config import TaskConfig

WHOLE_RUN = (
    "mixture",
    "reward",
    "on_overlong",
    "verifier_timeout",
    "verifier_processes",
)  # cannot differ from part to part


def parts_of(task: "TaskConfig") -> "list[tuple[float, TaskConfig]]":
    """Weight and settings of every part of `task.mixture`: what a part does not say, it has from `task`.

    Raises:
        ConfigError: a key that a part does not have, or a weight that is none.
    """
    if task.mixture and task.evaluation:
        raise ConfigError("task.evaluation and task.mixture: give a part of the mixture its own evaluation")
    shared = {key: value for key, value in asdict(task).items() if key != "mixture"}
    return [_part(type(task), section, shared, f"task.mixture[{i}]") for i, section in enumerate(task.mixture)]


def _part(
    kind: "type[TaskConfig]", section: dict[str, Any], shared: dict[str, Any], where: str
) -> "tuple[float, TaskConfig]":
    for key in WHOLE_RUN:
        if key in section:
            raise ConfigError(f"{where}.{key} cannot differ from part to part: set task.{key}")
    own = {key: value for key, value in section.items() if key != "weight"}
    weight: float = convert(section.get("weight", 1.0), float, f"{where}.weight")
    part: TaskConfig = build(kind, {**shared, **own}, f"{where}.")
    if not 0 < weight < float("inf"):
        raise ConfigError(f"{where}.weight must be greater than 0 and finite, got {weight}")
    if part.held_out < 0:
        raise ConfigError(f"{where}.held_out must not be negative, got {part.held_out}")
    return weight, part
