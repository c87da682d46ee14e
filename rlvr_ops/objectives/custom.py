"""A surrogate of the user's own: any differentiable function of the log-probabilities, over the same head and schedules."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rlvr_kernels.logits import sum_dtype
from rlvr_kernels.surrogates import Clip
from rlvr_kernels.weigh import SUMS, Rows, Weighed, rollout_sums, weigh
from torch import Tensor

from rlvr_ops.objectives.objective import Objective


@dataclass(frozen=True, eq=False)
class SurrogateRows:
    """What a surrogate function knows of the n tokens whose loss it gives: rollout after rollout, masked ones left out.

    The function is called with whole rollouts, but not always with all of them: a token's loss must depend on nothing
    outside of its rollout. It is differentiated by the log-probabilities alone: whatever else it reads is a constant.

    advantages (n,): after ACE, the sampling correction and the masks, so that what those leave out has an advantage of 0.
    old_per_token_logps (n,): on policy the log-probabilities themselves, detached, so that a ratio is 1 and has a gradient.
    ref_per_token_logps and sampling_per_token_logps (n,), or None if they were not given.
    rollout (n,): the number of each token's rollout in the batch, of which there are `rollouts`.
    """

    advantages: Tensor
    old_per_token_logps: Tensor
    ref_per_token_logps: Tensor | None
    sampling_per_token_logps: Tensor | None
    rollout: Tensor
    rollouts: int

    def rollout_sum(self, values: Tensor) -> Tensor:
        """The sum (n,) of values (n,) over each token's rollout, added up in float64. Differentiable."""
        if values.shape != self.rollout.shape:
            wanted = tuple(self.rollout.shape)
            raise ValueError(f"values must have one number per token, (n,) = {wanted}, got {tuple(values.shape)}")
        ends = torch.bincount(self.rollout, minlength=self.rollouts).cumsum(0)
        bounds = torch.cat([ends.new_zeros(1), ends])
        wide = values.to(sum_dtype(values))  # until after the gather, whose backward is a sum over the rollout as well
        return rollout_sums(wide, bounds)[self.rollout].to(values.dtype)

    def rollout_mean(self, values: Tensor) -> Tensor:
        """The mean (n,) of values (n,) over each token's rollout. Differentiable."""
        return self.rollout_sum(values) / self.rollout_sum(torch.ones_like(values))


SurrogateFunction = Callable[[Tensor, SurrogateRows], Tensor]
"""From per_token_logps (n,) and `SurrogateRows` to each token's loss (n,), whole rollouts at a time."""


def weigh_any(logp: Tensor, rows: Rows, objective: Objective, backend: str = "auto") -> Weighed:
    """`rlvr_kernels.weigh.weigh`, and the same for an objective whose surrogate is a function, by autograd."""
    if objective.function is None:
        return weigh(logp, rows, objective, backend)
    if rows.mask is None:
        return _weigh_by_function(logp, rows, objective, backend)
    index = rows.mask.nonzero()[:, 0]
    found = _weigh_by_function(logp[index], replace(rows.take(index), mask=None), objective, backend)
    losses, coef = (torch.zeros_like(logp).index_copy_(0, index, x) for x in (found.losses, found.coef))
    return Weighed(losses, coef, found.sums)


def weigh_chosen(logp: Tensor, rows: Rows, top: Tensor | None, objective: Objective, backend: str = "auto") -> Weighed:
    """Weigh log-probabilities (R,), the surrogate for the tokens `top` (R,) alone; None means all."""
    if top is None:
        return weigh_any(logp, rows, objective, backend)
    chosen_rows = replace(rows, advantages=rows.advantages.masked_fill(~top, 0))
    losses, coef, sums = weigh_any(logp, chosen_rows, objective, backend)
    columns = list(sums.unbind(1))  # rollouts are wrong by the advantages that they had before some tokens lost theirs
    columns[SUMS.index("wrong")] = rows.sums((rows.advantages < 0).to(sums.dtype))
    return Weighed(losses, coef, torch.stack(columns, 1))


def _weigh_by_function(logp: Tensor, rows: Rows, objective: Objective, backend: str) -> Weighed:
    """Weigh n rows that all count. What the kernel says of ACE, the off-policy mask and the KL term holds here too."""
    assert objective.function is not None
    around = replace(objective, surrogate=Clip())  # what the kernel says besides the function's loss
    plain = weigh(logp, rows, around, backend)
    rollout, column = rows.rollout(), dict(zip(SUMS, plain.sums.unbind(1), strict=True))
    factor = 1 - (column["dropped"] > 0).to(logp.dtype)
    if objective.weighs_current(rows.old is not None):
        factor = factor * objective.ace.weight(objective.ace.shift(column["shift"], column["tokens"]))
    advantages = torch.where(rows.advantages < 0, rows.advantages * factor[rollout], rows.advantages)
    sampled_by = logp.detach() if rows.old is None else rows.old
    seen = SurrogateRows(advantages, sampled_by, rows.ref, rows.sampling, rollout, rows.weights.shape[0])
    losses, coef = _value_and_slope(objective.function, logp, seen, rows.weights[rollout])
    if objective.kl.beta > 0:
        penalty = weigh(logp, replace(rows, advantages=torch.zeros_like(logp)), around, backend)
        losses, coef = losses + penalty.losses, coef + penalty.coef
    column |= {name: torch.zeros_like(column["loss"]) for name in ("clipped_low", "clipped_high")}  # not known
    column["loss"] = rollout_sums(losses, rows.cu_seqlens)
    return Weighed(losses, coef, torch.stack([column[name] for name in SUMS], 1))


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


def check_locality(logp: Tensor, coef: Tensor, rows: Rows, objective: Objective, backend: str) -> None:
    """Raise if a function that was called chunk by chunk, with coef (n,) as result, says otherwise of all rows together."""
    whole = weigh_any(logp, rows, objective, backend).coef
    largest = float(whole.abs().amax()) if whole.numel() else 0.0
    if not torch.allclose(coef, whole, rtol=1e-3, atol=1e-3 * largest):
        raise ValueError(
            "surrogate must depend on nothing outside of a token's rollout for a single pass, which calls it for some rollouts "
            "at a time: here the derivative of some differs from that of all together; use schedule='two_pass'"
        )
