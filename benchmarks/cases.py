"""What is measured: the shapes, and one batch of inputs for each."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.eager import logps_by_cross_entropy


class Batch(NamedTuple):
    """hidden (B, T, H); weight (V, H); ids, old, ref (B, T); advantages (B,)."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    advantages: Tensor
    old: Tensor
    ref: Tensor

    @property
    def active(self) -> Tensor:
        """Which rollouts (B,) have an advantage."""
        return self.advantages != 0


@dataclass(frozen=True)
class Case:
    """One line of the table: the loss, the shape, and how many rollouts have an advantage other than zero."""

    loss: str
    rows: int
    hidden: int
    vocabulary: int
    rollouts: int
    dtype: str = "float32"
    active: float = 1.0
    peaked: bool = False

    @property
    def name(self) -> str:
        """File name and test id."""
        shape = f"{self.rows}x{self.hidden}x{self.vocabulary}"
        kind = "peaked-" if self.peaked else ""
        return f"{self.loss}-{shape}-{self.dtype}-{kind}{round(100 * self.active)}-active"

    @property
    def active_rows(self) -> int:
        """Rows of rollouts that have an advantage."""
        return round(self.rollouts * self.active) * (self.rows // self.rollouts)

    def describe(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self) | {"active_rows": self.active_rows}

    def batch(self, device: torch.device) -> Batch:
        """Random hidden states and weight; old log-probabilities so near the policy's that no token is clipped.

        Random logits have a standard deviation of about 1. Peaked ones have about 0.3 nats of entropy, and one target
        in twenty is unlikely.
        """
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, self.dtype)
        size = (self.rollouts, self.rows // self.rollouts)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator)

        ids = torch.randint(self.vocabulary, size, device=device, generator=generator)
        weight = normal(self.vocabulary, self.hidden) / self.hidden**0.5
        hidden = normal(*size, self.hidden)
        if self.peaked:
            hidden = hidden + 15 * weight[ids]
            unlikely = torch.rand(size, device=device, generator=generator) < 0.05
            ids = torch.where(unlikely, ids.roll(1), ids)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.no_grad():
            logps = logps_by_cross_entropy(hidden, weight, ids)
        old = logps + (0.05 * normal(*size)).clamp(-0.15, 0.15)
        ref = logps + 0.3 * normal(*size)
        # Right and wrong rollouts take turns; the last ones have no advantage.
        advantages = 1.0 - 2.0 * (torch.arange(self.rollouts, device=device) % 2)
        advantages[round(self.rollouts * self.active) :] = 0.0
        return Batch(hidden, weight, ids, advantages, old, ref)


CPU_CASES = [
    Case("ace", 256, 256, 32000, 8),
    Case("ace", 256, 256, 32000, 8, active=0.5),
    Case("ace", 1024, 896, 151936, 8),
    Case("ace", 1024, 896, 151936, 8, active=0.5),
    Case("grpo", 256, 256, 32000, 8),
]
GPU_SHAPES = [(8192, 4096, 151936), (8192, 4096, 131072), (4096, 4096, 131072), (4096, 2048, 131072)]
GPU_CASES = [
    Case("ace", rows, hidden, vocabulary, 16, "bfloat16", active, peaked)
    for rows, hidden, vocabulary in GPU_SHAPES
    for active, peaked in [(1.0, False), (1.0, True), (0.5, False)]
] + [Case("grpo", 8192, 4096, 131072, 16, "bfloat16")]
