"""What other libraries offer for the same loss, as installed; whoever is missing is named, with the reason."""

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.eager import clipped_loss
from benchmarks.entrants import Absent, Logps, System

TRL_CHUNK = 32768  # what TRL's trainers pass


def peers(case: Case) -> list[System | Absent]:
    """All that can do `case`."""
    found = [
        _scored(case, "TRL ChunkedLogProbFunction", "trl", "trl", _trl),
        _scored(case, "verl FusedLinearForPPO", "verl", "verl, torch", _verl),
    ]
    if case.loss == "grpo":
        found.append(_liger())
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _scored(case: Case, name: str, package: str, kind: str, load: Callable[[], Logps]) -> System | Absent:
    """A peer that gives log-probabilities, under the loss in plain PyTorch that its trainer has, too."""
    version = _version(package)
    if version is None:
        return Absent(name, f"{package} is not installed")
    try:
        logps = load()
    except ImportError as error:
        return Absent(f"{name} {version}", f"cannot be imported: {error}")

    def loss(batch: Batch) -> Tensor:
        ref = batch.ref if case.loss == "ace" else None
        return clipped_loss(logps(batch.hidden, batch.weight, batch.ids), batch.old, batch.advantages, ref)

    return System(f"{name} {version}", kind, loss)


def _trl() -> Logps:
    function: Any = importlib.import_module("trl.kernels").ChunkedLogProbFunction

    def logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        found = function.apply(hidden.flatten(0, 1), weight, None, ids.flatten(), 1.0, TRL_CHUNK, None, 1.0, ())
        return found[0].view(ids.shape)

    return logps


def _verl() -> Logps:
    function: Any = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPOFunction

    def logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return function.apply(hidden.flatten(0, 1), weight, ids.flatten())[0].view(ids.shape)

    return logps


def _liger() -> System | Absent:
    name = "Liger LigerFusedLinearGRPOLoss"
    version = _version("liger-kernel")
    if version is None:
        return Absent(name, "liger-kernel is not installed")
    fused_loss: Any = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    # On a GPU it compiles by default; on a CPU that would time the C++ compiler's code, which is not how it is used.
    compiled = torch.cuda.is_available()
    fused = fused_loss(beta=0.0, use_ref_model=False, loss_type="grpo", compiled=compiled)

    def loss(batch: Batch) -> Tensor:
        mask = torch.ones_like(batch.ids)
        return fused(batch.hidden, batch.weight, batch.ids, mask, batch.advantages, old_per_token_logps=batch.old)[0]

    return System(f"{name} {version}", "liger", loss)
