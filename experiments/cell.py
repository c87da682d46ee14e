"""One run of the plan by the trainer's own parts, which can be killed at any time and goes on to the same numbers."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rlvr_trainer.checkpoints import Place, random_state, set_random_state
from rlvr_trainer.loop import make_optimizer, update
from rlvr_trainer.policies import Policy, load_policy
from rlvr_trainer.rollouts import collect
from rlvr_trainer.tasks import Task, make_task
from rlvr_trainer.writing import whole_folder, write_text

from experiments.advantages import ADVANTAGES
from experiments.machine import machine
from experiments.outcomes import Part, answer, outcomes
from experiments.plan import ARMS, MOVES_EVERY, Cell
from experiments.shared_prompts import SharedPrompts

SAVED_EVERY = 30.0  # seconds
LOGGED = (
    "accuracy", "frac_reward_zero_std", "entropy", "kl", "grad_norm", "ace/shift/mean", "ace/weight/mean",
    "ace/weight/max", "ace/frac_overconfident", "clip_ratio/region_mean",
)  # fmt: skip
KEPT = ("rows", "logged", "parts", "seconds")
SUMMED = ("sampling/rollouts", "num_tokens")


@dataclass
class Run:
    """A cell under way: what changes, and what has been seen."""

    cell: Cell
    task: Task
    policy: Policy
    reference: Policy
    optimizer: torch.optim.Optimizer
    place: Place = field(default_factory=Place)
    rows: list[dict[str, Any]] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)  # since the last row
    parts: list[Part] = field(default_factory=list)  # of the evaluation under way
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        """All of it, for `torch.save`."""
        kept = {key: getattr(self, key) for key in KEPT}
        moved = {"reference": self.reference.model.state_dict()} if ARMS[self.cell.arm].moving else {}
        return {
            **kept, **moved, "step": self.place.step, "cursor": self.place.cursor, "random": self.place.random,
            "model": self.policy.model.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.policy.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "reference" in state:
            self.reference.model.load_state_dict(state["reference"])
        for key in KEPT:
            setattr(self, key, state[key])
        self.place = Place(state["step"], state["cursor"], state["random"])
        set_random_state(state["random"])


def run(cell: Cell, home: Path, until: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
    """The cell's result; None if `until` became true before its end. What it needs to go on lies in `home`.

    Everything that decides the numbers is in the cell, so another run of it, alone or after others, gives the same ones on
    the same processor and versions.
    """
    torch.set_num_threads(cell.config.run.threads)
    folder = home / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    task = make_task(cell.config.task, cell.config.run.seed)
    try:
        with _alone(cell, home) as start:
            state = _begin(cell, task, start)
            if (saved := folder / "state.pt").is_file():
                state.restore(torch.load(saved, weights_only=True))
            if not state.rows and not _evaluated_at_start(state, start, folder, until):
                return None
        done = _go_on(state, folder, until)
    finally:
        task.close()
    return result(state) if done else None


@contextmanager
def _alone(cell: Cell, home: Path) -> Iterator[Path]:
    """The folder of what all arms of a task and seed have in common, for one run at a time."""
    start = home / cell.task / f"initial-{cell.seed}"
    start.mkdir(parents=True, exist_ok=True)
    with open(start / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield start


def _begin(cell: Cell, task: Task, start: Path) -> Run:
    """At the initial policy, which is kept in `start` if it had to be made."""
    config = cell.config
    if config.policy.name == "tiny" and not (start / "policy").is_dir():
        with whole_folder(start / "policy") as unfinished:
            load_policy(config, task).save(unfinished)
    policy = load_policy(config, task, start / "policy")
    if cell.setup.shared_prompts:
        read = policy.model, policy.tokenizer, policy.eos_ids
        policy.started = SharedPrompts(*read, batch_size=config.rollout.batch_size)
    else:
        policy.start_sampler(config)
    torch.manual_seed(config.run.seed)
    return Run(cell, task, policy, policy.frozen(), make_optimizer(policy, config))


def _evaluated_at_start(state: Run, start: Path, folder: Path, until: Callable[[], bool]) -> bool:
    """The evaluation of the initial policy, made by the first arm and read by the others."""
    if not (start / "row.json").is_file():
        begun = time.monotonic()
        if not _evaluated(state, folder, until):
            return False
        state.seconds += time.monotonic() - begun
        write_text(start / "row.json", json.dumps(state.rows[0]))
    state.rows = [json.loads((start / "row.json").read_text())]
    return True


def _evaluated(state: Run, folder: Path, until: Callable[[], bool]) -> bool:
    """Add a row, with the means of the metrics since the last one; False if `until` became true on the way."""
    config, size = state.cell.config, state.cell.setup.part
    for first in range(size * len(state.parts), config.task.held_out, size):
        state.parts.append(answer(state.policy, state.reference, state.task, config, first, size))
        if first + size < config.task.held_out:
            _save(state, folder)
            if until():
                return False
    training = {"training": _mean(state.logged)} if state.logged else {}
    state.rows.append({"step": state.place.step, **outcomes(state.parts), **training})
    state.parts, state.logged = [], []
    return True


def _go_on(state: Run, folder: Path, until: Callable[[], bool]) -> bool:
    """Steps and evaluations until the last one (True) or until `until` says so."""
    setup, last = state.cell.setup, time.monotonic()
    while True:
        begun, step = time.monotonic(), state.place.step
        if step in setup.evaluated and state.rows[-1]["step"] < step and not _evaluated(state, folder, until):
            return False
        finished = step == setup.evaluated[-1]
        if not finished:
            _step(state)
        state.seconds += time.monotonic() - begun
        stopped = until()
        if finished or stopped or time.monotonic() - last > SAVED_EVERY:
            _save(state, folder)
            last = time.monotonic()
        if finished or stopped:
            return finished


def _step(state: Run) -> None:
    config, arm, place = state.cell.config, ARMS[state.cell.arm], state.place
    if arm.moving and place.step % MOVES_EVERY == 0:
        state.reference.model.load_state_dict(state.policy.model.state_dict())
    batch, cursor = collect(state.policy, state.task, place.cursor, config)
    if arm.advantages:
        make = ADVANTAGES[arm.advantages]
        batch.advantages = make(batch, state.policy, state.reference, config, place.step)
    values = update(state.policy, state.reference, state.optimizer, batch, config, place.step)
    state.policy.refresh_sampler()
    state.logged.append({name: values[name] for name in (*LOGGED, *SUMMED) if name in values})
    state.place = Place(place.step + 1, cursor, random_state())


def _mean(logged: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the steps that had it, the sum of counts."""
    columns = {name: [row[name] for row in logged if name in row] for name in (*LOGGED, *SUMMED)}
    return {
        name: round(sum(values) / (1 if name in SUMMED else len(values)), 6)
        for name, values in columns.items()
        if values
    }


def _save(state: Run, folder: Path) -> None:
    unfinished = folder / "state.unfinished"
    with open(unfinished, "wb") as file:
        torch.save(state.state(), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / "state.pt")


def result(state: Run) -> dict[str, Any]:
    """What is kept of a finished run."""
    return {
        "cell": state.cell.name,
        "fingerprint": state.task.fingerprint(),
        "rows": state.rows,
        "seconds": round(state.seconds, 1),
        "machine": machine(),
    }
