"""The base of all surrogates: a frozen record of numbers with a formula, its slope, and a Triton branch."""

from typing import ClassVar, NamedTuple

import torch

Bounds = tuple[float, float]


class SurrogateTerms(NamedTuple):
    """A token's loss and slope, and where the ratio lies below or above its bounds, all (n,)."""

    loss: torch.Tensor
    slope: torch.Tensor
    below: torch.Tensor
    above: torch.Tensor


class Surrogate:
    """Base class. Subclasses are frozen dataclasses of numbers."""

    form: ClassVar[str]
    level: ClassVar[str] = ""  # which log ratio it sees, if the caller has no choice
    by_logp: ClassVar[bool] = False  # the ratio is a constant to the gradient
    token_only: ClassVar[str] = ""  # why no ratio but the token's own makes sense

    @property
    def numbers(self) -> tuple[Bounds, Bounds]:
        """(a, b) for A > 0, then (a, b) for the rest."""
        raise NotImplementedError(f"{type(self).__name__} must define numbers")

    def loss(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        """The published formula (n,), to be differentiated by autograd."""
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def terms(self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor) -> SurrogateTerms:
        """Loss and slope (n,), finite wherever the advantage is 0."""
        raise NotImplementedError(f"{type(self).__name__} must define terms")

    def of_tokens(self, logp: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        """Each token's loss (n,) at its own ratio. Its gradient is the slope of `terms`: finite where a clipped ratio is not."""
        terms = self.terms(logp.detach() - old, logp.detach(), advantage)
        return terms.loss + torch.where(terms.slope == 0, 0, terms.slope * (logp - logp.detach()))

    def by_sign(self, advantage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b), each (n,), chosen by the sign of each advantage."""
        right, scalar = advantage > 0, advantage.new_tensor  # torch.where of two floats would round them to float32
        (a, b), (c, d) = self.numbers
        return torch.where(right, scalar(a), scalar(c)), torch.where(right, scalar(b), scalar(d))

    def outside(
        self, x: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which ratios (n,) lie below and above the bounds; none where the two bounds are equal."""
        (a, b), ratio = self.by_sign(advantage), x.exp()
        return (ratio < a) & (a < b), (ratio > b) & (a < b)

    def kernel_arguments(self) -> dict[str, float | str]:
        """The Triton kernels' arguments. Floats only: Triton would compile anew for some ints."""
        (a, b), (c, d) = self.numbers
        return {
            "positive_a": float(a), "positive_b": float(b), "negative_a": float(c), "negative_b": float(d), "FORM": self.form,
        }  # fmt: skip


def slope_by_logp(slope: torch.Tensor, logp: torch.Tensor, *outside: torch.Tensor) -> SurrogateTerms:
    """The terms of slope * logp: 0 where the slope is 0, even if logp is not finite."""
    return SurrogateTerms(torch.where(slope == 0, 0, slope * logp), slope, *outside)


def nowhere(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks (n,) that mark no ratio, for forms without bounds."""
    false = torch.zeros_like(x, dtype=torch.bool)
    return false, false
