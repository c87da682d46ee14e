"""Who takes part: each system is a function from a batch to its loss."""

from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.eager import clipped_loss, logps_by_cross_entropy, logps_by_logsumexp
from benchmarks.entrants import Absent, Logps, Loss, System
from benchmarks.peers import peers
from rlvr_ops import ace_loss, grpo_loss


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
    found += peers(case)
    return [s for s in found if isinstance(s, System)], [s for s in found if isinstance(s, Absent)]


def _eager(case: Case, logps: Logps) -> Loss:
    def loss(batch: Batch) -> Tensor:
        ref = batch.ref if case.loss == "ace" else None
        return clipped_loss(logps(batch.hidden, batch.weight, batch.ids), batch.old, batch.advantages, ref)

    return loss


def _active_rows_only(case: Case, logps: Logps) -> Loss:
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
