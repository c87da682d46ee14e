"""What takes part in a benchmark: a name, and a function from a batch to what the case asks for."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case


class Outputs(NamedTuple):
    """loss 0-d with a graph; logps (B, T); entropy (B, T) or its mean. None: not computed, or not given out."""

    loss: Tensor | None = None
    logps: Tensor | None = None
    entropy: Tensor | None = None


Run = Callable[[Batch], Outputs]
Score = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""hidden (B, T, H), weight (V, H), ids (B, T), whether the entropy is wanted -> log-probabilities and entropies (B, T)."""


class System(NamedTuple):
    """One line of a case's table. kind: "ours", "eager", "peer", "floor" (computes less) or "products" (computes nothing)."""

    key: str
    name: str
    kind: str
    run: Run


class Absent(NamedTuple):
    """A system that does not take part here, and why: it cannot, or it has tried and failed."""

    key: str
    name: str
    reason: str
    failed: bool = False


class Missing(Exception):  # noqa: N818
    """Raised by an entry that cannot take part on this machine; the message is the reason."""


@dataclass(frozen=True)
class Entry:
    """What may take part: in the cases that it `takes`, if `package` is installed and `load` finds all that it needs."""

    key: str
    name: str
    load: Callable[[Case], Run]
    takes: Callable[[Case], bool] = lambda case: True
    package: str | None = None
    kind: str = "peer"

    def enter(self, case: Case) -> System | Absent:
        """Whatever goes wrong in a library that is loaded here is a reason, not an error: the other systems go on."""
        name = self.name
        try:
            if self.package is not None:
                name = f"{name} {installed_version(self.package)}"
            return System(self.key, name, self.kind, self.load(case))
        except Exception as error:
            return Absent(self.key, name, reason(error))


def installed_version(package: str) -> str:
    """Of a package that takes part.

    Raises:
        Missing: it is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Missing(f"{package} is not installed") from None


def reason(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, Missing):
        return str(error)
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:160]}"


def need_cuda(capability: tuple[int, int] | None = None) -> None:
    """Refuse to load without a CUDA GPU, or without one of exactly this compute capability.

    Raises:
        Missing: there is none.
    """
    if not torch.cuda.is_available():
        raise Missing("needs a CUDA GPU")
    found = torch.cuda.get_device_capability()
    if capability is not None and found != capability:
        raise Missing(f"needs compute capability {capability[0]}.{capability[1]}, this GPU has {found[0]}.{found[1]}")
