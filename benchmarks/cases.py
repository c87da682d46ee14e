"""What is measured: a case says what is computed on which shape and makes a batch for it; the suites list the cases."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

LEADING = [(8192, 4096, 131072), (8192, 896, 151936), (16384, 2048, 151936)]  # what to know first of a GPU


class Batch(NamedTuple):
    """hidden (B, T, H); weight (V, H); ids, old, ref (B, T); advantages (B,)."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    advantages: Tensor
    old: Tensor
    ref: Tensor


@dataclass(frozen=True)
class Case:
    """The loss ("ace", "grpo", or "logps": log-probabilities alone, without gradient), the shape, and what is varied.

    active: share of rollouts with an advantage other than zero. peaked: about 0.3 nats of entropy. entropy: the mean
    entropy is wanted too. frozen: the weight needs no gradient.
    """

    loss: str
    rows: int
    hidden: int
    vocabulary: int
    rollouts: int
    dtype: str = "float32"
    active: float = 1.0
    peaked: bool = False
    entropy: bool = False
    frozen: bool = False

    @property
    def name(self) -> str:
        shape = f"{self.rows}x{self.hidden}x{self.vocabulary}"
        return "-".join([self.loss, shape, self.dtype, *self.kinds, f"{round(100 * self.active)}-active"])

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in ("peaked", "entropy", "frozen") if getattr(self, kind)]

    @property
    def forward(self) -> bool:
        return self.loss == "logps"

    @property
    def active_rows(self) -> int:
        return self.rows if self.forward else round(self.rollouts * self.active) * (self.rows // self.rollouts)

    @property
    def products(self) -> int:
        """The matrix products of size NVH that nobody can do without: logits, d_hidden, d_weight."""
        return 1 if self.forward else 2 if self.frozen else 3

    @property
    def flops(self) -> int:
        return 2 * self.products * self.active_rows * self.hidden * self.vocabulary

    def batch(self, device: torch.device) -> Batch:
        """Random hidden states and weight; old log-probabilities so near the policy's that no token is clipped.

        Random logits have a standard deviation of about 1. Peaked ones have about 0.3 nats of entropy, and one target
        in twenty is unlikely.
        """
        generator = torch.Generator(device).manual_seed(0)
        size, dtype = (self.rollouts, self.rows // self.rollouts), getattr(torch, self.dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator)

        ids = torch.randint(self.vocabulary, size, device=device, generator=generator)
        weight = normal(self.vocabulary, self.hidden) / self.hidden**0.5
        hidden = normal(*size, self.hidden)
        if self.peaked:
            hidden = hidden + 15 * weight[ids]
            ids = torch.where(torch.rand(size, device=device, generator=generator) < 0.05, ids.roll(1), ids)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        rollouts = zip(hidden, ids, strict=True)  # one at a time: the logits of all need not fit
        logps = -torch.stack([cross_entropy((h @ weight.T).float(), row, reduction="none") for h, row in rollouts])
        old = logps + (0.05 * normal(*size)).clamp(-0.15, 0.15)
        ref = logps + 0.3 * normal(*size)
        advantages = 1.0 - 2.0 * (torch.arange(self.rollouts, device=device) % 2)  # right and wrong take turns
        advantages[round(self.rollouts * self.active) :] = 0.0
        return Batch(hidden, weight, ids, advantages, old, ref)


def variations(case: Case) -> list[Case]:
    """The case, and everything that is varied, one at a time, the most telling first."""
    changes: list[dict[str, Any]] = [{}, {"active": 0.5}, {"loss": "logps"}, {"loss": "grpo"}]
    changes += [{"peaked": True}, {"entropy": True}, {"frozen": True}, {"active": 0.7}, {"active": 0.25}]
    return [replace(case, **change) for change in changes]


def sizes(shape: tuple[int, int, int]) -> dict[str, Any]:
    return dict(zip(("rows", "hidden", "vocabulary"), shape, strict=True))


def leading(suite: list[Case]) -> list[Case]:
    """The cases of a suite with the leading shapes and nothing varied, or the first of a suite without them."""
    found = [case for case in suite if case in {replace(suite[0], **sizes(shape)) for shape in LEADING}]
    return sorted(found, key=lambda case: LEADING.index((case.rows, case.hidden, case.vocabulary))) or suite[:1]


def cases(device_type: str, *, quick: bool) -> list[Case]:
    """The suite for a device, the most telling case first; `quick` has small shapes, for a run under 3 minutes."""
    cuda = device_type == "cuda"
    if quick:
        small = Case("ace", 2048, 1024, 32768, 16, "bfloat16") if cuda else Case("ace", 128, 256, 4096, 16)
        return [*variations(small), replace(small, rows=32 * small.rows, hidden=small.hidden // 8)]
    if cuda:
        main, *varied = variations(replace(Case("ace", 0, 0, 0, 16, "bfloat16"), **sizes(LEADING[0])))
        shapes = [*LEADING[1:], (8192, 4096, 151936), (4096, 4096, 128256)]
        others = [replace(main, **sizes(shape)) for shape in shapes]
        few = [replace(main, rows=256, rollouts=4, hidden=hidden, vocabulary=151936) for hidden in (4096, 896)]
        last = [*others[2:], Case("ace", 65536, 2048, 151936, 64, "bfloat16")]
        return [main, *varied[:3], *few, *others[:2], *last, *varied[3:]]
    large, small = Case("ace", 1024, 896, 151936, 8), Case("ace", 256, 256, 32000, 16)
    first = [large, replace(large, active=0.5), replace(large, loss="grpo"), replace(large, dtype="bfloat16")]
    return [*first, *variations(small), replace(small, dtype="bfloat16"), Case("ace", 8192, 64, 8192, 16)]
