"""What takes part in a case: this library, the losses in eager PyTorch, and what other libraries offer, as installed.

Most peers give log-probabilities, on which their trainers put the loss in plain PyTorch, and so does `scored`.
"""

import importlib.metadata
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

import rlvr_ops
from benchmarks.cases import Batch, Case


class Outputs(NamedTuple):
    """loss 0-d; logps (B, T); entropy of any shape, or its mean; the gradients. None: not computed or not given out."""

    loss: Tensor | None = None
    logps: Tensor | None = None
    entropy: Tensor | None = None
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None


Run = Callable[[Batch], Outputs]
Load = Callable[[Case], Run]
Scores = tuple[Tensor, Tensor | None]
TRL_CHUNK = 32768  # what TRL's trainers pass
INSTALLED = {one.name.lower().replace("_", "-"): one.version for one in importlib.metadata.distributions()}


class Missing(Exception):  # noqa: N818
    """Raised by what cannot take part on this machine; the message is the reason."""


@dataclass(frozen=True)
class System:
    """A line of the table of every case that has what it `takes`; `load` gives what computes a case.

    kind: "ours", "eager", "peer" or "products" (computes nothing). needs: raises Missing where it cannot run.
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
        return f"{self.name} {INSTALLED[self.package]}" if self.package in INSTALLED else self.name

    def enter(self, case: Case) -> Run:
        if self.package and self.package not in INSTALLED:
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
    assert out.loss is not None
    gradients = torch.autograd.grad(out.loss, (hidden,) if case.frozen else (hidden, weight))
    return Outputs(*(None if x is None else x.detach() for x in out[:3]), *gradients)


def clipped_loss(logp: Tensor, old: Tensor, advantages: Tensor, ref: Tensor | None) -> Tensor:
    """GRPO's loss, mean over rollouts of token means; ACE's if `ref` is given. No masked tokens."""
    if ref is not None:
        shift = (logp.detach() - ref).mean(dim=1)
        advantages = torch.where(advantages < 0, advantages * (1 + softplus(shift)), advantages)
    ratio, advantages = torch.exp(logp - old), advantages[:, None]
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean(dim=1).mean()


def scored(case: Case, score: Callable[[Tensor, Tensor, Tensor], Scores]) -> Run:
    """What the case asks for, from score(hidden (N, H), weight (V, H), ids (N,)): log-probabilities, entropies (N,)."""

    def run(batch: Batch) -> Outputs:
        logps, entropy = score(batch.hidden.flatten(0, 1), batch.weight, batch.ids.flatten())
        logps, entropy = logps.view(batch.ids.shape), entropy if case.entropy else None
        ref = batch.ref if case.loss == "ace" else None
        loss = None if case.forward else clipped_loss(logps, batch.old, batch.advantages, ref)
        return Outputs(loss, logps.detach(), entropy)

    return run


def eager(case: Case, by_logsumexp: bool = False) -> Run:
    """Full logits, and one of the two obvious ways to a log-probability."""

    def score(hidden: Tensor, weight: Tensor, ids: Tensor) -> Scores:
        logits = hidden @ weight.T
        logits, entropy = logits.to(torch.promote_types(logits.dtype, torch.float32)), None
        if case.entropy:
            with torch.no_grad():
                entropy = logits.logsumexp(1) - (logits.softmax(1) * logits).sum(1)
        if by_logsumexp:
            return logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(1), entropy
        return -cross_entropy(logits, ids, reduction="none"), entropy

    return scored(case, score)


def compiled_eager(case: Case) -> Run:
    torch._dynamo.reset()  # the cases before do not count against the number of shapes that are specialised
    return torch.compile(eager(case), dynamic=False)


def ours(case: Case, **options: Any) -> Run:
    """The public function that the case names, called as by default but for the options."""

    def run(batch: Batch) -> Outputs:
        given: dict[str, Any] = {"hidden_states": batch.hidden, "lm_head_weight": batch.weight}
        given |= {"completion_ids": batch.ids, "with_entropy": case.entropy}
        if case.forward:
            return Outputs(None, *rlvr_ops.token_logps(**given)[:2])
        given |= {"advantages": batch.advantages, "old_per_token_logps": batch.old, **options}
        given |= {"ref_per_token_logps": batch.ref} if case.loss == "ace" else {}
        out = rlvr_ops.ace_loss(**given) if case.loss == "ace" else rlvr_ops.grpo_loss(**given)
        return Outputs(out.loss, out.per_token_logps, out.metrics.get("entropy"))

    return run


def peer(place: str, call: Callable[..., Scores]) -> Load:
    """Load the function at `place`, "module:name", and score with call(function, case, hidden, weight, ids)."""

    def load(case: Case) -> Run:
        module, name = place.split(":")
        return scored(case, partial(call, operator.attrgetter(name)(import_module(module)), case))

    return load


def liger_scaled(function: Any, case: Case, *given: Tensor) -> Scores:
    import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")  # else it runs verl's chunks
    out = function(*given, return_entropy=case.entropy)
    return (-out[0], out[1]) if case.entropy else (-out, None)


def liger_grpo(case: Case) -> Run:
    """Liger's fused GRPO, whose matmuls are float32: in TF32, as anybody would have it for operands in bf16."""
    loss: Any = import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    # On a GPU it compiles by default; on a CPU that would time the C++ compiler's code, which is not how it is used.
    fused = loss(beta=0.0, use_ref_model=False, loss_type="grpo", compiled=torch.cuda.is_available())

    def run(batch: Batch) -> Outputs:
        given = batch.hidden, batch.weight, batch.ids, torch.ones_like(batch.ids), batch.advantages
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:  # the matmuls of its backward are in its forward
            return Outputs(fused(*given, old_per_token_logps=batch.old)[0])
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def cuda(case: Case) -> None:
    if not torch.cuda.is_available():
        raise Missing("needs a CUDA GPU")


def hopper(case: Case) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise Missing("needs a GPU of compute capability 9.0")


def cuda_or_small(case: Case) -> None:
    """Needs a GPU or a small plain case: on a CPU it is so slow that it would fill the whole run."""
    small = case.active == 1 and not case.kinds and case.rows * case.vocabulary <= 1 << 23
    if not small and not torch.cuda.is_available():
        raise Missing("slow on a CPU, so there it takes part in the small plain cases only")


CCE, LIGER = "cut-cross-entropy", "liger-kernel"
SYSTEMS = [
    System("products", "matrix products alone", lambda case: lambda batch: Outputs(), kind="products"),
    System("eager-cross_entropy", "eager, cross_entropy", eager, kind="eager"),
    System("eager-logsumexp", "eager, logsumexp", partial(eager, by_logsumexp=True), kind="eager"),
    System("rlvr_ops", "rlvr_ops", ours, kind="ours"),
    System("rlvr_ops-two_pass", "rlvr_ops, two_pass", partial(ours, schedule="two_pass"),
           {"active": 1.0, "forward": False}, "ours"),
    System("eager-compiled", "eager under torch.compile", compiled_eager, needs=cuda_or_small),
    System("trl", "TRL ChunkedLogProbFunction", peer(
        "trl.kernels:ChunkedLogProbFunction.apply", lambda f, case, h, w, ids: f(
            h, w, None, ids, 1.0, TRL_CHUNK, None, 1.0, ("entropy",) if case.entropy else ())[:2]), package="trl"),
    System("liger-scaled_ce", "Liger FusedLinearScaledCrossEntropy", peer(
        "liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction.apply", liger_scaled),
        package=LIGER, needs=hopper),
    System("verl-torch", "verl FusedLinearForPPO", peer(
        "verl.utils.experimental.torch_functional:FusedLinearForPPOFunction.apply", lambda f, case, *x: f(*x)),
        package="verl"),
    System("verl-triton", "verl linear_cross_entropy", peer(
        "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy", lambda f, case, *x: f(*x, 1.0, "none", None)),
        package="verl", needs=cuda),
    System("torch-chunked", "F.linear_cross_entropy, per token", peer(  # in chunks as by default
        "torch.nn.functional:linear_cross_entropy",
        lambda f, case, *x: (-f(*x, reduction="none", options=torch.nn.LinearCrossEntropyOptions()), None)),
        {"entropy": False}, package="torch", needs=cuda_or_small),
    System("cce-exact", CCE, peer(  # without its filter, which on random logits drops most of the gradient
        "cut_cross_entropy:linear_cross_entropy", lambda f, _, *x: (-f(*x, reduction="none", filter_eps=None), None)),
        {"entropy": False}, package=CCE, needs=cuda),
    System("liger-grpo", "Liger FusedLinearGRPOLoss", liger_grpo, {"loss": "grpo", "entropy": False}, package=LIGER),
]  # fmt: skip
"""In the order in which they are loaded."""
NEEDED = ("products", "eager-cross_entropy", "eager-logsumexp")
"""Measured in every case, because the ratios are to them."""


def systems(case: Case) -> list[System]:
    """Those that can do the case at all, whether or not they are installed here."""
    return [one for one in SYSTEMS if all(getattr(case, name) == wanted for name, wanted in one.takes.items())]
