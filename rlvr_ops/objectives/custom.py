"""User-defined surrogates: any differentiable function of the log-probabilities, over the same head and schedules."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rlvr_kernels.logits import sum_dtype
from rlvr_kernels.surrogates import Clip
from rlvr_kernels.weigh import SUMS, Rows, Weighed, rollout_sums, weigh
from torch import Tensor

from rlvr_ops.objectives.objective import Objective


@dataclass(frozen=True, eq=False)
class SurrogateRows:
    """What a surrogate function sees of n tokens, rollout after rollout, without masked ones.

    The function is called on whole rollouts, but not always on all of them: a token's loss must depend on nothing outside of
    its rollout, unless the function has an attribute `whole_batch` that is true: it is then called once, on all of them, at the
    cost of two passes. Only the log-probabilities are differentiated; everything here is a constant.

    advantages (n,): after ACE, the sampling correction and the masks, which set the advantage of what they drop to 0.
    old_per_token_logps (n,): on policy, the log-probabilities detached, so that a ratio is 1 and has a gradient.
    ref_per_token_logps, sampling_per_token_logps (n,): None if they were not given.
    rollout (n,): the index of each token's rollout in the batch of `rollouts`.
    """

    advantages: Tensor
    old_per_token_logps: Tensor
    ref_per_token_logps: Tensor | None
    sampling_per_token_logps: Tensor | None
    rollout: Tensor
    rollouts: int

    def rollout_sum(self, values: Tensor) -> Tensor:
        """The sum (n,) of values (n,) over each token's rollout, in float64. Differentiable."""
        wide = values.to(sum_dtype(values.device))  # also in the gather, whose backward sums over the rollout
        return self.sums(wide)[self.rollout].to(values.dtype)

    def sums(self, values: Tensor) -> Tensor:
        """The sum (rollouts,) of values (n,) by rollout, 0 for one without tokens. Differentiable."""
        if values.shape != self.rollout.shape:
            wanted = tuple(self.rollout.shape)
            raise ValueError(f"values must have one number per token, (n,) = {wanted}, got {tuple(values.shape)}")
        bounds = torch.searchsorted(self.rollout, torch.arange(self.rollouts + 1, device=self.rollout.device))
        return rollout_sums(values, bounds)

    def rollout_mean(self, values: Tensor) -> Tensor:
        """The mean (n,) of values (n,) over each token's rollout. Differentiable."""
        return self.rollout_sum(values) / self.rollout_sum(torch.ones_like(values))


SurrogateFunction = Callable[[Tensor, SurrogateRows], Tensor]
"""From per_token_logps (n,) and `SurrogateRows` to each token's loss (n,), whole rollouts at a time."""


def run_untraced(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that takes a user's function. torch.compile breaks the graph here."""
    if not torch.compiler.is_compiling():
        return function(*arguments)
    from rlvr_ops.objectives.untraced import call

    return call(function, *arguments)


def weigh_any(logp: Tensor, rows: Rows, objective: Objective, backend: str = "auto") -> Weighed:
    """`rlvr_kernels.weigh.weigh`, extended to surrogate functions by autograd."""
    if objective.function is None:
        return weigh(logp, rows, objective, backend)
    if rows.mask is None:
        return _weigh_by_function(logp, rows, objective, backend)
    index = rows.mask.nonzero()[:, 0]
    found = _weigh_by_function(logp[index], replace(rows.take(index), mask=None), objective, backend)
    losses, coef = (torch.zeros_like(logp).index_copy_(0, index, x) for x in (found.losses, found.coef))
    return Weighed(losses, coef, found.sums)


def weigh_chosen(logp: Tensor, rows: Rows, top: Tensor | None, objective: Objective, backend: str = "auto") -> Weighed:
    """Weigh log-probabilities (R,), with a surrogate for the tokens `top` (R,) only; None means all."""
    if top is None:
        return weigh_any(logp, rows, objective, backend)
    chosen_rows = replace(rows, advantages=rows.advantages.masked_fill(~top, 0))
    losses, coef, sums = weigh_any(logp, chosen_rows, objective, backend)
    columns = list(sums.unbind(1))  # what is wrong depends on the advantages before `top` cleared some
    columns[SUMS.index("wrong")] = rows.sums((rows.advantages < 0).to(sums.dtype))
    return Weighed(losses, coef, torch.stack(columns, 1))


def _weigh_by_function(logp: Tensor, rows: Rows, objective: Objective, backend: str) -> Weighed:
    """Weigh n unmasked rows. ACE, the off-policy mask and the KL term come from the kernel."""
    assert objective.function is not None
    # Without advantages and around a plain surrogate, the kernel gives the KL term and what ACE and the mask say.
    around = weigh(
        logp, replace(rows, advantages=torch.zeros_like(logp)), replace(objective, surrogate=Clip()), backend
    )
    rollout, column = rows.rollout(), dict(zip(SUMS, around.sums.unbind(1), strict=True))
    factor = 1 - (column["dropped"] > 0).to(logp.dtype)
    if objective.weighs_current(rows.old is not None):
        factor = factor * objective.ace.weight(objective.ace.shift(column["shift"], column["tokens"]))
    advantages = torch.where(rows.advantages < 0, rows.advantages * factor[rollout], rows.advantages)
    sampled_by = logp.detach() if rows.old is None else rows.old
    seen = SurrogateRows(advantages, sampled_by, rows.ref, rows.sampling, rollout, rows.weights.shape[0])
    losses, coef = _value_and_slope(objective.function, logp, seen, rows.weights[rollout])
    losses, coef = losses + around.losses, coef + around.coef
    column["loss"], column["wrong"] = rows.sums(losses), rows.sums((rows.advantages < 0).to(losses.dtype))
    return Weighed(losses, coef, torch.stack([column[name] for name in SUMS], 1))


def _value_and_slope(
    function: SurrogateFunction, logp: Tensor, rows: SurrogateRows, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Each token's aggregated loss (n,), and the derivative of their sum by each log-probability (n,)."""
    if not logp.shape[0]:
        return torch.zeros_like(logp), torch.zeros_like(logp)
    differentiable = not torch.is_inference_mode_enabled()
    with torch.enable_grad(), torch.autocast(logp.device.type, enabled=False):
        leaf = logp.detach().requires_grad_(differentiable)
        losses = function(leaf, rows)
        if not isinstance(losses, Tensor) or losses.shape != leaf.shape:
            came = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"surrogate must return one loss per token, (n,) = {tuple(leaf.shape)}, got {came}")
        if not losses.is_floating_point():
            raise TypeError(f"surrogate must return floating-point losses, got {losses.dtype}")
        weighted = losses.to(leaf.dtype) * scale
        if not differentiable:
            return weighted, torch.zeros_like(leaf)
        coef = torch.autograd.grad(weighted.sum(), leaf, allow_unused=True)[0] if weighted.requires_grad else None
        if coef is None:
            raise ValueError("surrogate must return something differentiable in per_token_logps: was it detached?")
    return weighted.detach(), coef


class ChunkedFunction:
    """The weigher of a single pass for a function that is called for some rollouts at a time."""

    def __init__(self, rows: Rows, objective: Objective, backend: str):
        self.rows, self.objective, self.backend = rows, objective, backend
        self.coefs: list[Tensor] = []

    def __call__(self, logp: Tensor, part: Rows) -> Weighed:
        """Weigh a chunk, and remember its coefficients."""
        found = weigh_any(logp, part, self.objective, self.backend)
        self.coefs.append(found.coef)
        return found

    def check_locality(self, logp: Tensor) -> None:
        """Raise if, called for all rows (n,) together after several chunks, the function has another derivative."""
        if len(self.coefs) <= 1:
            return
        whole = weigh_any(logp, self.rows, self.objective, self.backend).coef
        largest = float(whole.abs().amax()) if whole.numel() else 0.0
        if not torch.allclose(torch.cat(self.coefs), whole, rtol=1e-3, atol=1e-3 * largest):
            raise ValueError(
                "surrogate must depend on nothing outside of a token's rollout for a single pass, which calls it for some "
                "rollouts at a time: here the derivative of some differs from that of all together; use schedule='two_pass'"
            )
