"""What other libraries and PyTorch itself offer for the same loss: each a way to the log-probabilities, as installed.

Their trainers put the loss on top in plain PyTorch, and so do these. All are loaded only when a case begins.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.eager import by_cross_entropy, scored
from benchmarks.entrants import Missing, Run, need_cuda

TRL_CHUNK = 32768  # what TRL's trainers pass
FEW_LOGITS = 1 << 23


def import_alone(name: str) -> ModuleType:
    """A module of a package that cannot be imported whole: the packages around it are then there without their contents.

    verl's own import ray and tensordict, which its functions for the head do not need.
    """
    try:
        return import_module(name)
    except ImportError:
        top, *inner = name.split(".")[:-1]
        spec = find_spec(top)
        if spec is None or not spec.submodule_search_locations:
            raise
        path = spec.submodule_search_locations[0]
    before = set(sys.modules)
    for package in [top, *inner]:
        top, path = (package, path) if package == top else (f"{top}.{package}", f"{path}/{package}")
        around, spec = ModuleType(top), ModuleSpec(top, None, is_package=True)
        around.__path__ = spec.submodule_search_locations = [path]
        around.__spec__, sys.modules[top] = spec, around
    try:
        return import_module(name)
    except ImportError:
        for hollow in set(sys.modules) - before:
            del sys.modules[hollow]
        raise


def compiled_eager(case: Case) -> Run:
    """Eager through torch.compile, the loss included."""
    _seldom_on_a_cpu(case)
    torch._dynamo.reset()  # the cases before do not count against the number of shapes that are specialised
    return torch.compile(scored(case, by_cross_entropy), dynamic=False)


def trl_chunked(case: Case) -> Run:
    """TRL's always-on kernel: chunks of logits, recomputed in backward."""
    import_module("trl.trainer.utils")  # which its backward imports: says what is missing, if it is
    function: Any = import_module("trl.kernels").ChunkedLogProbFunction

    def score(hidden: Tensor, weight: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        wanted = ("entropy",) if entropy else ()
        out = function.apply(hidden.flatten(0, 1), weight, None, ids.flatten(), 1.0, TRL_CHUNK, None, 1.0, wanted)
        return out[0].view(ids.shape), out[1].view(ids.shape) if entropy else None

    return scored(case, score)


def verl_torch(case: Case) -> Run:
    """verl's chunks of 512 rows in PyTorch; the entropy comes with it whether wanted or not."""
    function: Any = import_alone("verl.utils.experimental.torch_functional").FusedLinearForPPOFunction

    def score(hidden: Tensor, weight: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        logps, entropies = function.apply(hidden.flatten(0, 1), weight, ids.flatten())
        return logps.view(ids.shape), entropies.view(ids.shape) if entropy else None

    return scored(case, score)


def verl_triton(case: Case) -> Run:
    """verl's Triton kernels; the entropy comes with it whether wanted or not."""
    need_cuda()
    function: Any = import_alone("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def score(hidden: Tensor, weight: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        logps, entropies = function(hidden.flatten(0, 1), weight, ids.flatten(), 1.0, "none", None)
        return logps.view(ids.shape), entropies.view(ids.shape) if entropy else None

    return scored(case, score)


def liger_scaled(case: Case) -> Run:
    """Liger's CuTe DSL kernels for Hopper. On other GPUs and on a CPU the same function runs verl's chunks."""
    need_cuda((9, 0))
    import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")  # says what is missing, if it is
    function: Any = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction

    def score(hidden: Tensor, weight: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        out = function.apply(hidden.flatten(0, 1), weight, ids.flatten(), return_entropy=entropy)
        nll, entropies = out if entropy else (out, None)
        return -nll.view(ids.shape), None if entropies is None else entropies.view(ids.shape)

    return scored(case, score)


def cut_cross_entropy(case: Case) -> Run:
    """Apple's cut-cross-entropy with its gradient filter off, which on random logits drops most of the gradient."""
    need_cuda()
    function: Any = import_module("cut_cross_entropy").linear_cross_entropy

    def score(hidden: Tensor, weight: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        return -function(hidden, weight, ids, reduction="none", filter_eps=None), None

    return scored(case, score)


def torch_linear_cross_entropy(case: Case) -> Run:
    """PyTorch's own chunked linear cross entropy, without reduction: its backward recomputes the logits."""
    function, options = torch_chunked(case)

    def score(hidden: Tensor, weight: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        nll = function(hidden.flatten(0, 1), weight, ids.flatten(), reduction="none", options=options)
        return -nll.view(ids.shape), None

    return scored(case, score)


def _seldom_on_a_cpu(case: Case) -> None:
    """Refuse all but a few small cases on a CPU, to those that are so slow there that they would fill the whole run.

    Raises:
        Missing: this is not one of them.
    """
    plain = case.active == 1 and not (case.peaked or case.entropy or case.frozen)
    if not torch.cuda.is_available() and not (plain and case.rows * case.vocabulary <= FEW_LOGITS):
        raise Missing("slow on a CPU, so there it takes part in the small plain cases only")


def torch_chunked(case: Case) -> tuple[Any, Any]:
    """PyTorch's function, and the options that make it chunk as it does by default: on a CPU a few rows at a time."""
    _seldom_on_a_cpu(case)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Missing(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    return torch.nn.functional.linear_cross_entropy, options()
