"""Checkpoints: Hugging Face folders that appear whole or not at all, and from which a run goes on to the same numbers."""

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.policies import Policy
from rlvr_trainer.rollouts import Batch
from rlvr_trainer.writing import UNFINISHED, remove, whole_folder

CHECKPOINTS, STATE = "checkpoints", "state.pt"


def random_state() -> dict[str, Any]:
    """The random generators that training draws from."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "devices": devices, "python": random.getstate()}


@dataclass
class Place:
    """Where a run is: with weights and optimiser, everything that decides what comes next."""

    step: int = 0
    cursor: int = 0  # of the task's problems
    random: dict[str, Any] = field(default_factory=random_state)
    ahead: tuple[Batch, int] | None = None  # a batch that was sampled and not learned from, and the cursor behind it


@dataclass
class Checkpoint:
    """A checkpoint that was found whole: its folder, and what its `state.pt` holds."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """How many steps it has behind it."""
        return int(self.state["step"])


def save(
    run: Path,
    place: Place,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    *,
    fingerprint: str,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write `run/checkpoints/step-N`; of the others only the last `keep`, this one included, and that of step `best` stay.

    One that is there already is this one: what it was written from depends on the step alone.

    Raises:
        WriteError: no room, or no permission. The earlier ones are as they were.
    """
    folder = folder_of(run, place.step)
    for leftover in folder.parent.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not (folder / STATE).is_file():
        with whole_folder(folder) as unfinished:
            policy.save(unfinished)
            state = {"step": place.step, "cursor": place.cursor, "random": place.random, "fingerprint": fingerprint}
            if place.ahead is not None:
                state["ahead"] = place.ahead[0].state(), place.ahead[1]
            state["optimizer"] = optimizer.state_dict()
            if policy.dtype != policy.model.dtype:  # rounded in model.safetensors, which is for others
                state["weights"] = policy.model.state_dict()
            with open(unfinished / STATE, "wb") as file:
                torch.save(state, file)
    for old in list_checkpoints(run)[:-keep]:
        if best is None or old != folder_of(run, best):
            remove(old)
    return folder


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run / CHECKPOINTS / f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [
        path for path in (run / CHECKPOINTS).glob("step-*") if path.name[5:].isdigit() and (path / STATE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name[5:]))


def find(run: Path, name: str | None = None) -> Checkpoint:
    """The last checkpoint of a run, or the one called `name`: `step-000004`, or 4.

    Raises:
        ConfigError: there is none, or it is cut short; then the one before it is named.
    """
    found = list_checkpoints(run)
    if not found:
        raise ConfigError(
            f"cannot resume: {run} holds no checkpoint (looked for {run}/{CHECKPOINTS}/step-*/{STATE}): "
            "a run that ends by itself leaves one if run.checkpoint_every is set"
        )
    by_step = {int(path.name[5:]): path for path in found}
    if name is None:
        return _read(found[-1], run)
    number = Path(name).name.removeprefix("step-")
    if not number.isdecimal() or int(number) not in by_step:
        raise ConfigError(f"{run} holds no checkpoint {name!r}, only {', '.join(path.name for path in found)}")
    return _read(by_step[int(number)], run)


def _read(folder: Path, run: Path) -> Checkpoint:
    from safetensors import safe_open

    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        for file in [*folder.glob("*.safetensors")] or [folder / "model.safetensors"]:
            with safe_open(file, "pt"):  # compares the file's length with its table of contents
                pass
        return Checkpoint(folder, {**state, "step": int(state["step"])})
    except Exception as error:
        everyone = list_checkpoints(run)
        before = [path.name for path in everyone[: everyone.index(folder)]]
        instead = f"use the one before it with --from {before[-1]}" if before else "there is none before it"
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"cannot resume: {folder} is not whole ({reason}): {instead}") from error


def restore(checkpoint: Checkpoint, policy: Policy, optimizer: torch.optim.Optimizer) -> Place:
    """Load weights, optimiser and random states in place; where the run goes on. Later checkpoints are removed."""
    state, settings = checkpoint.state, [dict(group) for group in optimizer.param_groups]
    weights = state.get("weights") or _weights(checkpoint.folder, policy)
    policy.model.load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    for group, given in zip(optimizer.param_groups, settings, strict=True):
        group |= {key: value for key, value in given.items() if key != "params"}  # the settings may have changed
    run = checkpoint.folder.parent.parent
    for later in list_checkpoints(run):
        if int(later.name[5:]) > checkpoint.step:
            remove(later)
    set_random_state(state["random"])
    ahead = (Batch.of(state["ahead"][0], policy.device), int(state["ahead"][1])) if "ahead" in state else None
    return Place(checkpoint.step, int(state["cursor"]), state["random"], ahead)


def set_random_state(state: dict[str, Any]) -> None:
    """Go on drawing where `random_state` was taken."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["devices"][: torch.cuda.device_count()])  # there may be fewer now
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _weights(folder: Path, policy: Policy) -> dict[str, Any]:
    """Through transformers, which may call weights by other names in a file than in the model."""
    saved = type(policy.model).from_pretrained(folder, dtype=policy.model.dtype)
    found: dict[str, Any] = saved.state_dict()
    return found
