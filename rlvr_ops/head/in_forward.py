"""with_head: compute on a head inside the forward of the lm_head module.

FSDP and ZeRO-3 gather a module's weight before its forward and reduce its gradient after its backward. A loss that only
reads the weight would find a shard of it, or leave the gradient of one rank.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from rlvr_ops.head.from_model import logit_numbers, output_layer, unwrapped
from rlvr_ops.head.head import Head

Computation = Callable[[Tensor, Head], Any]


def install(model: Any) -> None:
    """Let `with_head` call the lm_head of a transformers model. Any other call of it is the one it was.

    Raises:
        TypeError: naming the model: an adapter on the lm_head, or an output layer that is no nn.Linear.
    """
    model = unwrapped(model)
    layer: Any = output_layer(model)
    name = type(model).__name__
    if hasattr(layer, "base_layer"):
        raise TypeError(
            f"the lm_head of {name} has an adapter: leave lm_head out of target_modules, or use another head"
        )
    wrapped = getattr(layer, "modules_to_save", None)  # peft's copies of the layer, of which one is active
    layers = [layer] if wrapped is None else [layer.original_module, *wrapped.values()]
    if any(not isinstance(each, nn.Linear) or type(each).forward is not nn.Linear.forward for each in layers):
        raise TypeError(f"the lm_head of {name} must be an nn.Linear, got {type(layer).__name__}: use another head")
    for each in layers:
        _install(each, logit_numbers(model)._asdict())


def _install(linear: nn.Linear, numbers: dict[str, Any]) -> None:
    logits = linear.forward

    def forward(self: nn.Linear, hidden: Tensor, computation: Computation | None = None) -> Any:
        return logits(hidden) if computation is None else computation(hidden, Head(self.weight, self.bias, **numbers))

    linear.forward = MethodType(forward, linear)  # type: ignore[method-assign]


def with_head(model: Any, hidden_states: Tensor, computation: Computation) -> Any:
    """computation(hidden_states, head) in the forward of the lm_head of a model with `install`.

    What it returns goes through the hooks of FSDP and DeepSpeed, which see tensors in tuples, lists and dicts. Tensors must
    be no views: an edit in place of one would lose a hook.
    """
    return output_layer(unwrapped(model))(hidden_states, computation)
