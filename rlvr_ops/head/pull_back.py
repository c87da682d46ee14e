"""From the gradients of log-probabilities and entropies to those of hidden states, weight and bias."""

from typing import Any

import torch
from rlvr_kernels.pull_back import Needs
from rlvr_kernels.pull_back import pull_back as pull_back_rows
from torch import Tensor

from rlvr_ops.head.compiled import decode
from rlvr_ops.head.plan import Call, no_autocast, or_empty
from rlvr_ops.rollouts import chosen, rows_of, spread

Gradients = tuple[Tensor, Tensor, Tensor]
"""d_hidden (R, H), d_weight (V, H), d_bias (V,); empty where not needed."""


def pull_back(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call, lse: Tensor, coef: Tensor, entropy: Tensor,
    entropy_coef: Tensor | None,
) -> Gradients:  # fmt: skip
    """Pull coef = dL/dlogp (R,) and entropy_coef = dL/dH (R,) back, through the rows where either is not 0."""
    if is_batched(coef) or is_batched(entropy_coef):
        raise NotImplementedError(
            "a batch of upstream gradients (is_grads_batched=True, jacobian(vectorize=True)) is not supported: call backward "
            "once for each"
        )
    _check_gathered(lm_head_weight=weight, lm_head_bias=bias)
    with no_autocast(hidden):
        alive = coef != 0 if entropy_coef is None else (coef != 0) | (entropy_coef != 0)
        scored, dtype = call.scored, call.schedule.dtype
        index = rows_of(alive if scored is None else alive & scored)
        states, ids, logit_map = call.inputs(hidden, bias, index)
        states, coef = (
            chosen(states, index).to(dtype),
            chosen(coef, index).contiguous(),
        )  # frees the coefficients of all rows
        if entropy_coef is not None:
            entropy_coef = chosen(entropy_coef, index).contiguous()
        found = pull_back_rows(
            states, weight.to(dtype), ids, logit_map, chosen(lse, index), coef,
            entropy=None if entropy_coef is None else chosen(entropy, index), entropy_coef=entropy_coef,
            needs=Needs(*call.needs), weight_dtype=weight.dtype, workspace_bytes=call.schedule.workspace_bytes,
            backend=call.schedule.backend, shard=call.schedule.shard,
        )  # fmt: skip
        d_hidden = None if found.hidden is None else found.hidden.to(hidden.dtype)
        d_bias = None if found.bias is None or bias is None else found.bias.to(bias.dtype)
        return spread(d_hidden, index, hidden), or_empty(found.weight, hidden), or_empty(d_bias, hidden)


def _check_gathered(**parameters: Tensor | None) -> None:
    """Raise if what forward read was freed since: autograd keeps a parameter, not its numbers."""
    for name, values in parameters.items():
        if values is not None and not values.untyped_storage().nbytes():
            raise RuntimeError(
                f"{name} was freed between forward and backward: gather it again before backward, as FSDP and ZeRO-3 do for the "
                "module whose forward calls the loss"
            )


@torch.library.custom_op("rlvr_ops::pull_back", mutates_args=())
def pull_back_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tensors: list[Tensor], numbers: Tensor, text: str, lse: Tensor,
    coef: Tensor, entropy: Tensor, entropy_coef: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`pull_back` of the call in an encoded record, for torch.compile."""
    call = decode(tensors, numbers, text).call
    return pull_back(hidden, weight, bias, call, lse, coef, entropy, entropy_coef)


@pull_back_op.register_fake
def _(hidden, weight, bias, tensors, numbers, text, lse, coef, entropy, entropy_coef):  # type: ignore[no-untyped-def]
    return like_inputs(hidden, weight, bias, decode(tensors, None, text).call.needs)


def is_batched(values: Tensor | None) -> bool:
    """Whether vmap holds a batch of these: the upstream gradients of `torch.autograd.grad(..., is_grads_batched=True)`."""
    return values is not None and bool(torch._C._functorch.is_legacy_batchedtensor(values))


def like_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> Gradients:
    """Uninitialised gradients, for tracing."""
    shapes = (hidden, weight, bias)
    d_hidden, d_weight, d_bias = (
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0)
        for x, need in zip(shapes, needs, strict=True)
    )
    return d_hidden, d_weight, d_bias


def saved(ctx: Any) -> list[Any]:
    """The tensors that `plan.save` saved."""
    return [x if aside is None else aside for x, aside in zip(ctx.saved_tensors, ctx.kept_aside, strict=True)]


def wanted(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Replace gradients that are not needed with None."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
