"""Which rows of a batch reach the head: found on the host and taken out, or, in a capture, all of them and some with weight 0."""

import torch
from rlvr_kernels.capture import capturing
from rlvr_kernels.single_pass import Rows
from torch import Tensor


def rows_of(which: Tensor | None) -> Tensor | None:
    """The indices of the true rows, or None if all are: no copy is made then. One host sync; in a capture it is all."""
    if which is None or capturing():
        return None
    rows = which.nonzero()[:, 0]
    return None if rows.shape[0] == which.shape[0] else rows


def chosen(values: Tensor, rows: Tensor | None) -> Tensor:
    """Those rows of values (R, ...), None meaning all."""
    return values if rows is None else values[rows]


def blank(values: Tensor, which: Tensor | None, fill: float = 0) -> Tensor:
    """Values (R, ...) with `fill` outside of `which`, where a capture leaves rows in whatever they hold."""
    if which is None or not capturing():
        return values
    return values.masked_fill(~which.view(-1, *[1] * (values.ndim - 1)), fill)


def spread(values: Tensor | None, rows: Tensor | None, like: Tensor) -> Tensor:
    """Values (n, ...) at their rows of (R, ...), R as in `like`; an empty tensor for None."""
    if values is None:
        return like.new_empty(0)
    if rows is None:
        return values
    full = values.new_zeros((like.shape[0], *values.shape[1:]))
    full[rows] = values
    return full


def compact(
    index: Tensor | None, scored: Tensor | None, ids: Tensor, inv_temperature: Tensor, old: Tensor | None, ref: Tensor | None,
    behaviour: Tensor | None, advantages: Tensor, cu_seqlens: Tensor, rollout_weight: Tensor,
) -> Rows:  # fmt: skip
    """The rows `index` to do, with the boundaries that remain when the others are gone; in a capture all, and which count."""

    def taken(values: Tensor | None) -> Tensor | None:
        return None if values is None else chosen(blank(values, scored), index)

    if index is not None:
        cu_seqlens = torch.searchsorted(index, cu_seqlens)
    return Rows(
        index, chosen(blank(ids, scored), index), chosen(blank(inv_temperature, scored, 1), index),
        chosen(blank(advantages, scored), index),
        taken(old), taken(ref), taken(behaviour), cu_seqlens, None if capturing() else cu_seqlens.diff().tolist(),
        rollout_weight, scored if capturing() else None,
    )  # fmt: skip
