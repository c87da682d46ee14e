"""The last layer of a causal language model: hidden states that line up with the completion, and its lm_head.

    logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap)

Which scale and softcap a model has is read from its configuration, and `Head.of` then compares its own logits with
the model's on a few tokens: an architecture that does something else is refused, not trained on wrong gradients.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

import rlvr_ops
from rlvr_trainer.parsing import ConfigError

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISORS = ("logits_scaling",)  # Granite, MiniCPM3
MULTIPLIED_ANYWAY = ("hyperclovax",)  # calls its multiplier logits_scaling


class UnsupportedArchitectureError(ConfigError):
    """A model whose logits this package cannot rebuild from hidden states."""


class Head(rlvr_ops.Head):
    """The head of a transformers causal LM. `weight` is the model's own parameter, tied or not."""

    @classmethod
    def of(cls, model: Any) -> "Head":  # type: ignore[override]
        """The head of a model at temperature 1, after comparing its logits with the model's own.

        Raises:
            UnsupportedArchitectureError: encoder-decoders, heads that are no linear layer, and logits that differ.
        """
        name = type(model).__name__
        linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedArchitectureError(f"{name} is an encoder-decoder: a decoder-only causal LM is wanted.")
        if not isinstance(linear, nn.Linear):
            raise UnsupportedArchitectureError(
                f"the output layer of {name} is {type(linear).__name__}, and only a plain nn.Linear is supported."
            )
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        head = cls(linear.weight, linear.bias, _logit_scale(config), float(softcap) if softcap else None)
        head._compare(model)
        return head

    def logits(self, hidden_states: Tensor) -> Tensor:
        """All logits (.., V), materialised: for the comparison and for tests, never for training."""
        logits = self.logit_scale * nn.functional.linear(hidden_states, self.weight, self.bias)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def arguments(self) -> dict[str, Any]:
        """The keywords by which `rlvr_ops.token_logps` knows the head, but for the temperature."""
        return {
            "lm_head_weight": self.weight,
            "lm_head_bias": self.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    @torch.no_grad()
    def _compare(self, model: Any) -> None:
        """Refuse a model whose logits differ from ours, or whose states depend on padding to the left."""
        name = type(model).__name__
        ids = torch.arange(1, 9, device=self.weight.device)[None] % self.weight.shape[0]
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        hidden = last_hidden_state(model, ids, torch.ones_like(ids))
        ours = self.logits(hidden)
        if ours.shape != theirs.shape:
            found = f"shape {tuple(ours.shape)} against its {tuple(theirs.shape)}"
        else:
            found = _difference(ours, theirs)
        if found:
            raise UnsupportedArchitectureError(
                f"cannot vouch for {name}: logits rebuilt from its hidden states, lm_head, bias, softcap"
                f" {self.softcap} and logit scale {self.logit_scale} are not the model's own: {found}."
            )
        padded = nn.functional.pad(ids, (3, 0), value=1)
        mask = nn.functional.pad(torch.ones_like(ids), (3, 0))
        found = _difference(last_hidden_state(model, padded, mask)[:, 3:], hidden)
        if found:
            raise UnsupportedArchitectureError(
                f"cannot vouch for {name}: padding on the left changes its hidden states: {found}."
            )


def _difference(ours: Tensor, theirs: Tensor) -> str:
    """Say how far two tensors lie apart, or nothing if that is rounding."""
    tolerance = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 3e-2
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    return "" if error <= tolerance else f"they differ by {error:.1e} of the largest"


def last_hidden_state(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What the head sees, (B, S, H). Positions count from the first token that is not padding, on either side."""
    decoder = model.base_model
    if decoder is model:
        raise UnsupportedArchitectureError(f"{type(model).__name__} has no body apart from its head.")
    arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        arguments["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    hidden: Tensor = decoder(**arguments).last_hidden_state
    return hidden


def completion_hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
    """The rows (B, length, H) that predict the last `length` columns of `input_ids`: shifted by one, ready to use.

    Row t is the state after the token before completion token t, so row 0 sits on the last prompt token.
    """
    if not 0 < length < input_ids.shape[1]:
        raise ValueError(f"length must be in 1..{input_ids.shape[1] - 1} for (B, S) = {tuple(input_ids.shape)}")
    return last_hidden_state(model, input_ids, attention_mask)[:, -length - 1 : -1]


def _logit_scale(config: Any) -> float:
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        divisor = getattr(config, name, None) or 1.0
        scale = scale * divisor if config.model_type in MULTIPLIED_ANYWAY else scale / divisor
    return float(scale)
