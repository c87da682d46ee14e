"""Rollouts: the batch that a loss is computed on, and how its tensors are laid out.

Padded, B rollouts of T tokens are (B, T). Packed, N tokens of B rollouts are (N,) with `cu_seqlens`. Both become R rows.
"""

from dataclasses import dataclass

import torch
from rlvr_kernels.backend import capturing
from rlvr_kernels.checks import check_finite, check_logps, check_tensor, shape_of
from rlvr_kernels.weigh import rollout_sums
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What was sampled, how it was scored, and what it is worth. Log-probabilities are in nats.

    completion_ids: (B, T), or packed (N,) with `cu_seqlens`, int. None for a loss from log-probabilities.
    advantages: one per rollout (B,), or one per token. Packed with N = B means one per rollout.
    ref_per_token_logps: under the frozen reference, shaped like completion_ids; for ACE and the KL.
    old_per_token_logps: under the policy that sampled. None means on policy: the ratio is 1, with a gradient.
    sampling_per_token_logps: under the engine that sampled, NaN where it gave none.
    completion_mask: nonzero where a token counts.
    cu_seqlens: (B + 1,) int: where each rollout begins in the packed rows, then N.

    advantages, completion_mask and cu_seqlens may be on the CPU while the rest is on an accelerator, except in a CUDA graph.
    If all that are given are, the host knows which rows count without asking the device, unless a sampling correction
    decides it.
    num_items_in_batch: the global batch's active tokens (dapo) or rollouts (grpo, dr_grpo, luspo). None: this batch's.
    """

    completion_ids: Tensor | None
    advantages: Tensor
    ref_per_token_logps: Tensor | None = None
    old_per_token_logps: Tensor | None = None
    sampling_per_token_logps: Tensor | None = None
    completion_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    num_items_in_batch: float | Tensor | None = None

    def check_values(self, layout: "Layout") -> None:
        """Raise if a value that counts is NaN or infinite, a log-probability above 0, or the mask NaN.

        A NaN in sampling_per_token_logps means unknown. Reads the values on the host.
        """
        mask = self.completion_mask
        if self.cu_seqlens is not None:
            _check_boundaries(self.cu_seqlens, layout.rows)
        if mask is not None and bool((mask != mask).any()):
            raise ValueError("completion_mask must not be NaN: nonzero is where a token counts")
        layout.check_finite("advantages", self.advantages)
        sampling = self.sampling_per_token_logps
        logps = {
            "old_per_token_logps": self.old_per_token_logps,
            "ref_per_token_logps": self.ref_per_token_logps,
            "sampling_per_token_logps": None if sampling is None else sampling.masked_fill(sampling.isnan(), 0),
        }
        for name, values in logps.items():
            layout.check_finite(name, values)
            if values is not None:
                check_logps(name, values, None if layout.mask is None else layout.mask.view(layout.shape))


@dataclass(frozen=True, eq=False)
class Layout:
    """How R rows form B rollouts: padded, of `shape` (B, T), or packed, of `shape` (N,); cu_seqlens (B + 1,) cuts both.

    mask (R,): which rows count; None means all. host: the same in host memory, if that is where it came from.
    """

    shape: tuple[int, ...]
    cu_seqlens: Tensor
    mask: Tensor | None = None
    host: "Layout | None" = None

    @property
    def rollouts(self) -> int:
        """B."""
        return self.cu_seqlens.shape[0] - 1 if len(self.shape) == 1 else self.shape[0]

    @property
    def rows(self) -> int:
        """R."""
        return self.shape[0] if len(self.shape) == 1 else self.shape[0] * self.shape[1]

    @property
    def packed(self) -> bool:
        """Whether the batch came as (N,) rows."""
        return len(self.shape) == 1

    def rollout(self) -> Tensor:
        """The rollout (R,) of each row."""
        return torch.repeat_interleave(self.cu_seqlens.diff(), output_size=self.rows)

    def tokens(self) -> Tensor:
        """How many rows of each rollout count, (B,) int64."""
        return self.cu_seqlens.diff() if self.mask is None else self.per_rollout(self.mask.long())

    def per_rollout(self, values: Tensor) -> Tensor:
        """Sum row values (R,) over each rollout, (B,), pairwise or in float64. Differentiable."""
        return rollout_sums(values, self.cu_seqlens) if self.packed else values.view(self.shape).sum(1)

    def spread(self, values: Tensor) -> Tensor:
        """Expand to row values (R,), from one per rollout (B,) or the batch's shape. Where N = B, one per rollout."""
        if self.packed and values.shape[0] == self.rollouts:
            return values[self.rollout()]
        if values.shape == self.shape:
            return values.reshape(-1)
        return values[:, None].expand(self.shape).reshape(-1)

    def where_any(self, which: Tensor) -> Tensor:
        """Mark every row (R,) of each rollout that has at least one row in `which` (R,)."""
        if self.packed:
            return (self.per_rollout(which.long()) > 0)[self.rollout()]
        return which.view(self.shape).any(1, keepdim=True).expand(self.shape).reshape(-1)

    def zero_where_masked(self, values: Tensor) -> Tensor:
        """Row values (R,) in the batch's shape, 0 where masked."""
        return (values if self.mask is None else values.masked_fill(~self.mask, 0)).view(self.shape)

    def check_finite(self, name: str, values: Tensor | None) -> None:
        """Raise if a value that counts is NaN or infinite. Reads the values on the host."""
        if values is None or self.mask is None or values.shape[: len(self.shape)] != self.shape:
            check_finite(name, values)
        else:
            check_finite(name, values.to(self.mask.device), self.mask.view(self.shape))


def make_layout(like_name: str, like: Tensor, completion_mask: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
    """The layout of a batch whose per-token tensors have the shape of `like`, (B, T) or (N,)."""
    if like.ndim not in (1, 2):
        raise ValueError(f"{like_name} must have shape (B, T), or (N,) with cu_seqlens, got {shape_of(like)}")
    shape = tuple(like.shape)
    if like.ndim == 1:
        boundaries = _check_cu_seqlens(cu_seqlens, shape[0], like)
    elif cu_seqlens is None:
        boundaries = torch.arange(shape[0] + 1, device=like.device) * shape[1]
    else:
        raise ValueError(
            f"cu_seqlens goes with packed rows (N,), but {like_name} has shape (B, T) = {shape}: drop it or pack the batch"
        )
    mask = None if completion_mask is None else _check_mask(completion_mask, like, like_name)
    layout = Layout(shape, boundaries, mask)
    return layout if like.device.type == "cpu" else _with_host(layout, like.device)


def _check_mask(mask: Tensor, like: Tensor, like_name: str) -> Tensor:
    check_tensor("completion_mask", mask, None if getattr(mask, "is_cpu", False) else like.device, floating=False)
    if mask.shape != like.shape:
        letters = "(B, T)" if like.ndim == 2 else "(N,)"
        longer = like.ndim == 2 and mask.ndim == 2 and mask.shape[1] > like.shape[1]
        hint = ": drop the prompt columns" if longer else ""
        raise ValueError(
            f"completion_mask must have shape {letters} = {tuple(like.shape)} like {like_name}, got {shape_of(mask)}{hint}"
        )
    return mask.reshape(-1) != 0


def _with_host(layout: Layout, device: torch.device) -> Layout:
    """The layout on an accelerator. Its host is what lay in host memory, if that is all of it."""
    cu_seqlens, mask = layout.cu_seqlens, layout.mask
    on_host = cu_seqlens if layout.packed else torch.arange(layout.rollouts + 1) * layout.shape[1]
    known = on_host.is_cpu and (mask is None or mask.is_cpu)
    moved = None if mask is None else _moved("completion_mask", mask, device)
    host = Layout(layout.shape, on_host, mask) if known else None
    return Layout(layout.shape, _moved("cu_seqlens", cu_seqlens, device), moved, host)


def _moved(name: str, values: Tensor, device: torch.device) -> Tensor:
    """The values on the device, by way of pinned memory of our own: without waiting, and whatever becomes of the caller's."""
    if not values.is_cpu or device.type == "cpu":
        return values
    if capturing():
        raise ValueError(
            f"{name} must be on {device} in a CUDA graph, which would replay a copy of it, got a CPU tensor"
        )
    if device.type != "cuda":
        return values.to(device)
    staged = values.clone() if values.is_pinned() else values
    return staged.pin_memory().to(device, non_blocking=True)


def _check_cu_seqlens(cu_seqlens: Tensor | None, rows: int, like: Tensor) -> Tensor:
    if cu_seqlens is None:
        raise ValueError(
            f"cu_seqlens is needed for packed rows (N,) = ({rows},): where each rollout begins, and N at the end"
        )
    check_tensor(
        "cu_seqlens", cu_seqlens, None if getattr(cu_seqlens, "is_cpu", False) else like.device, floating=False
    )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"cu_seqlens must have shape (B + 1,) and dtype int32 or int64, got {shape_of(cu_seqlens)} {cu_seqlens.dtype}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling() and not capturing():
        _check_boundaries(cu_seqlens, rows)
    return cu_seqlens.long()


def _check_boundaries(cu_seqlens: Tensor, rows: int) -> None:
    """Raise unless the boundaries ascend from 0 to `rows`. Reads them on the host."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(f"cu_seqlens must begin at 0 and end at N = {rows}, got {bounds[0]} and {bounds[-1]}")
    if bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must not decrease, got {bounds[:16]}")


def per_token(
    name: str, values: Tensor | None, layout: Layout, like_name: str, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Check a per-token argument; return it detached, as (R,)."""
    if values is None:
        return None
    check_tensor(name, values, device)
    if tuple(values.shape) != layout.shape:
        raise ValueError(f"{name} must have shape {layout.shape} like {like_name}, got {shape_of(values)}")
    return values.detach().reshape(-1).to(dtype)


def per_rollout_or_token(name: str, values: Tensor, layout: Layout, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Check an argument with one value per rollout (B,) or per token; return it detached, expanded to (R,).

    It may be on the CPU while the layout is not.
    """
    check_tensor(name, values, None if getattr(values, "is_cpu", False) else device)
    if tuple(values.shape) not in ((layout.rollouts,), layout.shape):
        letters = "one per row (N,)" if layout.packed else "one per token (B, T)"
        raise ValueError(
            f"{name} must have one value per rollout (B,) = ({layout.rollouts},) or {letters} = {layout.shape}, "
            f"got {shape_of(values)}"
        )
    values = values.detach()
    return layout.spread((values if values.device == device else _moved(name, values, device)).to(dtype))


@dataclass(frozen=True)
class Counts:
    """What the host knows of a call's rows. lengths: rows to score of each rollout (B,). active: how many can have a gradient.

    read: whether the device was asked, which takes the call's one host sync.
    """

    lengths: tuple[int, ...]
    active: int
    read: bool

    @property
    def scored(self) -> int:
        """How many rows are scored."""
        return sum(self.lengths)


def count_rows(cu_seqlens: Tensor, scored: Tensor | None, alive: Tensor | None) -> Counts:
    """Count the rows (R,) that are scored and alive; None means all. One host sync if they are on an accelerator."""
    lengths = cu_seqlens.diff() if scored is None else rollout_sums(scored.float(), cu_seqlens).long()
    active = lengths.sum() if alive is None else alive.sum()
    *found, total = torch.cat([lengths, active[None]]).tolist()
    return Counts(tuple(found), total, cu_seqlens.device.type != "cpu")


def rows_of(which: Tensor | None, count: int | None = None) -> Tensor | None:
    """The indices of the true rows, of which there are `count`; None means all. In a capture it is always all.

    One host sync, or none where the count is known.
    """
    if which is None or capturing() or count == which.shape[0]:
        return None
    if count is not None and which.device.type != "cpu":
        return which.to(torch.uint8).argsort(descending=True, stable=True)[:count].sort().values
    rows = which.nonzero()[:, 0]
    return None if rows.shape[0] == which.shape[0] else rows


def chosen(values: Tensor, rows: Tensor | None) -> Tensor:
    """Select rows of values (R, ...); None means all."""
    return values if rows is None else values[rows]


def spread(values: Tensor | None, rows: Tensor | None, like: Tensor) -> Tensor:
    """Scatter values (n, ...) to their rows of zeros (R, ...), R as in `like`; an empty tensor for None."""
    if values is None:
        return like.new_empty(0)
    if rows is None:
        return values
    full = values.new_zeros((like.shape[0], *values.shape[1:]))
    full[rows] = values
    return full
