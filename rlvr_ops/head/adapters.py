"""The weight and bias that an lm_head module multiplies by: nn.Linear, and LoRA around one as peft makes it.

peft is recognised by its attributes and not imported. A LoRA layer's own `.weight` is the frozen base: a loss on it would
silently ignore the adapter. Any other wrapper that computes more than its weight says is refused.
"""

from typing import Any

import torch
from rlvr_kernels.checks import check_tensor
from torch import Tensor, nn


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """W (V, H) and b (V,) or None, differentiable in the parameters they are made of.

    Raises:
        TypeError: the module computes more than h W^T + b. The message names its type and the reason.
    """
    module = _unwrapped(module)
    if hasattr(module, "base_layer"):
        return _lora(module)
    return _linear(module)


def _unwrapped(module: Any) -> Any:
    """Unwrap torch.compile and peft's modules_to_save, down to the module that runs."""
    if hasattr(module, "_orig_mod"):
        _check_hooks(module)
        return _unwrapped(module._orig_mod)
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        _check_unhooked(module)
        active = [name for name in _active(module) if name in module.modules_to_save]
        off = getattr(module, "disable_adapters", False) or not active
        return _unwrapped(module.original_module if off else module.modules_to_save[active[0]])
    return module


def _active(module: Any) -> list[str]:
    names = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", [])
    return [names] if isinstance(names, str) else list(names)


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    name = type(module).__name__
    if not isinstance(module, nn.Linear):
        way = "pass the model's output layer, or Head(weight) if that is all it uses"
        way = "a tensor goes to Head itself" if isinstance(module, Tensor) else way
        raise TypeError(f"lm_head must be an nn.Linear or peft's LoRA around one, got {name}: {way}")
    if type(module).forward is not nn.Linear.forward and not hasattr(module, "parametrizations"):
        raise TypeError(f"lm_head must compute h W^T + b, got {name} with a forward of its own")
    parametrized = hasattr(module, "parametrizations")
    if not parametrized and "weight" not in module._parameters:
        raise TypeError(
            f"lm_head must hold its weight as a parameter, got {name} whose hooks compute it (pruning, weight_norm)"
        )
    weight = module.weight
    if type(weight) not in (Tensor, nn.Parameter) and not hasattr(weight, "full_tensor"):
        raise TypeError(f"lm_head must have an ordinary weight, got {name} with {type(weight).__name__} (quantised?)")
    check_tensor("lm_head.weight", weight)
    if tuple(weight.shape) != (module.out_features, module.in_features):
        raise TypeError(
            f"lm_head.weight must have shape ({module.out_features}, {module.in_features}), got {tuple(weight.shape)}: "
            "gather it first (FSDP, ZeRO-3), or pass an unquantised head"
        )
    _check_unhooked(module)
    return weight, module.bias


def _check_unhooked(module: Any) -> None:
    """Raise if a hook or a replaced forward may change what the module computes."""
    if "forward" in vars(module):
        raise TypeError(f"lm_head must compute h W^T + b, got {type(module).__name__} whose forward was replaced")
    _check_hooks(module)


def _check_hooks(module: Any) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        raise TypeError(
            f"lm_head must compute h W^T + b, got {type(module).__name__} with forward hooks: pass its weight if they change "
            "nothing"
        )


def _lora(module: Any) -> tuple[Tensor, Tensor | None]:
    """W + sum over the active adapters of scaling * B A, in the widest dtype of the three."""
    name = type(module).__name__
    a: Any = getattr(module, "lora_A", None)
    b: Any = getattr(module, "lora_B", None)
    scaling: Any = getattr(module, "scaling", None)
    is_lora = isinstance(a, nn.ModuleDict) and isinstance(b, nn.ModuleDict) and isinstance(scaling, dict)
    if not is_lora or hasattr(module, "lora_E"):
        raise TypeError(
            f"lm_head must be an nn.Linear or peft's LoRA around one, got the adapter {name}: merge it first"
        )
    weight, bias = _linear(module.base_layer)
    _check_unhooked(module)
    merged = bool(getattr(module, "merged", False))
    if getattr(module, "disable_adapters", False):
        if merged:
            raise TypeError("lm_head has an adapter that is merged and disabled at once: unmerge it first")
        return weight, bias
    if merged:
        return weight, bias
    for adapter in (x for x in _active(module) if x in a):
        _check_adapter(module, adapter)
        delta = scaling[adapter] * (b[adapter].weight @ a[adapter].weight)
        weight = weight + delta.to(torch.promote_types(weight.dtype, delta.dtype))
    return weight, bias


def _check_adapter(module: Any, adapter: str) -> None:
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    dropout = module.lora_dropout[adapter] if adapter in getattr(module, "lora_dropout", {}) else nn.Identity()
    drops = not isinstance(dropout, nn.Identity | nn.Dropout) or (getattr(dropout, "p", 0) > 0 and dropout.training)
    for part in (a, b, dropout):
        _check_unhooked(part)
    variants = getattr(module, "lora_variant", {}), getattr(module, "use_dora", {})
    reasons = {
        "is more than W + scaling B A (DoRA or another variant)": any(bool(v.get(adapter)) for v in variants),
        "has a bias": b.bias is not None or a.bias is not None,
        "is made of something other than nn.Linear": type(a) is not nn.Linear or type(b) is not nn.Linear,
        "holds its weight transposed": bool(getattr(module, "fan_in_fan_out", False)),
        "drops inputs at random, which no weight can express: call eval() or set lora_dropout=0": drops,
        "is quantised": getattr(module, "quantization_backend", None) is not None,
    }
    for reason, true in reasons.items():
        if true:
            raise TypeError(f"lm_head has a LoRA adapter {adapter!r} that {reason}")
