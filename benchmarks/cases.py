"""One case: the shape, what is computed, and one batch of inputs for it. benchmarks/suite.py has the list."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


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
    """The loss ("ace", "grpo", or "logps": scores alone, without gradient), the shape, and what is varied.

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
        """File name and test id."""
        kinds = [kind for kind in ("peaked", "entropy", "frozen") if getattr(self, kind)]
        shape = f"{self.rows}x{self.hidden}x{self.vocabulary}"
        return "-".join([self.loss, shape, self.dtype, *kinds, f"{round(100 * self.active)}-active"])

    @property
    def forward(self) -> bool:
        """Whether no gradient is asked for."""
        return self.loss == "logps"

    @property
    def active_rows(self) -> int:
        """Rows of rollouts that have an advantage; all rows where there is no loss."""
        return self.rows if self.forward else round(self.rollouts * self.active) * (self.rows // self.rollouts)

    @property
    def products(self) -> int:
        """The matrix products of size NVH that nobody can do without: logits, d_hidden, d_weight."""
        return 1 if self.forward else 2 if self.frozen else 3

    @property
    def flops(self) -> int:
        """What is useful: 2NVH a product, of the active rows."""
        return 2 * self.products * self.active_rows * self.hidden * self.vocabulary

    def describe(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self) | {"active_rows": self.active_rows, "products": self.products}

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
        logps = torch.stack([_logps(states, weight, row) for states, row in zip(hidden, ids, strict=True)])
        old = logps + (0.05 * normal(*size)).clamp(-0.15, 0.15)
        ref = logps + 0.3 * normal(*size)
        # Right and wrong rollouts take turns; the last ones have no advantage.
        advantages = 1.0 - 2.0 * (torch.arange(self.rollouts, device=device) % 2)
        advantages[round(self.rollouts * self.active) :] = 0.0
        return Batch(hidden, weight, ids, advantages, old, ref)


def _logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return -cross_entropy((hidden @ weight.T).float(), ids, reduction="none")
