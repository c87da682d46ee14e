"""Our head in the place of a transformers model's own: log-probabilities and entropies instead of logits.

The model's forward calls the lm_head module, and the head's arithmetic stands in that module's forward. So whatever wraps
modules sees the calls it expects: FSDP gathers the lm_head's weight before, and reduces its gradient after.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rlvr_ops.head.from_model import logit_numbers, output_layer, unwrapped
from rlvr_ops.head.head import Head
from rlvr_ops.head.token_logps import token_logps


def install(model: Any, output: type) -> None:
    """Give the model a forward that returns `output(log_probs=(B, S), entropy=(B, S) or None)` if it is given a temperature.

    Row t holds the log-probability of token t + 1, or of `shift_labels`; the last is of no use. Without a temperature the
    model does what it did.

    Raises:
        TypeError: an adapter on the lm_head, or an output layer that computes more than h W^T + b.
    """
    model = unwrapped(model)
    layer = output_layer(model)
    name = type(model).__name__
    if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save"):
        raise TypeError(
            f"the lm_head of {name} has an adapter: leave lm_head out of target_modules, or use verl's own head"
        )
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise TypeError(f"the lm_head of {name} must be an nn.Linear, got {type(layer).__name__}: use verl's own head")
    numbers = logit_numbers(model)
    logits, score = model.forward, layer.forward

    def scores(
        self: nn.Linear, hidden: Tensor, labels: Tensor | None = None, temperature: float = 1.0, entropy: bool = False
    ) -> Any:
        if labels is None:
            return score(hidden)
        head = Head(self.weight, self.bias, *numbers, temperature)
        found = token_logps(hidden, head, labels, with_entropy=entropy)
        # No views: an edit in place of one would lose the hook that FSDP2 puts on outputs.
        return found.logps.clone(), None if found.entropy is None else found.entropy.clone()

    def forward(
        self: Any,
        input_ids: Tensor,
        temperature: float | None = None,
        shift_labels: Tensor | None = None,
        with_entropy: bool = True,
        **inputs: Any,
    ) -> Any:
        if temperature is None:
            return logits(input_ids=input_ids, **inputs)
        given = {name: value for name, value in inputs.items() if value is not None}  # peft passes many None
        hidden = self.base_model(input_ids=input_ids, **given).last_hidden_state
        labels = torch.roll(input_ids, -1, -1) if shift_labels is None else shift_labels
        log_probs, entropy = layer(hidden, labels, temperature, with_entropy)
        return output(log_probs=log_probs, entropy=entropy)

    layer.forward = MethodType(scores, layer)  # type: ignore[method-assign]
    model.forward = MethodType(forward, model)


@torch.no_grad()
def check(module: Any, device: Any) -> None:
    """Raise unless the installed head's log-probabilities are those of the model's own logits, on eight tokens.

    Raises:
        TypeError: they differ, for example by a scale that was not found in the model's configuration.
    """
    ids = torch.arange(1, 9, device=device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    training = module.training
    module.eval()
    logits = module(**inputs).logits[:, :-1]
    ours = module(**inputs, temperature=1.0, with_entropy=False).log_probs[:, :-1]
    module.train(training)
    if hasattr(module, "reshard"):
        module.reshard()  # FSDP2 keeps the root's weights gathered for a backward that does not come
    theirs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    if error > (1e-4 if logits.dtype == torch.float32 else 3e-2):
        name = type(unwrapped(module)).__name__.removeprefix("FSDP")
        raise TypeError(
            f"cannot vouch for {name}: log-probabilities of our head differ from those of its own "
            f"logits by {error:.1e} of the largest: use verl's own head (unset VERL_ENGINE_VENDOR)"
        )
