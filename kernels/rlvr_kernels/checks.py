"""Checks of names, numbers and tensors. Every error names the argument, what came and what is wanted."""

import difflib
import math
from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def choose(argument: str, given: object, known: Iterable[str]) -> None:
    """Raise a ValueError unless `given` is a known name; the message lists the known names and suggests the nearest."""
    known = tuple(known)
    if given in known:
        return
    near = (
        difflib.get_close_matches(given.lower().replace("-", "_"), known, n=1, cutoff=0.4)
        if isinstance(given, str)
        else []
    )
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {given!r}{hint}")


def check_number(argument: str, value: object, *, zero: bool = False) -> None:
    """Raise unless `value` is a finite number above 0. `zero` also allows 0."""
    if not isinstance(value, int | float):
        raise TypeError(f"{argument} must be a number, got {value!r}")
    if not (0 < value < math.inf or (zero and value == 0)):
        raise ValueError(f"{argument} must be {'>=' if zero else '>'} 0 and finite, got {value}")


def check_logits(logit_scale: float, softcap: float | None) -> None:
    """Raise unless `logit_scale` is finite and not 0, and `softcap` is None or finite and above 0."""
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if not isinstance(value, int | float) and (name, value) != ("softcap", None):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be > 0 and finite, or None, got {softcap}")
    if not -math.inf < logit_scale < math.inf or logit_scale == 0:
        raise ValueError(f"logit_scale must be a finite number other than 0, got {logit_scale}")


def shape_of(values: torch.Tensor) -> str:
    """Format the shape for an error message."""
    return str(tuple(values.shape))


def check_tensor(
    name: str, values: object, device: torch.device | None = None, *, floating: bool = True, grad: bool = True
) -> None:
    """Raise unless `values` is an unsharded tensor that holds data, on `device`, of a floating dtype if `floating`.

    grad=False also refuses tensors that require a gradient, for arguments that pass none on.
    """
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}{_way_out(name, values)}")
    if device is not None and values.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {values.device}")
    if floating and values.dtype not in FLOATS:
        wanted = " of 16, 32 or 64 bits" if values.is_floating_point() else ""
        raise TypeError(f"{name} must have a floating dtype{wanted}, got {values.dtype}")
    if torch.compiler.is_compiling():
        return
    if type(values) is not torch.Tensor:
        _check_subclass(name, values)
    if values.is_meta:
        _check_data(name)
    if values.layout != torch.strided or values.is_nested:
        kind = "nested tensor" if values.is_nested else f"tensor of layout {values.layout}"
        raise TypeError(f"{name} must be an ordinary strided tensor, got a {kind}")
    if values.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {values.dtype}")
    if not grad and values.requires_grad:
        raise ValueError(f"{name} must not require a gradient, which it would not get: pass {name}.detach()")


def _way_out(name: str, values: object) -> str:
    """Where the tensor is that was meant."""
    if name == "lm_head_weight" and hasattr(values, "get_output_embeddings"):
        return ": Head.from_model(it) is its head"
    if name == "lm_head_weight" and isinstance(values, torch.nn.Module):  # an adapter's own weight is the frozen base
        return ": Head.of(it) has its weight and its bias"
    return ": pass its .logps" if name.endswith("logps") and hasattr(values, "logps") else ""


def _check_data(name: str) -> None:
    raise TypeError(f"{name} must hold numbers, got a meta tensor")


def _check_subclass(name: str, values: torch.Tensor) -> None:
    if isinstance(values, FakeTensor):
        raise TypeError(f"{name} must hold numbers, got a fake tensor: only torch.compile may trace this")
    if hasattr(values, "full_tensor"):
        placements = getattr(values, "placements", ())
        kind = "replicated" if placements and all(p.is_replicate() for p in placements) else "sharded"
        way = f"pass {name}.to_local()" if kind == "replicated" else f"pass {name}.full_tensor()"
        if name.startswith("lm_head"):
            where = "call the loss in the forward of the module that FSDP gathers it for"
            summed = ": full_tensor() does not add up the ranks' gradients by itself"
            way = f"{where}{summed}" if values.requires_grad and kind == "sharded" else f"{way}, or {where}"
        raise TypeError(f"{name} must be a whole tensor, got a {kind} DTensor: {way}")


def check_no_transform(**values: object) -> None:
    """Raise inside a transform of torch.func, and if a tensor carries a forward-mode tangent, which would become 0."""
    if torch.compiler.is_compiling():
        return
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{name} has a forward-mode tangent: only reverse mode (backward, grad) is supported"
            )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "the losses and token_logps do not run inside torch.func (grad, vjp, vmap, functionalize, ...): use backward or "
            "torch.autograd.grad, and a loop for vmap"
        )


def check_finite(name: str, values: torch.Tensor | None, mask: torch.Tensor | None = None) -> None:
    """Raise if a value is NaN or infinite where `mask`, of the leading shape of `values`, is true. One host sync."""
    if values is None:
        return
    values = values.detach()
    bad = ~torch.isfinite(values)
    if mask is not None:
        bad &= mask if bad.ndim == mask.ndim else mask[..., None]
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name} must be finite, got {float(values[where])} at {where}")


def check_logps(name: str, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Raise if a log-probability is above 0, by more than rounding, where `mask`, of the same shape, is true. One host sync."""
    above = values.detach() > 1e-3
    above = above if mask is None else above & mask
    if bool(above.any()):
        where = tuple(int(i) for i in above.nonzero()[0])
        raise ValueError(
            f"{name} must be at most 0, got {float(values[where]):g} at {where}: give log-probabilities, not probabilities, from "
            "logits and a log-sum-exp of one precision"
        )


def check_types(hint: str = "", **arguments: tuple[object, type]) -> None:
    """Raise a TypeError unless every argument, given as (value, type), has its type."""
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind):
            came = type(value).__name__
            came = f"{type(value).__module__}.{came}" if came == kind.__name__ else came
            came = f"the class {value.__name__}" if isinstance(value, type) else came
            raise TypeError(f"{name} must be of type {kind.__name__}, got {came}{hint}")
