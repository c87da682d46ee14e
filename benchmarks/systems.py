"""Who takes part: each system is a function from a batch to its loss."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.eager import clipped_loss, logps_by_cross_entropy, logps_by_logsumexp
from rlvr_ops import ace_loss, grpo_loss

Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class System:
    """A name, a kind that stays when the name tells a version, and the function."""

    name: str
    kind: str
    loss: Loss


class Absent(NamedTuple):
    """A system that can not take part here, and why."""

    name: str
    reason: str


def systems(case: Case) -> tuple[list[System], list[Absent]]:
    """All that can do `case`, and who is missing. On a CPU the first one's numbers are what the others' are held to."""
    found: list[System | Absent] = [
        System("eager, cross_entropy", "eager", _eager(case, logps_by_cross_entropy)),
        System("eager, logsumexp", "eager", _eager(case, logps_by_logsumexp)),
    ]
    if case.active < 1:
        kept = _active_rows_only(case, logps_by_cross_entropy)
        found.append(System("eager, cross_entropy on active rows", "eager, active rows", kept))
    found.append(System("rlvr_ops", "rlvr_ops", _ours(case)))
    if case.active == 1:
        found.append(System("rlvr_ops, two_pass", "rlvr_ops, two_pass", _ours(case, schedule="two_pass")))
    if case.loss == "grpo":
        found.append(_liger())
    return [s for s in found if isinstance(s, System)], [s for s in found if isinstance(s, Absent)]


def _eager(case: Case, logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    def loss(batch: Batch) -> Tensor:
        ref = batch.ref if case.loss == "ace" else None
        return clipped_loss(logps(batch.hidden, batch.weight, batch.ids), batch.old, batch.advantages, ref)

    return loss


def _active_rows_only(case: Case, logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    whole = _eager(case, logps)

    def loss(batch: Batch) -> Tensor:
        some = batch.active
        kept = batch._replace(
            hidden=batch.hidden[some],
            ids=batch.ids[some],
            advantages=batch.advantages[some],
            old=batch.old[some],
            ref=batch.ref[some],
        )
        return whole(kept) * (len(kept.advantages) / len(batch.advantages))

    return loss


def _ours(case: Case, schedule: str = "auto") -> Loss:
    def ace(batch: Batch) -> Tensor:
        return ace_loss(
            batch.hidden, batch.weight, batch.ids, batch.advantages,
            ref_per_token_logps=batch.ref, old_per_token_logps=batch.old, schedule=schedule,
        ).loss  # fmt: skip

    def grpo(batch: Batch) -> Tensor:
        return grpo_loss(
            batch.hidden, batch.weight, batch.ids, batch.advantages, old_per_token_logps=batch.old, schedule=schedule
        ).loss  # fmt: skip

    return ace if case.loss == "ace" else grpo


def _liger() -> System | Absent:
    name = "Liger LigerFusedLinearGRPOLoss"
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return Absent(name, "liger-kernel is not installed")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # On a GPU it compiles by default; on a CPU that would time the C++ compiler's code, which is not how it is used.
    compiled = torch.cuda.is_available()
    fused = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo", compiled=compiled)

    def loss(batch: Batch) -> Tensor:
        mask = torch.ones_like(batch.ids)
        return fused(batch.hidden, batch.weight, batch.ids, mask, batch.advantages, old_per_token_logps=batch.old)[0]

    return System(f"{name} {version}", "liger", loss)
