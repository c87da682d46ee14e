"""What takes part in a case, in what form; this library, and the losses in eager PyTorch."""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

import rlvr_ops
from benchmarks.cases import Batch, Case


class Outputs(NamedTuple):
    """loss 0-d; logps (B, T); entropy of any shape, or its mean; the gradients. None: not computed, or not given out."""

    loss: Tensor | None = None
    logps: Tensor | None = None
    entropy: Tensor | None = None
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None


Run = Callable[[Batch], Outputs]
Load = Callable[[Case], Run]


class Missing(Exception):  # noqa: N818
    """Raised by what cannot take part on this machine; the message is the reason."""


@dataclass(frozen=True)
class System:
    """A line of the table of every case that has what it `takes`; `load` gives what computes a case.

    kind: "ours", "eager", "peer", "floor" (computes less) or "products" (computes nothing). needs: raises Missing on a
    machine where it cannot run.
    """

    key: str
    name: str
    load: Load
    takes: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "peer"
    package: str | None = None
    needs: Callable[[Case], None] = lambda case: None

    @property
    def title(self) -> str:
        """The name, with the version of its package where that is installed."""
        try:
            return f"{self.name} {importlib.metadata.version(self.package)}" if self.package else self.name
        except importlib.metadata.PackageNotFoundError:
            return self.name

    def enter(self, case: Case) -> Run:
        if self.package and self.title == self.name:
            raise Missing(f"{self.package} is not installed")
        self.needs(case)
        return self.load(case)


def reason(error: BaseException) -> str:
    """An error in one line."""
    first = next(iter(str(error).strip().splitlines()), "")[:160]
    return str(error) if isinstance(error, Missing) else f"{type(error).__name__}: {first}"


def compute(run: Run, batch: Batch, case: Case) -> Outputs:
    """Everything that the case asks for, once."""
    if case.forward:
        with torch.no_grad():
            return run(batch)
    hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_(not case.frozen)
    out = run(batch._replace(hidden=hidden, weight=weight))
    gradients = torch.autograd.grad(out.loss, (hidden,) if case.frozen else (hidden, weight))  # type: ignore[arg-type]
    return Outputs(*(None if x is None else x.detach() for x in out[:3]), *gradients)


def clipped_loss(logp: Tensor, old: Tensor, advantages: Tensor, ref: Tensor | None) -> Tensor:
    """GRPO's loss, mean over rollouts of token means; ACE's if `ref` is given. No masked tokens."""
    if ref is not None:
        shift = (logp.detach() - ref).mean(dim=1)
        advantages = torch.where(advantages < 0, advantages * (1 + softplus(shift)), advantages)
    ratio, advantages = torch.exp(logp - old), advantages[:, None]
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean(dim=1).mean()


def scored(case: Case, score: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]) -> Run:
    """What the case asks for, from `score`: hidden (N, H), weight (V, H), ids (N,) -> log-probabilities, entropies (N,)."""

    def run(batch: Batch) -> Outputs:
        logps, entropy = score(batch.hidden.flatten(0, 1), batch.weight, batch.ids.flatten())
        logps, entropy = logps.view(batch.ids.shape), entropy if case.entropy else None
        ref = batch.ref if case.loss == "ace" else None
        loss = None if case.forward else clipped_loss(logps, batch.old, batch.advantages, ref)
        return Outputs(loss, logps.detach(), entropy)

    return run


def eager(case: Case, by_logsumexp: bool = False) -> Run:
    """Full logits, and one of the two obvious ways to a log-probability."""

    def score(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = hidden @ weight.T
        logits, entropy = logits.to(torch.promote_types(logits.dtype, torch.float32)), None
        if case.entropy:
            with torch.no_grad():
                entropy = logits.logsumexp(1) - (logits.softmax(1) * logits).sum(1)
        if by_logsumexp:
            return logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(1), entropy
        return -cross_entropy(logits, ids, reduction="none"), entropy

    return scored(case, score)


def eager_on_active_rows(case: Case) -> Run:
    """What a trainer could do with rollouts that have no advantage, and trainers do not."""

    def run(batch: Batch) -> Outputs:
        loss: Any = eager(case)(Batch(*(x if x is batch.weight else x[batch.active] for x in batch))).loss
        return Outputs(loss * batch.active.sum() / len(batch.active))

    return run


def compiled_eager(case: Case) -> Run:
    torch._dynamo.reset()  # the cases before do not count against the number of shapes that are specialised
    return torch.compile(eager(case), dynamic=False)


def ours(case: Case, schedule: str = "auto", **options: Any) -> Run:
    """The public function that the case names, called as by default but for the schedule."""
    options |= {"with_entropy": case.entropy, "schedule": schedule}

    def run(batch: Batch) -> Outputs:
        given: dict[str, Any] = {
            "hidden_states": batch.hidden,
            "lm_head_weight": batch.weight,
            "completion_ids": batch.ids,
        }
        if case.forward:
            return Outputs(None, *rlvr_ops.token_logps(**given, with_entropy=case.entropy)[:2])
        given |= {"advantages": batch.advantages, "old_per_token_logps": batch.old, **options}
        if case.loss == "ace":
            given["ref_per_token_logps"] = batch.ref
        out = (rlvr_ops.ace_loss if case.loss == "ace" else rlvr_ops.grpo_loss)(**given)
        return Outputs(out.loss, out.per_token_logps, out.metrics.get("entropy"))

    return run


def cuda(case: Case, capability: tuple[int, int] | None = None) -> None:
    """Needs a CUDA GPU, and of exactly this compute capability if one is given."""
    if not torch.cuda.is_available():
        raise Missing("needs a CUDA GPU")
    found = torch.cuda.get_device_capability()
    if capability is not None and found != capability:
        raise Missing(f"needs compute capability {capability[0]}.{capability[1]}, this GPU has {found[0]}.{found[1]}")


def cuda_or_small(case: Case) -> None:
    """Needs a GPU or a small plain case: on a CPU it is so slow that it would fill the whole run."""
    small = case.active == 1 and not case.kinds and case.rows * case.vocabulary <= 1 << 23
    if not small and not torch.cuda.is_available():
        raise Missing("slow on a CPU, so there it takes part in the small plain cases only")


OWN = [
    System("products", "matrix products alone", lambda case: lambda batch: Outputs(), kind="products"),
    System("products-8NVH", "matrix products of two passes", lambda case: lambda batch: Outputs(),
           {"all_rows": True, "frozen": False}, "products"),
    System("eager-cross_entropy", "eager, cross_entropy", eager, kind="eager"),
    System("eager-logsumexp", "eager, logsumexp", partial(eager, by_logsumexp=True), kind="eager"),
    System("rlvr_ops", "rlvr_ops", ours, kind="ours"),
    System("rlvr_ops-two_pass", "rlvr_ops, two_pass", partial(ours, schedule="two_pass"), {"all_rows": True}, "ours"),
    System("eager-active_rows", "eager, cross_entropy on active rows", eager_on_active_rows, {"all_rows": False, "forward": False}),
    System("eager-compiled", "eager under torch.compile", compiled_eager, needs=cuda_or_small),
]  # fmt: skip
NEEDED = ("products", "eager-cross_entropy", "eager-logsumexp")
"""Measured in every case, because the ratios are to them."""
