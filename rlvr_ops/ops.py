"""The three operations as torch.library custom ops, so that torch.compile sees them whole, with their gradients.

    score        hidden, weight, ids -> logp, entropy, ...      differentiable in logp and entropy (by pull_back)
    weigh        logp, old, ref, advantages -> losses           differentiable in logp
    single_pass  hidden, weight, ... -> loss                    its gradients are computed in the forward pass

Everything is flat here: R rows of B rollouts. Specs travel as text, which an op's schema can carry.
"""

import torch
from rlvr_kernels.capture import capturing
from rlvr_kernels.logits import accumulator_dtype
from rlvr_kernels.pull_back import Needs
from rlvr_kernels.pull_back import pull_back as pull_back_rows
from rlvr_kernels.scale import scale_
from rlvr_kernels.score import score as score_rows
from rlvr_kernels.single_pass import Weigher
from rlvr_kernels.single_pass import single_pass as single_pass_rows
from rlvr_kernels.tile import Kept, kept_columns, logit_dtype, row_pitch
from rlvr_kernels.weigh import STATISTICS
from rlvr_kernels.weigh import weigh as weigh_rows
from torch import Tensor

from rlvr_ops.rows import blank, chosen, compact, rows_of, spread
from rlvr_ops.spec_text import decode_head, decode_policy


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """The dtypes are chosen here and not by autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


@torch.library.custom_op("rlvr_ops::score", mutates_args=())
def score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scored: Tensor | None, inv_temperature: Tensor, head: str,
    dtype: torch.dtype, entropy: bool, mean: bool, top1: bool, squares: bool, workspace_bytes: int, keep_bytes: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logp, lse, entropy, mean logit, top1, sum p^2), each (R,), 0 where not scored and empty where not asked for.

    And, of keep_bytes, as many columns' logits of the scored rows as they hold, for the backward pass.
    """
    with _no_autocast(hidden):
        rows = rows_of(scored)
        states, ids = chosen(blank(hidden, scored), rows).to(dtype), blank(ids, scored)
        inv_temperature = blank(inv_temperature, scored, 1)
        kept = _kept_logits(hidden, weight, dtype, keep_bytes)
        out = score_rows(
            states, weight.to(dtype), chosen(ids, rows), chosen(inv_temperature, rows), bias=bias,
            head=decode_head(head), entropy=entropy, mean=mean, top1=top1, squares=squares,
            workspace_bytes=workspace_bytes, kept=kept_columns(kept, states.shape[0], weight.shape[0]), backend=backend,
        )  # fmt: skip
        logp, lse, *others = (spread(x, rows, hidden) for x in out)
        return logp, lse, others[0], others[1], others[2], others[3], kept


def _kept_logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype, keep_bytes: int) -> Tensor:
    """An uninitialised buffer for the logits to keep, whose size depends on no data."""
    dtype = logit_dtype(hidden.device, dtype)
    most = hidden.shape[0] * row_pitch(weight.shape[0], hidden.device)
    return hidden.new_empty(min(keep_bytes // dtype.itemsize, most), dtype=dtype)


@score.register_fake
def _(
    hidden, weight, bias, ids, scored, inv_temperature, head, dtype, entropy, mean, top1, squares, workspace_bytes, keep_bytes,
    backend,
):  # fmt: skip
    def made(wanted: bool, dtype: torch.dtype = inv_temperature.dtype) -> Tensor:
        return hidden.new_empty(hidden.shape[0], dtype=dtype) if wanted else hidden.new_empty(0)

    kept = _kept_logits(hidden, weight, dtype, keep_bytes)
    return made(True), made(True), made(entropy), made(mean), made(top1, torch.bool), made(squares), kept


def _save_score(ctx, inputs, output):
    (
        hidden,
        weight,
        bias,
        ids,
        scored,
        inv_temperature,
        head,
        dtype,
        has_entropy,
        *_,
        workspace_bytes,
        _keep,
        backend,
    ) = inputs
    ctx.set_materialize_grads(False)
    _logp, lse, entropy, mean, top1, squares, kept = output
    ctx.mark_non_differentiable(lse, mean, top1, squares, kept)
    ctx.save_for_backward(hidden, weight, bias, ids, scored, inv_temperature, lse, entropy, kept)
    ctx.constants = (has_entropy, head, dtype, workspace_bytes, backend)
    ctx.captured = capturing()


def _backward_score(ctx, d_logp, d_lse, d_entropy, *others):
    hidden, weight, bias, ids, scored, inv_temperature, lse, entropy, kept = ctx.saved_tensors
    has_entropy, head, dtype, workspace_bytes, backend = ctx.constants
    d_entropy = d_entropy if has_entropy else None
    if kept.numel() and scored is not None and ctx.captured != capturing():  # the rows whose logits are kept are others
        raise RuntimeError(
            "forward and backward of a step belong on the same side of cuda_graph_warmup(), or of a capture"
        )
    needs = ctx.needs_input_grad[:3]
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if (d_logp is not None or d_entropy is not None) and any(needs):
        coef = torch.zeros_like(lse) if d_logp is None else d_logp
        found = pull_back(
            hidden, weight, bias, ids, scored, inv_temperature, lse, coef, entropy, d_entropy, kept, head, dtype, *needs,
            workspace_bytes, backend,
        )  # fmt: skip
        grads[:3] = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    return tuple(grads)


score.register_autograd(_backward_score, setup_context=_save_score)


@torch.library.custom_op("rlvr_ops::pull_back", mutates_args=())
def pull_back(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scored: Tensor | None, inv_temperature: Tensor,
    lse: Tensor, coef: Tensor, entropy: Tensor, entropy_coef: Tensor | None, kept: Tensor, head: str, dtype: torch.dtype,
    need_hidden: bool, need_weight: bool, need_bias: bool, workspace_bytes: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_hidden (R, H), d_weight (V, H), d_bias (V,), empty where not needed.

    Rows with coefficient 0 reach a matmul in a capture only.
    """
    with _no_autocast(hidden):
        alive = coef != 0 if entropy_coef is None else (coef != 0) | (entropy_coef != 0)
        rows = rows_of(alive if scored is None else alive & scored)
        needs = Needs(need_hidden, need_weight, need_bias)
        found = pull_back_rows(
            chosen(blank(hidden, scored), rows).to(dtype), weight.to(dtype), chosen(blank(ids, scored), rows),
            chosen(blank(inv_temperature, scored, 1), rows), chosen(lse, rows), chosen(coef, rows).contiguous(),
            entropy=None if entropy_coef is None else chosen(entropy, rows),
            entropy_coef=None if entropy_coef is None else chosen(entropy_coef, rows).contiguous(), bias=bias,
            head=decode_head(head), needs=needs, weight_dtype=weight.dtype, workspace_bytes=workspace_bytes,
            kept=_kept_rows(kept, scored, rows, hidden.shape[0], weight.shape[0]), backend=backend,
        )  # fmt: skip
        d_hidden = None if found.hidden is None else found.hidden.to(hidden.dtype)
        d_bias = None if found.bias is None or bias is None else found.bias.to(bias.dtype)
        return spread(d_hidden, rows, hidden), _or_empty(found.weight, hidden), _or_empty(d_bias, hidden)


def _kept_rows(kept: Tensor, scored: Tensor | None, rows: Tensor | None, total: int, vocabulary: int) -> Kept | None:
    """The kept logits of the rows (n,) among `total` that are pulled back, None meaning all."""
    if not kept.numel():
        return None
    scored_rows = rows_of(scored)
    if scored_rows is None:
        return Kept(kept_columns(kept, total, vocabulary), rows)
    assert rows is not None  # not all are scored, so not all are pulled back
    return Kept(kept_columns(kept, scored_rows.shape[0], vocabulary), torch.searchsorted(scored_rows, rows))


def _or_empty(values: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if values is None else values


@pull_back.register_fake
def _(
    hidden, weight, bias, ids, scored, inv_temperature, lse, coef, entropy, entropy_coef, kept, head, dtype,
    need_hidden, need_weight, need_bias, workspace_bytes, backend,
):  # fmt: skip
    return _fake_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, *needs: bool) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden, weight, bias)
    made = (
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0)
        for x, need in zip(shapes, needs, strict=True)
    )
    return tuple(made)  # type: ignore[return-value]


@torch.library.custom_op("rlvr_ops::weigh", mutates_args=())
def weigh(
    logp: Tensor, old: Tensor | None, ref: Tensor | None, advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor,
    rollout_weight: Tensor, behaviour: Tensor | None, spec: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(losses (R,), coef (R,), statistics (B, 9)); see `rlvr_kernels.weigh`."""
    return tuple(
        weigh_rows(
            logp.contiguous(), old, ref, advantages, mask, cu_seqlens, rollout_weight, decode_policy(spec), backend,
            behaviour=behaviour,
        )
    )  # type: ignore[return-value]  # fmt: skip


@weigh.register_fake
def _(logp, old, ref, advantages, mask, cu_seqlens, rollout_weight, behaviour, spec, backend):
    return (
        logp.new_empty(logp.shape),
        logp.new_empty(logp.shape),
        logp.new_empty(rollout_weight.shape[0], len(STATISTICS)),
    )


def _refuse_a_second_derivative() -> None:
    """Raise under create_graph=True: these gradients are constants, and a derivative of theirs would be wrong in silence."""
    if torch.is_grad_enabled():
        raise RuntimeError("the losses can be differentiated once: create_graph=True is not supported")


def _save_weigh(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[1])


def _backward_weigh(ctx, d_losses, d_coef, d_statistics):
    _refuse_a_second_derivative()
    (coef,) = ctx.saved_tensors
    return (None if d_losses is None else d_losses * coef, *[None] * 9)


weigh.register_autograd(_backward_weigh, setup_context=_save_weigh)


@torch.library.custom_op("rlvr_ops::single_pass", mutates_args=())
def single_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scored: Tensor | None, inv_temperature: Tensor,
    old: Tensor | None, ref: Tensor | None, behaviour: Tensor | None, advantages: Tensor, cu_seqlens: Tensor,
    rollout_weight: Tensor, spec: str, head: str, dtype: torch.dtype, need_hidden: bool, need_weight: bool, need_bias: bool,
    with_entropy: bool, entropy_coef: float, workspace_bytes: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, logp (R,), entropy (R,), statistics (B, 9), rows pulled back, d_hidden, d_weight, d_bias)."""
    return run_single_pass(
        hidden, weight, bias, ids, scored, inv_temperature, old, ref, behaviour, advantages, cu_seqlens, rollout_weight, spec,
        head, dtype, need_hidden, need_weight, need_bias, with_entropy, entropy_coef, workspace_bytes, backend, weigh_rows,
    )  # fmt: skip


def run_single_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scored: Tensor | None, inv_temperature: Tensor,
    old: Tensor | None, ref: Tensor | None, behaviour: Tensor | None, advantages: Tensor, cu_seqlens: Tensor,
    rollout_weight: Tensor, spec: str, head: str, dtype: torch.dtype, need_hidden: bool, need_weight: bool, need_bias: bool,
    with_entropy: bool, entropy_coef: float, workspace_bytes: int, backend: str, weigher: Weigher,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the op computes, with any weigher."""
    policy = decode_policy(spec)
    with _no_autocast(hidden):
        index = rows_of(scored)
        hidden = blank(hidden, scored)
        rows = compact(index, scored, ids, inv_temperature, old, ref, behaviour, advantages, cu_seqlens, rollout_weight)
        done = single_pass_rows(
            hidden, weight.to(dtype), rows, policy, bias=bias, head=decode_head(head),
            needs=Needs(need_hidden, need_weight, need_bias), weight_dtype=weight.dtype, with_entropy=with_entropy,
            entropy_coef=entropy_coef, workspace_bytes=workspace_bytes, backend=backend, weigher=weigher,
        )  # fmt: skip
        weighed = weigher(
            done.logp, rows.old, rows.ref, rows.advantages, rows.mask, rows.cu_seqlens, rollout_weight, policy, backend,
            behaviour=rows.behaviour,
        )  # fmt: skip
        if done.coef is not None and not torch.allclose(
            done.coef, weighed.coef, rtol=1e-3, atol=1e-3 * _largest(weighed.coef)
        ):
            raise ValueError(
                "surrogate must depend on nothing outside of a token's rollout for a single pass, which calls it for some rollouts "
                "at a time: here the derivative of some differs from that of all together; use schedule='two_pass'"
            )
        loss = weighed.losses.sum()
        if entropy_coef and done.entropy is not None:
            rollout = torch.repeat_interleave(rows.cu_seqlens.diff(), output_size=done.entropy.shape[0])
            loss = loss - entropy_coef * (done.entropy * blank(rollout_weight[rollout], scored)).sum()
        logp, entropy = spread(done.logp, index, hidden), spread(done.entropy, index, hidden)
        d_hidden, d_weight, d_bias = done.gradients
        d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
        has_gradient = weighed.coef != 0 if not entropy_coef else blank(torch.ones_like(weighed.coef), scored) != 0
        pulled_back = has_gradient.sum().to(logp.dtype)
        gradients = _or_empty(d_hidden, hidden), _or_empty(d_weight, hidden), _or_empty(d_bias, hidden)
        return loss, logp, entropy, weighed.statistics, pulled_back, *gradients


def _largest(values: Tensor) -> float:
    """The largest absolute value; a host sync."""
    return float(values.abs().amax()) if values.numel() else 0.0


@single_pass.register_fake
def _(
    hidden, weight, bias, ids, scored, inv_temperature, old, ref, behaviour, advantages, cu_seqlens, rollout_weight, spec, head,
    dtype, need_hidden, need_weight, need_bias, with_entropy, entropy_coef, workspace_bytes, backend,
):  # fmt: skip
    row = inv_temperature.new_empty(hidden.shape[0])
    statistics = row.new_empty(rollout_weight.shape[0], len(STATISTICS))
    entropy = torch.empty_like(row) if with_entropy else hidden.new_empty(0)
    gradients = _fake_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)
    return row.new_empty(()), row, entropy, statistics, row.new_empty(()), *gradients


def save_single_pass(ctx, inputs, output):
    """Keep the gradients that the forward pass made."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[5:])
    ctx.backend = inputs[21]


def backward_single_pass(ctx, d_loss, *others):
    """Those gradients times the upstream one, and None for what is constant."""
    _refuse_a_second_derivative()
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if d_loss is not None:
        scaled = [_scaled(grad, d_loss, ctx.backend) for grad in ctx.saved_tensors]
        grads[:3] = [grad if need else None for grad, need in zip(scaled, ctx.needs_input_grad[:3], strict=True)]
    return tuple(grads)


def _scaled(grad: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """grad * upstream, on the device; in place if the graph goes away after this backward, so that no second d_weight exists."""
    factor = upstream.reshape(1)  # 0-d, it would be rounded to grad's dtype: a loss scale of 65536 is inf in float16
    tracing = torch.compiler.is_compiling() or type(grad) is not Tensor
    if tracing or torch._C._autograd._get_current_graph_task_keep_graph():
        return (grad * factor).to(grad.dtype)
    return scale_(grad, factor, backend)


single_pass.register_autograd(backward_single_pass, setup_context=save_single_pass)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the matmuls: autocast's where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and accumulator_dtype(hidden.dtype) is not torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)
