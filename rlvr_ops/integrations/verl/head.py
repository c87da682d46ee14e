"""Our head in the place of a transformers model's own: log-probabilities and entropies instead of logits.

The head's arithmetic stands in the lm_head's own forward, where FSDP gathers its weight and reduces its gradient.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from rlvr_ops.head import in_forward
from rlvr_ops.head.from_model import difference, evaluating, output_layer, unwrapped
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
    if hasattr(output_layer(model), "modules_to_save"):
        raise TypeError(f"the lm_head of {type(model).__name__} has an adapter: leave lm_head out of modules_to_save")
    in_forward.install(model)
    logits = model.forward

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

        def scores(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
            found = token_logps(hidden, Head(head, temperature=temperature), labels, with_entropy=with_entropy)
            return found.logps.clone(), None if found.entropy is None else found.entropy.clone()  # no views

        log_probs, entropy = in_forward.with_head(self, hidden, scores)
        return output(log_probs=log_probs, entropy=entropy)

    model.forward = MethodType(forward, model)


@torch.no_grad()
def check(module: Any, device: Any) -> None:
    """Raise unless the installed head's log-probabilities are those of the model's own logits, on eight tokens.

    Raises:
        TypeError: they differ, for example by a scale that was not found in the model's configuration.
    """
    model = unwrapped(module)
    layer: Any = output_layer(model)
    ids = torch.arange(1, 9, device=device)[None] % layer.out_features
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with evaluating(module):
        logits = module(**inputs).logits[:, :-1]
        ours = module(**inputs, temperature=1.0, with_entropy=False).log_probs[:, :-1]
    if hasattr(module, "reshard"):
        module.reshard()  # FSDP2 keeps the root's weights gathered for a backward that does not come
    theirs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    found = difference(ours, theirs, 1e-4 if logits.dtype == torch.float32 else 3e-2)
    if found:
        raise TypeError(
            f"cannot vouch for {type(model).__name__.removeprefix('FSDP')}: log-probabilities of our head are not those of "
            f"its own logits: {found}: use verl's own head (unset VERL_ENGINE_VENDOR)"
        )
