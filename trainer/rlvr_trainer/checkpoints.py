"""Checkpoints that appear whole or not at all, and from which a run continues to the same numbers."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from rlvr_trainer.parsing import ConfigError

STATE = "state.pt"


def save(run: Path, step: int, keep: int, *, model: Any, optimizer: Any, cursor: int) -> Path:
    """Write `run/checkpoints/step-N` under another name, then rename it; remove all but the last `keep`."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    state = {
        "step": step,
        "cursor": cursor,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "device_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python_rng": random.getstate(),
    }
    with open(unfinished / STATE, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    for old in list_checkpoints(run)[: -max(keep, 1)]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(path for path in found if path.name[5:].isdigit() and (path / STATE).is_file())


def latest(run: Path) -> Path:
    """The last checkpoint of a run.

    Raises:
        ConfigError: the folder holds none.
    """
    found = list_checkpoints(run)
    if not found:
        raise ConfigError(
            f"cannot resume: {run} holds no checkpoint (looked for {run}/checkpoints/step-*/{STATE}): "
            "a run that ends by itself leaves one if run.checkpoint_every is set"
        )
    return found[-1]


def restore(folder: Path, *, model: Any, optimizer: Any) -> tuple[int, int]:
    """Load weights, optimiser and random states in place; the step and the data cursor to go on from."""
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if torch.cuda.is_available() and state["device_rng"]:
        torch.cuda.set_rng_state_all(state["device_rng"])
    version, internal, gauss = state["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    return int(state["step"]), int(state["cursor"])
