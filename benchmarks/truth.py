"""What a case's numbers should be, in float64, and how far a system's are from it.

A rollout at a time in plain PyTorch, so that the float64 logits of all rows never exist together.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.eager import clipped_loss
from benchmarks.entrants import System
from benchmarks.measure import Computed

FLOAT32_NOISE = 1e-5  # below it two float32 results differ by the order of their operations alone
ROUNDING = 2.0**-9  # of a number in bfloat16, relative
TIE = 1.01  # two systems that round alike differ by less than this
NOT_COMPARABLE = {"float32": 1e-3, "bfloat16": 0.25}  # beyond it a system computes something else


class Truth(NamedTuple):
    """All float64. loss 0-d; logps (B, T); entropy: the mean over all tokens, 0-d; the gradients, None where not asked for."""

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None


def truth(case: Case, batch: Batch) -> Truth:
    """Differentiate the loss in float64."""
    weight = batch.weight.double().requires_grad_(case.products == 3)
    logps, entropies, losses, d_hidden = [], [], [], []
    for b in range(case.rollouts):
        hidden = batch.hidden[b : b + 1].double().requires_grad_(not case.forward)
        log_p = (hidden @ weight.T).log_softmax(-1)
        logps.append(log_p.gather(-1, batch.ids[b : b + 1, :, None])[..., 0])
        with torch.no_grad():
            entropies.append(-(log_p.exp() * log_p).sum(-1))
        if case.forward:
            continue
        old, ref, advantages = (x[b : b + 1].double() for x in (batch.old, batch.ref, batch.advantages))
        loss = clipped_loss(logps[-1], old, advantages, ref if case.loss == "ace" else None) / case.rollouts
        loss.backward()
        losses.append(loss.detach())
        d_hidden.append(hidden.grad)
    return Truth(
        torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64),
        torch.cat(logps).detach(),
        torch.cat(entropies).mean(),
        torch.cat(d_hidden) if d_hidden else None,  # type: ignore[arg-type]
        weight.grad,
    )


def errors(got: Computed, want: Truth, batch: Batch, case: Case, kind: str) -> dict[str, float]:
    """How far from the truth.

    logps: root mean square in nats, over the rows that have a gradient. Gradients: |got - want| / |want|, norms. loss,
    entropy: absolute, because losses of right and wrong rollouts may cancel. A floor's loss is the mean negative
    log-probability, and its gradients are of that: they are not compared.
    """
    found: dict[str, float] = {}
    if kind == "floor":
        return {"loss": float((got.loss.double() + want.logps.mean()).abs())} if got.loss is not None else {}
    if got.loss is not None:
        found["loss"] = float((got.loss.double() - want.loss).abs())
    if got.logps is not None:
        rows = torch.ones_like(batch.active) if case.forward else batch.active
        found["logps"] = float((got.logps.double() - want.logps)[rows].square().mean().sqrt())
    if got.entropy is not None:
        found["entropy"] = float((got.entropy.double().mean() - want.entropy).abs())
    for name in ("d_hidden", "d_weight"):
        mine, true = getattr(got, name), getattr(want, name)
        if mine is not None:
            found[name] = float(torch.linalg.vector_norm(mine.double() - true) / torch.linalg.vector_norm(true))
    return found


def is_comparable(found: dict[str, float], case: Case) -> bool:
    """Whether these are errors of rounding, and not of another computation (NaN is another computation)."""
    return all(error <= NOT_COMPARABLE[case.dtype] for error in found.values())


def assert_ours(system: System, mine: dict[str, float], eager: list[dict[str, float]], *, wide: bool) -> None:
    """rlvr_ops is no further from the truth than the best eager form of the same dtype.

    Loss and entropy are single numbers, whose rounding may cancel by chance: they have eager's error in the
    log-probabilities as a bound, too. Unless the products are `wide`, written in float32, what a gradient sums up of several
    of them is rounded once more (bfloat16 on a CPU).

    Raises:
        AssertionError: it is further.
    """
    for name, error in mine.items():
        alike = (name,) if name not in ("loss", "entropy") else (name, "logps")
        bounds = [max(other[n] for n in alike if n in other) for other in eager if name in other]
        bound = max(FLOAT32_NOISE, TIE * min(bounds, default=float("inf")))
        if not wide and name in ("d_hidden", "d_weight"):
            bound = math.hypot(bound, ROUNDING)
        assert error <= bound, f"{system.name}: {name} is {error:.2e} from the truth, the best eager form {bound:.2e}"
