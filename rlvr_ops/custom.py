"""A surrogate of the user's own: any differentiable function of the log-probabilities, over the same head and schedules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rlvr_kernels.single_pass import Weigher
from rlvr_kernels.spec import PolicySpec
from rlvr_kernels.weigh import STATISTICS, Weighed, rollout_of_row, weigh
from torch import Tensor

from rlvr_ops import ops


@dataclass(frozen=True)
class SurrogateRows:
    """What a surrogate function knows of the n tokens whose loss it gives: rollout after rollout, masked ones left out.

    The function is called with whole rollouts, but not always with all of them: a token's loss must depend on nothing
    outside of its rollout. It is differentiated by the log-probabilities alone: whatever else it reads is a constant.

    advantages (n,): after ACE, the sampling correction and the masks, which multiply them, so that what they leave out
    has an advantage of 0. old_per_token_logps (n,): on policy the log-probabilities themselves, detached, so that a
    ratio is 1 and has a gradient. ref_per_token_logps and sampling_per_token_logps (n,), or None if they were not given.
    rollout (n,): the number of each token's rollout in the batch, of which there are `rollouts`.
    """

    advantages: Tensor
    old_per_token_logps: Tensor
    ref_per_token_logps: Tensor | None
    sampling_per_token_logps: Tensor | None
    rollout: Tensor
    rollouts: int

    def rollout_sum(self, values: Tensor) -> Tensor:
        """The sum (n,) of values (n,) over each token's rollout; differentiable."""
        if values.shape != self.rollout.shape:
            wanted = tuple(self.rollout.shape)
            raise ValueError(f"values must have one number per token, (n,) = {wanted}, got {tuple(values.shape)}")
        return values.new_zeros(self.rollouts).index_add(0, self.rollout, values)[self.rollout]

    def rollout_mean(self, values: Tensor) -> Tensor:
        """The mean (n,) of values (n,) over each token's rollout; differentiable."""
        return self.rollout_sum(values) / self.rollout_sum(torch.ones_like(values))


SurrogateFunction = Callable[[Tensor, SurrogateRows], Tensor]
"""From per_token_logps (n,) and `SurrogateRows` to each token's loss (n,), whole rollouts at a time."""


def weigher_of(function: SurrogateFunction) -> Weigher:
    """`rlvr_kernels.weigh.weigh` with `function` in the surrogate's place, its coefficient by autograd."""

    def weigh_by_function(
        logp: Tensor, old: Tensor | None, ref: Tensor | None, advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor,
        rollout_weight: Tensor, spec: PolicySpec, backend: str = "auto", *, behaviour: Tensor | None = None,
    ) -> Weighed:  # fmt: skip
        if mask is None:
            return _weigh(function, logp, old, ref, advantages, behaviour, cu_seqlens, rollout_weight, spec, backend)
        index = mask.nonzero()[:, 0]
        old, ref, behaviour = (None if x is None else x[index] for x in (old, ref, behaviour))
        bounds = torch.searchsorted(index, cu_seqlens)
        found = _weigh(
            function, logp[index], old, ref, advantages[index], behaviour, bounds, rollout_weight, spec, backend
        )
        losses, coef = (torch.zeros_like(logp).index_copy_(0, index, x) for x in (found.losses, found.coef))
        return Weighed(losses, coef, found.statistics)

    return weigh_by_function


def _weigh(
    function: SurrogateFunction, logp: Tensor, old: Tensor | None, ref: Tensor | None, advantages: Tensor,
    behaviour: Tensor | None, cu_seqlens: Tensor, rollout_weight: Tensor, spec: PolicySpec, backend: str,
) -> Weighed:  # fmt: skip
    """Weigh n rows that all count. ACE's weight and the off-policy mask come from the kernel, and so does the KL term."""
    plain = weigh(logp, old, ref, advantages, None, cu_seqlens, rollout_weight, spec, backend, behaviour=behaviour)
    rollout = rollout_of_row(cu_seqlens, logp.shape[0])
    weight, dropped = (plain.statistics[:, STATISTICS.index(name)] for name in ("weight", "dropped"))
    weighted = torch.where(advantages < 0, advantages * (weight * (1 - dropped))[rollout], advantages)
    sampled_by = logp.detach() if old is None else old
    rows = SurrogateRows(weighted, sampled_by, ref, behaviour, rollout, rollout_weight.shape[0])
    losses, coef = _value_and_slope(function, logp, rows, rollout_weight[rollout])
    if spec.beta > 0:
        penalty = weigh(logp, old, ref, torch.zeros_like(logp), None, cu_seqlens, rollout_weight, spec, backend)
        losses, coef = losses + penalty.losses, coef + penalty.coef
    return Weighed(losses, coef, _without_clipping(plain.statistics, losses, rollout))


def _value_and_slope(
    function: SurrogateFunction, logp: Tensor, rows: SurrogateRows, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Each token's aggregated loss (n,), and its sum's derivative by each log-probability (n,)."""
    if not logp.shape[0]:
        return torch.zeros_like(logp), torch.zeros_like(logp)
    differentiable = not torch.is_inference_mode_enabled()
    with torch.enable_grad(), torch.autocast(logp.device.type, enabled=False):
        leaf = logp.detach().requires_grad_(differentiable)
        losses = function(leaf, rows)
        if not isinstance(losses, Tensor) or losses.shape != leaf.shape:
            came = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"surrogate must return one loss per token, (n,) = {tuple(leaf.shape)}, got {came}")
        weighted = losses.to(leaf.dtype) * scale
        if not differentiable:
            return weighted, torch.zeros_like(leaf)
        coef = torch.autograd.grad(weighted.sum(), leaf, allow_unused=True)[0] if weighted.requires_grad else None
        if coef is None:
            raise ValueError("surrogate must return something differentiable in per_token_logps: was it detached?")
    return weighted.detach(), coef


def _without_clipping(statistics: Tensor, losses: Tensor, rollout: Tensor) -> Tensor:
    """The kernel's statistics with this loss in them, and no clipping: what a function clips is not known."""
    statistics = statistics.clone()
    statistics[:, STATISTICS.index("loss")] = statistics.new_zeros(len(statistics)).index_add_(0, rollout, losses)
    for name in ("clipped_low", "clipped_high"):
        statistics[:, STATISTICS.index(name)] = 0
    return statistics


class GivenSlope(torch.autograd.Function):
    """losses (R,), which do not know what they depend on, with coef (R,) as their derivative by logp (R,)."""

    @staticmethod
    def forward(logp: Tensor, losses: Tensor, coef: Tensor) -> Tensor:
        """The losses."""
        return losses.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the coefficient."""
        ctx.save_for_backward(inputs[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Upstream times the coefficient."""
        return upstream * ctx.saved_tensors[0], None, None


class _SinglePassOf(torch.autograd.Function):
    """`ops.single_pass` with a weigher of the user's own, which an op's schema cannot carry."""

    forward = staticmethod(ops.run_single_pass)
    setup_context = staticmethod(ops.save_single_pass)
    backward = staticmethod(ops.backward_single_pass)


@torch.compiler.disable
def single_pass_of(function: SurrogateFunction, *arguments: Any) -> tuple[Tensor, ...]:
    """`ops.single_pass` of these arguments with the user's function in the surrogate's place."""
    return _SinglePassOf.apply(*arguments, weigher_of(function))
