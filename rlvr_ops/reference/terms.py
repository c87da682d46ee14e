"""The parts of a loss in the most obvious PyTorch, for `rlvr_ops.reference`: surrogates, KL, aggregation, metrics.

A batch is R rows and a list of slices, one per rollout; a mask says which rows count. Everything is differentiated by
autograd, and stop-gradients are written as `detach`.
"""

from __future__ import annotations

import itertools

import torch
from rlvr_kernels.objective import Ace
from rlvr_kernels.surrogates import Surrogate
from torch import Tensor

from rlvr_ops.objectives.objective import Objective
from rlvr_ops.objectives.sampling import SamplingCorrection


def surrogate_losses(
    objective: Objective,
    logp: Tensor,
    old: Tensor,
    adv: Tensor,
    signs: Tensor,
    active: Tensor,
    rollouts: list[slice],
) -> tuple[Tensor, Tensor, Tensor]:
    """The surrogate's loss of every row, and which rows' ratio is below and above its bounds.

    The surrogate's own `loss` is the published formula; this function computes the log ratio it takes. `signs` are the
    advantages before a mask dropped some.
    """
    surrogate, level = objective.surrogate, objective.level
    assert isinstance(surrogate, Surrogate)
    log_ratio = (logp - old).where(adv != 0, 0.0) if level == "token" else logp - old
    a, b = surrogate.by_sign(signs)
    outside = (log_ratio < a) & (adv != 0), (log_ratio > b) & (adv != 0)  # for gmpo, whose bounds are on log ratios
    if level == "geometric":
        kept = torch.clamp(logp - old, a, b).where(signs != 0, 0.0)
        return surrogate.loss(_over_rollouts(kept, active, rollouts, mean=True), logp, adv), *outside
    if level == "product":
        whole = _over_rollouts(log_ratio, active, rollouts, mean=False).where(adv != 0, 0.0)
        return surrogate.loss(whole, logp, adv), *(torch.zeros_like(active),) * 2
    if level != "token":
        whole = _over_rollouts(log_ratio, active, rollouts, mean=True)
        log_ratio = whole if level == "sequence" else whole.detach() + logp - logp.detach()
    below, above = surrogate.outside(log_ratio.detach(), logp.detach(), signs)
    return surrogate.loss(log_ratio, logp, adv), below & (adv != 0), above & (adv != 0)


def _over_rollouts(values: Tensor, active: Tensor, rollouts: list[slice], *, mean: bool) -> Tensor:
    """The sum or mean of the active values over each row's rollout."""
    pieces = []
    for rows in rollouts:
        total = values[rows][active[rows]].sum()
        total = total / active[rows].sum().clamp(min=1) if mean else total
        pieces.append(total.expand(rows.stop - rows.start))
    return torch.cat(pieces) if pieces else values


def stale(logp: Tensor, behaviour: Tensor, threshold: float, active: Tensor, rollouts: list[slice]) -> Tensor:
    """Which rollouts' mean of behaviour - logp is above the threshold; rows of unknown behaviour add nothing."""
    gap = (behaviour - logp.detach()).nan_to_num(nan=0.0)
    drift = [gap[rows][active[rows]].sum() / active[rows].sum().clamp(min=1) for rows in rollouts]
    return torch.stack(drift) > threshold if drift else active[:0]


def sampling_weights(
    correction: SamplingCorrection, old: Tensor, sampling: Tensor, active: Tensor, rollouts: list[slice]
) -> Tensor:
    """exp(old - sampling) of every row or of its rollout, truncated or masked."""
    gap = (old - sampling).nan_to_num(nan=0.0)
    if correction.per_rollout:
        gap = _over_rollouts(gap, active, rollouts, mean=False)
    weight, (low, high) = gap.exp(), correction.bounds
    if correction.kind.endswith("truncate"):
        return weight.clamp(low, high)
    return weight.where((weight >= low) & (weight <= high), 0.0)


def asymmetric(
    adv: Tensor, shift_rows: Tensor, active: Tensor, rollouts: list[slice], ace: Ace
) -> tuple[Tensor, Tensor, Tensor]:
    """Re-weighted advantages per row; the confidence shift and the weight 1 + alpha f(shift) per rollout."""
    adv = adv.clone()
    shifts = adv.new_zeros(len(rollouts))
    weights = adv.new_ones(len(rollouts))
    for i, rows in enumerate(rollouts):
        shift = shift_rows[rows][active[rows]].sum()
        shift = ace.shift(shift, active[rows].sum())
        shifts[i] = shift
        weights[i] = ace.weight(shift)
        adv[rows] = torch.where(adv[rows] < 0, adv[rows] * weights[i], adv[rows])
    return adv, shifts, weights


def aggregate(
    per_token: Tensor,
    active: Tensor,
    rollouts: list[slice],
    objective: Objective,
    num_items: float | Tensor | None,
    layout: torch.Size,
) -> Tensor:
    """Sum the active tokens' losses over the denominator of the aggregation; 0, still attached, if there is none."""
    loss_type, max_completion_length = objective.aggregation, objective.max_completion_length
    if loss_type == "bnpo" and num_items is not None:
        raise ValueError("num_items_in_batch has no meaning for bnpo: its denominator is local by definition.")
    total = per_token[:0].sum()
    for rows in rollouts:
        mine = per_token[rows].where(active[rows], 0.0)
        total = total + (mine.sum() / active[rows].sum().clamp(min=1) if loss_type == "grpo" else mine.sum())
    if loss_type in ("dapo", "bnpo"):
        return total / (num_items if num_items is not None else active.sum().clamp(min=1))
    count = num_items if num_items is not None else max(len(rollouts), 1)
    if loss_type in ("grpo", "luspo"):
        return total / count
    length = max_completion_length if max_completion_length is not None else max(layout[1], 1)
    return total / (count * length)


def ace_metrics(base: Tensor, shifts: Tensor, weights: Tensor, rollouts: list[slice]) -> dict[str, Tensor]:
    """Describe the wrong rollouts, those with a negative advantage: mean shift, weights, and the three classes."""
    wrong = torch.stack([(base[rows] < 0).any() for rows in rollouts]) if rollouts else shifts > 0
    count = wrong.sum().clamp(min=1).to(shifts.dtype)
    return {
        "ace/shift/mean": shifts.where(wrong, 0.0).sum() / count,
        "ace/weight/mean": weights.where(wrong, 0.0).sum() / count,
        "ace/weight/max": weights.where(wrong, 0.0).amax() if rollouts else weights.sum(),
        "ace/frac_overconfident": (wrong & (shifts > 0.05)).sum() / count,
        "ace/frac_exploratory": (wrong & (shifts.abs() <= 0.05)).sum() / count,
        "ace/frac_self_correcting": (wrong & (shifts < -0.05)).sum() / count,
    }


def top_entropy_rows(entropy: Tensor, active: Tensor, share: float) -> Tensor:
    """The active rows whose entropy is at least the (1 - share) quantile of the active ones."""
    return active & (entropy >= torch.quantile(entropy[active], 1 - share)) if active.any() else active


def active_rows(like: Tensor, completion_mask: Tensor | None) -> Tensor:
    """Which of the rows (R,) count."""
    if completion_mask is None:
        return torch.ones(like.numel(), dtype=torch.bool, device=like.device)
    return completion_mask.reshape(-1) != 0


def slices(layout: torch.Size, cu_seqlens: Tensor | None) -> list[slice]:
    """The rows of each rollout."""
    if cu_seqlens is None:
        n_rollouts, length = layout
        return [slice(i * length, (i + 1) * length) for i in range(n_rollouts)]
    ends = cu_seqlens.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def per_row(values: Tensor, layout: torch.Size) -> Tensor:
    """Expand values (), (B,), (B, T) or (N,) to one per row."""
    if values.shape == layout:
        return values.reshape(-1)
    return (values[:, None] if values.ndim else values).expand(layout).reshape(-1)


def spread(values: Tensor, rollouts: list[slice]) -> Tensor:
    """Expand values, one per rollout or per row, to one per row. If both counts agree, they are per rollout."""
    if values.shape != (len(rollouts),):
        return values.reshape(-1)
    pieces = [values[i].expand(rows.stop - rows.start) for i, rows in enumerate(rollouts)]
    return torch.cat(pieces) if pieces else values.new_zeros(0)


def masked(values: Tensor, active: Tensor) -> Tensor:
    """Constant values (R,), 0 where not active."""
    return values.detach().reshape(-1).where(active, 0.0)
