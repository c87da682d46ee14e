"""What other libraries and PyTorch itself offer for the same loss, as installed, and the list of all systems.

Most give log-probabilities, on which their trainers put the loss in plain PyTorch, and so does `scored`.
"""

import operator
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.cases import Batch, Case
from benchmarks.systems import OWN, Load, Missing, Outputs, Run, System, cuda, cuda_or_small, scored

TRL_CHUNK = 32768  # what TRL's trainers pass
TORCH, CCE, LIGER = "torch.nn.functional:linear_cross_entropy", "cut-cross-entropy", "liger-kernel"


def chunked_torch(case: Case) -> None:
    """Needs a PyTorch whose linear cross entropy works in chunks."""
    cuda_or_small(case)
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")


def import_alone(name: str) -> Any:
    """A module of a package that cannot be imported whole: the packages around it are then there without their contents.

    verl's own import ray and tensordict, which its functions for the head do not need.
    """
    top, *inner = name.split(".")[:-1]
    try:
        return import_module(name)
    except ImportError:
        found = find_spec(top)
        if found is None or not found.submodule_search_locations:
            raise
    before, path = set(sys.modules), found.submodule_search_locations[0]
    for depth in range(len(inner) + 1):
        hollow = ModuleSpec(".".join([top, *inner[:depth]]), None, is_package=True)
        hollow.submodule_search_locations = ["/".join([path, *inner[:depth]])]
        sys.modules[hollow.name] = module_from_spec(hollow)
    try:
        return import_module(name)
    except ImportError:
        for added in set(sys.modules) - before:
            del sys.modules[added]
        raise


def peer(place: str, call: Callable[..., Any], *, imports: str | None = None, floor: bool = False) -> Load:
    """Load the function at `place`, "module:name", and score with call(function, case, hidden, weight, ids).

    imports: a module that the function imports only when called; loading it says at once what is missing. floor: what
    is computed is the mean cross entropy alone.
    """

    def load(case: Case) -> Run:
        module, _, name = place.partition(":")
        if imports:
            import_module(imports)
        score = partial(call, operator.attrgetter(name)(import_alone(module)), case)
        if floor:
            return lambda batch: Outputs(score(batch.hidden.flatten(0, 1), batch.weight, batch.ids.flatten()))
        return scored(case, score)

    return load


def scaled(function: Any, case: Case, *given: Tensor) -> tuple[Tensor, Tensor | None]:
    out = function(*given, return_entropy=case.entropy)
    return (-out[0], out[1]) if case.entropy else (-out, None)


def in_chunks(function: Any, case: Case, *given: Tensor, reduction: str) -> Tensor:
    return function(*given, reduction=reduction, options=torch.nn.LinearCrossEntropyOptions())  # chunks as by default


def liger_grpo(case: Case, precision: str = "highest") -> Run:
    """Liger's fused GRPO, whose matmuls are float32: exact, or with "high" in TF32."""
    loss: Any = import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    # On a GPU it compiles by default; on a CPU that would time the C++ compiler's code, which is not how it is used.
    fused = loss(beta=0.0, use_ref_model=False, loss_type="grpo", compiled=torch.cuda.is_available())

    def run(batch: Batch) -> Outputs:
        given = batch.hidden, batch.weight, batch.ids, torch.ones_like(batch.ids), batch.advantages
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:  # the matmuls of its backward are in its forward
            return Outputs(fused(*given, old_per_token_logps=batch.old)[0])
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def liger_triton_grpo(case: Case) -> Run:
    """Liger's Triton loss over full logits, of which it wants one row more than there are tokens."""
    function: Any = import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    options = {"temperature": 1.0, "beta": 0.0, "eps_low": 0.2, "eps_high": 0.2, "loss_type": "grpo", "reduce": True}

    def run(batch: Batch) -> Outputs:
        logits = pad(batch.hidden, (0, 0, 0, 1)) @ batch.weight.T
        return Outputs(function(logits, batch.old, None, batch.ids, batch.advantages, **options)[0])

    return run


WITHOUT_ENTROPY = {"entropy": False}
PLAIN_GRPO = {"loss": "grpo", "entropy": False}
PLAIN_LOSS = {"all_rows": True, "entropy": False, "frozen": False}
SYSTEMS = [
    *OWN,
    System("trl", "TRL ChunkedLogProbFunction", peer(
        "trl.kernels:ChunkedLogProbFunction.apply", lambda f, case, h, w, ids: f(
            h, w, None, ids, 1.0, TRL_CHUNK, None, 1.0, ("entropy",) if case.entropy else ())[:2],
        imports="trl.trainer.utils"), package="trl"),
    System("liger-scaled_ce", "Liger FusedLinearScaledCrossEntropy", peer(  # elsewhere it runs verl's chunks
        "liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction.apply", scaled,
        imports="liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"),
        package=LIGER, needs=partial(cuda, capability=(9, 0))),
    System("verl-torch", "verl FusedLinearForPPO", peer(
        "verl.utils.experimental.torch_functional:FusedLinearForPPOFunction.apply", lambda f, case, *x: f(*x)),
        package="verl"),
    System("verl-triton", "verl linear_cross_entropy", peer(
        "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy", lambda f, case, *x: f(*x, 1.0, "none", None)),
        package="verl", needs=cuda),
    System("torch-chunked", "F.linear_cross_entropy, per token", peer(
        TORCH, lambda *x: (-in_chunks(*x, reduction="none"), None)), WITHOUT_ENTROPY, package="torch", needs=chunked_torch),
    System("cce-exact", CCE, peer(  # without its filter, which on random logits drops most of the gradient
        "cut_cross_entropy:linear_cross_entropy",
        lambda f, case, *x: (-f(*x, reduction="none", filter_eps=None), None)), WITHOUT_ENTROPY, package=CCE, needs=cuda),
    System("liger-grpo", "Liger FusedLinearGRPOLoss", liger_grpo, PLAIN_GRPO, package=LIGER),
    System("liger-grpo-tf32", "Liger FusedLinearGRPOLoss, TF32", partial(liger_grpo, precision="high"), PLAIN_GRPO,
           package=LIGER, needs=cuda),
    System("liger-triton_grpo", "Liger triton_grpo_loss", liger_triton_grpo, PLAIN_GRPO, package=LIGER, needs=cuda),
    System("torch-floor", "F.linear_cross_entropy, mean", peer(TORCH, partial(in_chunks, reduction="mean"), floor=True),
           PLAIN_LOSS, "floor", "torch", chunked_torch),
    System("quack-floor", "QuACK chunked_linear_cross_entropy", peer(
        "quack.linear_cross_entropy:chunked_linear_cross_entropy",
        lambda f, case, *x: f(*x, reduction="mean"), floor=True), PLAIN_LOSS, "floor", "quack-kernels", cuda),
]  # fmt: skip
"""In the order in which they are loaded."""


def systems(case: Case) -> list[System]:
    """Those that can do the case at all, whether or not they are installed here."""
    return [one for one in SYSTEMS if all(getattr(case, name) == wanted for name, wanted in one.takes.items())]
