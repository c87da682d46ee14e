"""The library's head in the place of TRL's: in the forward of the lm_head, so that the hooks of DDP, FSDP and ZeRO-3 run."""

import functools
import types
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from rlvr_ops import Head, Objective, Plan, Rollouts, policy_loss, token_logps
from rlvr_ops.head.from_model import compare_once, logit_numbers, output_layer, unwrapped
from rlvr_ops.head.in_forward import install, with_head


@dataclass(frozen=True)
class PolicyCall:
    """A loss to compute in the model's forward. The completions are the last `length` columns of its input."""

    rollouts: Rollouts
    objective: Objective
    plan: Plan
    length: int


@dataclass
class FusedOutput(ModelOutput):
    """What the forward gives in the place of logits.

    Scores have log_probs and entropy (B, S - 1), 0 where the label is -100. A loss has log_probs (B, T), NaN in rollouts that
    were not scored, and the mean entropy () of the others.
    """

    loss: Any = None
    log_probs: Any = None
    entropy: Any = None
    aux_loss: Any = None


def use_fused_head(model: Any, temperature: float, *, fp32: bool = False) -> None:
    """Let `model(..., labels=, fused_lm_head=True)` score its labels by `token_logps`, or with `policy_call=` compute a loss.

    Any other call is the forward that the model had.

    Args:
        model: a transformers model, also inside peft. None does nothing.
        temperature: what logits are divided by.
        fp32: whether the head computes in float32 outside of autocast (`cast_lm_head_to_fp32`).

    Raises:
        TypeError: an adapter on the lm_head, or an output layer that is no nn.Linear.
    """
    if model is None:
        return
    model = unwrapped(model)
    install(model)
    original = model.forward

    @functools.wraps(type(model).forward)  # generate looks for its arguments in the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        call, labels = kwargs.pop("policy_call", None), kwargs.pop("labels")
        with_entropy = kwargs.pop("with_entropy", True)
        states = self.base_model(*args, **kwargs, use_cache=False)

        def computation(hidden: Tensor, head: Head) -> dict[str, Any]:
            hidden, head = (hidden.float() if fp32 else hidden), Head(head, temperature=temperature)
            with _precision(hidden, fp32):
                return _scores(hidden, head, labels, with_entropy) if call is None else _loss(hidden, head, call)

        lm_head: Any = output_layer(self)
        output = with_head(self, states.last_hidden_state.to(lm_head.weight.device), computation)
        return FusedOutput(**output, aux_loss=_aux_loss(self, states, kwargs))

    model.forward = types.MethodType(forward, model)


def check_head(model: Any) -> None:
    """Raise unless a model's logits are those of a linear head with scale and softcap, on a few tokens.

    Not asked of a model whose head is not there yet, as when ZeRO-3 or FSDP load it in parts.

    Raises:
        TypeError: naming the model.
    """
    try:
        model = unwrapped(model)
        lm_head: Any = output_layer(model)
        if lm_head.weight.numel() and not lm_head.weight.is_meta:
            compare_once(model, Head(lm_head.weight, lm_head.bias, **logit_numbers(model)._asdict()))
    except TypeError as error:
        raise TypeError(f"fused_loss=True does not go with this model, fused_loss=False does: {error}") from None


def _precision(hidden: Tensor, fp32: bool) -> Any:
    return torch.autocast(hidden.device.type, enabled=False) if fp32 else nullcontext()


def _scores(hidden: Tensor, head: Head, labels: Tensor, with_entropy: bool) -> dict[str, Any]:
    labels = labels[:, 1:].to(hidden.device)
    mask = labels != -100
    scores = token_logps(hidden[:, :-1], head, labels.clamp(min=0), completion_mask=mask, with_entropy=with_entropy)
    entropy = None if scores.entropy is None else scores.entropy.clone()
    return {"log_probs": scores.logps.clone(), "entropy": entropy}


def _loss(hidden: Tensor, head: Head, call: PolicyCall) -> dict[str, Any]:
    length = call.length
    out = policy_loss(hidden[:, -length - 1 : -1], head, call.rollouts, call.objective, call.plan)
    return {"loss": out.loss, "log_probs": out.per_token_logps, "entropy": out.metrics["entropy"]}


def _aux_loss(model: Any, states: Any, kwargs: dict[str, Any]) -> Any:
    """The load-balancing loss of a mixture of experts that was asked for its router's logits."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    mask = kwargs.get("attention_mask")
    return load_balancing_loss_func(states.router_logits, config.num_experts, config.num_experts_per_tok, mask)
