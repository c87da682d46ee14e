"""What every public function checks of its arguments. Each error names the argument, what came and what is wanted."""

import torch
from rlvr_kernels.capture import capturing
from torch import Tensor

from rlvr_ops.layout import Layout


def _shape(values: Tensor) -> str:
    return str(tuple(values.shape))


def check_tensor(name: str, values: object, device: torch.device | None = None, *, floating: bool = True) -> None:
    """Raise unless `values` is a tensor, on `device`, and floating if it should be."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")
    if device is not None and values.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {values.device}")
    if floating and not values.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {values.dtype}")


def check_head(hidden_states: Tensor, lm_head_weight: Tensor, lm_head_bias: Tensor | None) -> None:
    """Check what the logits are made of."""
    check_tensor("hidden_states", hidden_states)
    if hidden_states.ndim not in (2, 3):
        raise ValueError(
            f"hidden_states must have shape (B, T, H), or (N, H) with cu_seqlens, got {_shape(hidden_states)}"
        )
    check_tensor("lm_head_weight", lm_head_weight, hidden_states.device)
    if hasattr(lm_head_weight, "full_tensor"):
        raise TypeError(
            "lm_head_weight must be a whole tensor, got a sharded DTensor: pass lm_head_weight.full_tensor(), "
            "or call the loss where FSDP has unsharded the head"
        )
    if lm_head_weight.ndim != 2 or lm_head_weight.shape[1] != hidden_states.shape[-1]:
        wanted = f"(V, H) with H = {hidden_states.shape[-1]} like hidden_states"
        raise ValueError(f"lm_head_weight must have shape {wanted}, got {_shape(lm_head_weight)}")
    if not lm_head_weight.shape[0]:
        raise ValueError(f"lm_head_weight must have a row for each of V > 0 tokens, got {_shape(lm_head_weight)}")
    if lm_head_bias is not None:
        check_tensor("lm_head_bias", lm_head_bias, hidden_states.device)
        if lm_head_bias.shape != lm_head_weight.shape[:1]:
            raise ValueError(
                f"lm_head_bias must have shape (V,) = ({lm_head_weight.shape[0]},), got {_shape(lm_head_bias)}"
            )


def check_ids(completion_ids: Tensor, hidden_states: Tensor) -> None:
    """Check the rank, dtype and device of the ids; their range is `check_vocabulary`."""
    check_tensor("completion_ids", completion_ids, hidden_states.device, floating=False)
    if completion_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"completion_ids must have dtype int64 or int32, got {completion_ids.dtype}")
    if completion_ids.shape != hidden_states.shape[:-1]:
        wanted = tuple(hidden_states.shape[:-1])
        raise ValueError(
            f"completion_ids must have shape {wanted} like hidden_states without H, got {_shape(completion_ids)}: "
            "row t predicts completion_ids[:, t]"
        )


def check_vocabulary(completion_ids: Tensor, layout: Layout, vocabulary: int) -> None:
    """Raise if an id that counts is outside [0, V). Reads the ids on the host."""
    flat = completion_ids.reshape(-1)
    outside = (flat < 0) | (flat >= vocabulary)
    outside = outside if layout.mask is None else outside & layout.mask
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"completion_ids must lie in [0, V) = [0, {vocabulary}) where completion_mask is 1, "
            f"got {int(flat[row])} at {_position(row, layout)}"
        )


def check_finite(name: str, values: Tensor | None, layout: Layout | None = None) -> None:
    """Raise if a value that counts is NaN or infinite. Reads the values on the host."""
    if values is None:
        return
    bad = ~torch.isfinite(values)
    if layout is not None and layout.mask is not None and values.shape[: len(layout.shape)] == layout.shape:
        mask = layout.mask.view(layout.shape)
        bad &= mask if bad.ndim == mask.ndim else mask[..., None]
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name} must be finite, got {float(values[where])} at {where}")


def zero_where_nan(values: Tensor | None) -> Tensor | None:
    """The values, 0 where they are NaN, which says of a sampler's log-probability that there is none."""
    return None if values is None else values.masked_fill(values.isnan(), 0)


def check_all_finite(layout: Layout | None, **values: Tensor | None) -> None:
    """`check_finite` of several arguments by their names."""
    for name, value in values.items():
        check_finite(name, value, layout)


def _position(row: int, layout: Layout) -> tuple[int, ...]:
    return (row,) if layout.packed else divmod(row, layout.shape[1])


def make_layout(like_name: str, like: Tensor, completion_mask: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
    """The layout of a batch whose per-token tensors have the shape of `like`, (B, T) or (N,)."""
    if like.ndim not in (1, 2):
        raise ValueError(f"{like_name} must have shape (B, T), or (N,) with cu_seqlens, got {_shape(like)}")
    shape = tuple(like.shape)
    if like.ndim == 2:
        if cu_seqlens is not None:
            raise ValueError(
                f"cu_seqlens goes with packed rows (N,), but {like_name} has shape (B, T) = {shape}: drop it or pack the batch"
            )
        boundaries = torch.arange(shape[0] + 1, device=like.device) * shape[1]
    else:
        boundaries = _check_cu_seqlens(cu_seqlens, shape[0], like)
    mask = None
    if completion_mask is not None:
        check_tensor("completion_mask", completion_mask, like.device, floating=False)
        if completion_mask.shape != like.shape:
            letters = "(B, T)" if like.ndim == 2 else "(N,)"
            longer = like.ndim == 2 and completion_mask.ndim == 2 and completion_mask.shape[1] > shape[1]
            hint = ": drop the prompt columns" if longer else ""
            raise ValueError(
                f"completion_mask must have shape {letters} = {shape} like {like_name}, got {_shape(completion_mask)}{hint}"
            )
        mask = completion_mask.reshape(-1) != 0
    return Layout(shape, boundaries.shape[0] - 1, boundaries, mask)


def _check_cu_seqlens(cu_seqlens: Tensor | None, rows: int, like: Tensor) -> Tensor:
    if cu_seqlens is None:
        raise ValueError(
            f"cu_seqlens is needed for packed rows (N,) = ({rows},): where each rollout begins, and N at the end"
        )
    check_tensor("cu_seqlens", cu_seqlens, like.device, floating=False)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"cu_seqlens must have shape (B + 1,) and dtype int32 or int64, got {_shape(cu_seqlens)} {cu_seqlens.dtype}"
        )
    if not torch.compiler.is_compiling() and not capturing():
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != rows:
            raise ValueError(f"cu_seqlens must begin at 0 and end at N = {rows}, got {first} and {last}")
        if bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must not decrease, got {cu_seqlens.tolist()[:16]}")
    return cu_seqlens.long()


def per_token(
    name: str, values: Tensor | None, layout: Layout, like_name: str, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """The constant (R,) behind a per-token argument."""
    if values is None:
        return None
    check_tensor(name, values, device)
    if tuple(values.shape) != layout.shape:
        raise ValueError(f"{name} must have shape {layout.shape} like {like_name}, got {_shape(values)}")
    return values.detach().reshape(-1).to(dtype)


def per_rollout_or_token(name: str, values: Tensor, layout: Layout, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The constant (R,) behind an argument with a value per rollout (B,) or per token."""
    check_tensor(name, values, device)
    if tuple(values.shape) not in ((layout.rollouts,), layout.shape):
        letters = "one per row (N,)" if layout.packed else "one per token (B, T)"
        raise ValueError(
            f"{name} must have one value per rollout (B,) = ({layout.rollouts},) or {letters} = {layout.shape}, "
            f"got {_shape(values)}"
        )
    return layout.spread(values.detach().to(dtype))


def inverse_temperature(
    temperature: float | Tensor, layout: Layout, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """1 / temperature of every row, (R,)."""
    if isinstance(temperature, Tensor):
        if temperature.ndim == 0:
            temperature = temperature.expand(layout.rollouts)
        spread = per_rollout_or_token("temperature", temperature, layout, device, dtype)
        if device.type == "cpu" and not torch.compiler.is_compiling() and bool((spread <= 0).any()):
            raise ValueError(f"temperature must be > 0, got {float(spread.min())}")
        return 1 / spread
    if not isinstance(temperature, int | float):
        raise TypeError(f"temperature must be a number or a tensor, got {temperature!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    return torch.full((layout.rows,), 1 / temperature, device=device, dtype=dtype)
