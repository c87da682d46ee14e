"""Tensor checks of the functions around the losses. Every error names the argument, what came and what is wanted."""

import torch
from rlvr_kernels.checks import check_logps, check_tensor
from torch import Tensor


def check_all_tensors(**tensors: Tensor | None) -> None:
    """Run `check_tensor`, allowing any dtype, on every argument that is not None."""
    for name, values in tensors.items():
        if values is not None:
            check_tensor(name, values, floating=False)


def check_verdicts(name: str, values: Tensor) -> None:
    """Raise unless all values are 0 or 1."""
    neither = (values != 0) & (values != 1)
    if bool(neither.any()):
        raise ValueError(
            f"{name} must hold only 0 and 1, got {float(values[neither][0]):g}: "
            "give what the verifier said, not the shaped reward"
        )


def active_values(name: str, values: Tensor, mask_name: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per-token values, detached, in float32 or wider and 0 where masked; and which count, bool. Both in their shape."""
    check_tensor(name, values)
    if mask is not None:
        check_tensor(mask_name, mask, values.device, floating=False)
        if mask.shape != values.shape:
            raise ValueError(f"{mask_name} must have shape {tuple(values.shape)} like {name}, got {tuple(mask.shape)}")
    counts = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    active = values.detach().to(torch.promote_types(values.dtype, torch.float32)).masked_fill(~counts, 0)
    if bool(active.isnan().any()):
        raise ValueError(f"{name} must not be NaN where {mask_name} is 1, got NaN at {_first(active.isnan())}")
    return active, counts


def active_logps(name: str, logps: Tensor, mask_name: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`active_values` of log-probabilities, clamped to 0: rounding may leave one slightly above it."""
    active, counts = active_values(name, logps, mask_name, mask)
    check_logps(name, active)
    return active.clamp(max=0), counts


def _first(which: Tensor) -> tuple[int, ...]:
    """The index of the first true entry."""
    return tuple(int(i) for i in which.nonzero()[0])
