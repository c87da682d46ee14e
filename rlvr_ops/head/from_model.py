"""The head and the hidden states of a transformers causal LM, which is recognised by its attributes and not imported.

    logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap)

A model's scale and softcap are read from its configuration. A comparison with the model's own logits on a few tokens then
refuses every architecture that computes something else, so that nothing is trained on wrong gradients.
"""

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rlvr_kernels.checks import check_tensor, shape_of
from torch import Tensor, nn

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM3; Inkling
MULTIPLIED_ANYWAY = ("hyperclovax",)  # calls its multiplier logits_scaling
SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap", "softcap")  # Gemma; xLSTM; two more

_compared: "weakref.WeakSet[Any]" = weakref.WeakSet()


class LogitNumbers(NamedTuple):
    """What a model does to h W^T + b."""

    logit_scale: float
    softcap: float | None


def unwrapped(model: Any) -> Any:
    """The transformers model inside torch.compile, DistributedDataParallel, FSDP and peft.

    Raises:
        TypeError: a peft adapter that changes the inputs (prompt tuning), so that the model inside computes something else.
    """
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod)
    if hasattr(model, "get_base_model"):
        configs = getattr(model, "peft_config", {}).values()
        if any(getattr(config, "is_prompt_learning", False) for config in configs):
            raise TypeError(f"{type(model).__name__} adds to the prompt: only adapters inside the layers are supported")
        return unwrapped(model.get_base_model())
    if isinstance(getattr(model, "module", None), nn.Module) and not hasattr(type(model), "get_output_embeddings"):
        return unwrapped(model.module)
    return model


def output_layer(model: Any) -> nn.Module:
    """The lm_head of an unwrapped model.

    Raises:
        TypeError: an encoder-decoder, or a model without an output layer.
    """
    name = type(model).__name__
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        layer = ": Head.of takes a layer" if isinstance(model, nn.Linear) else ""
        raise TypeError(f"model must be a causal language model of transformers, got {name}{layer}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"{name} is an encoder-decoder: a decoder-only causal language model is wanted")
    layer = model.get_output_embeddings()
    if layer is None:
        raise TypeError(f"{name} has no output layer: a causal language model is wanted")
    return layer


def logit_numbers(model: Any) -> LogitNumbers:
    """The scale and softcap of an unwrapped model, from its text configuration."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _number(config, name)
    for name in DIVISORS:
        number = _number(config, name)
        scale = scale * number if config.model_type in MULTIPLIED_ANYWAY else scale / number
    caps = [getattr(config, name, None) for name in SOFTCAPS]
    return LogitNumbers(scale, next((float(cap) for cap in caps if cap), None))


def _number(config: Any, name: str) -> float:
    value = getattr(config, name, None)
    return 1.0 if value is None else float(value)


def hidden_states_of(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, length: int | None = None, **inputs: Any
) -> Tensor:
    """What the lm_head of a transformers causal LM sees: the states (B, S, H) after the final norm.

    With `length` only the rows (B, length, H) that predict the last `length` columns of input_ids. Row t is then the state
    after the token before completion token t, as `ace_loss` and `token_logps` want it.

    Positions count from the first token that is not padding, on either side. With further inputs, such as `position_ids` or
    images, they are the model's own.

    Args:
        model: a causal or image-text model, also inside peft, torch.compile or DistributedDataParallel. It is called
            without its head and without these wrappers: inside DistributedDataParallel and FSDP call this in a module's
            forward, where their hooks have run.
        input_ids: (B, S) int, prompts and completions.
        attention_mask: (B, S), 0 where padded. None: nothing is.
        length: in 1 .. S - 1. None: every position.
        inputs: what else the model takes, such as `pixel_values`.

    Raises:
        TypeError, ValueError: naming the argument, or a model that has no body apart from its head or whose adapter adds to
            the prompt.

    >>> import transformers
    >>> config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=4)
    >>> model = transformers.LlamaForCausalLM(config)
    >>> hidden_states_of(model, torch.arange(12).view(2, 6), length=4).shape
    torch.Size([2, 4, 16])
    """
    _check(input_ids, attention_mask, length)
    body = _body(unwrapped(model))
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not inputs and "position_ids" in inspect.signature(body.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    output = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
    hidden: Tensor = output.last_hidden_state
    return hidden if length is None else hidden[:, -length - 1 : -1]


def _check(input_ids: Tensor, attention_mask: Tensor | None, length: int | None) -> None:
    check_tensor("input_ids", input_ids, floating=False)
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (B, S), got {shape_of(input_ids)}")
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, floating=False)
        if attention_mask.shape != input_ids.shape:
            wanted = f"(B, S) = {tuple(input_ids.shape)} like input_ids, prompts included"
            raise ValueError(f"attention_mask must have shape {wanted}, got {shape_of(attention_mask)}")
    if length is None:
        return
    if not isinstance(length, int) or isinstance(length, bool):
        raise TypeError(f"length must be an int, got {length!r}")
    if not 0 < length < input_ids.shape[1]:
        wanted = f"1..{input_ids.shape[1] - 1} for (B, S) = {tuple(input_ids.shape)}"
        raise ValueError(f"length must be in {wanted}, got {length}")


def _body(model: Any) -> Any:
    body = getattr(model, "base_model", model)
    body = getattr(model, "model", model) if body is model else body  # Llama 4's base_model_prefix is another's
    if body is model:
        raise TypeError(f"{type(model).__name__} has no body apart from its head: a causal language model is wanted")
    return body


def compare_once(model: Any, head: Any) -> None:
    """Raise if the head's logits are not the unwrapped model's own. Three forwards of 11 tokens, the first time only.

    Raises:
        TypeError: logits that differ, or states that depend on padding to the left.
    """
    if model not in _compared:
        with torch.no_grad(), evaluating(model):
            _compare(model, head)
        _compared.add(model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and then every module as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _compare(model: Any, head: Any) -> None:
    name = type(model).__name__
    ids = torch.arange(1, 9, device=head.weight.device)[None] % head.weight.shape[0]
    theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    hidden = hidden_states_of(model, ids)
    exact = hidden.dtype in (torch.float32, torch.float64)
    if hidden.shape[-1] != head.weight.shape[1]:
        raise TypeError(f"cannot vouch for {name}: its lm_head does not take the hidden states of its body")
    ours = head.logits(hidden)
    if ours.shape != theirs.shape:
        found = f"shape {tuple(ours.shape)} against its {tuple(theirs.shape)}"
    else:
        found = difference(ours, theirs, 1e-5 if exact else 1e-2)
    if found:
        raise TypeError(
            f"cannot vouch for {name}: logits rebuilt from its hidden states, lm_head, bias, softcap {head.softcap} and logit "
            f"scale {head.logit_scale} are not the model's own: {found}"
        )
    padded, mask = nn.functional.pad(ids, (3, 0), value=1), nn.functional.pad(torch.ones_like(ids), (3, 0))
    found = difference(hidden_states_of(model, padded, mask)[:, 3:], hidden, 1e-4 if exact else 3e-2)
    if found:
        raise TypeError(f"cannot vouch for {name}: padding on the left changes its hidden states: {found}")


def difference(ours: Tensor, theirs: Tensor, tolerance: float) -> str:
    """Say how far two tensors lie apart, or nothing if that is rounding."""
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    return "" if error <= tolerance else f"they differ by {error:.1e} of the largest"
