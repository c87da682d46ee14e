"""dlogits: overwrite a tile of logits, or of exponentials that linear_exp has left as they are, with the gradient of the loss.

    dL/dz_j = coef (1[j = y] - p_j) - entropy_coef p_j (log p_j + H),    p = exp(z - lse),

then the chain rule through temperature, softcap and scale, down to the matmul's output. One program per row.
Traffic: n * c logits read, n * c gradients written. FLOPs: about 4 n c, so memory-bound.
"""

import torch

from rlvr_kernels._triton import dense, device_guard, jit, tl
from rlvr_kernels.backend import use_triton
from rlvr_kernels.logits import LogitMap, chain, load_logits, row_blocks, subtract_at

BLOCK = 4096
NUM_WARPS = 8


def dlogits(
    tile: torch.Tensor,
    ids: torch.Tensor,
    first_col: int,
    lse: torch.Tensor,
    coef: torch.Tensor,
    logit_map: LogitMap,
    *,
    entropy: torch.Tensor | None = None,
    entropy_coef: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Write dL/d(h W^T) of a tile (n, c) to `out`, by default over the tile itself, and return it.

    lse, coef = dL/dlogp, entropy = H and entropy_coef = dL/dH are (n,) in float32. logit_map covers the tile. With an
    anchor (n,) the tile holds exp(z - anchor).
    """
    out = tile if out is None else out
    if use_triton(tile, backend):
        _dlogits_triton(tile, ids, first_col, lse, coef, logit_map, entropy, entropy_coef, anchor, out)
        return out
    for rows in row_blocks(*tile.shape):
        by_entropy = None if entropy is None or entropy_coef is None else (entropy[rows], entropy_coef[rows])
        _write_block(
            tile[rows], out[rows], ids[rows] - first_col, lse[rows], coef[rows], by_entropy, logit_map[rows, :],
            None if anchor is None else anchor[rows],
        )  # fmt: skip
    return out


def _write_block(
    raw: torch.Tensor, out: torch.Tensor, local_ids: torch.Tensor, lse: torch.Tensor, coef: torch.Tensor,
    by_entropy: tuple[torch.Tensor, torch.Tensor] | None, logit_map: LogitMap, anchor: torch.Tensor | None,
) -> None:  # fmt: skip
    """Write dL/d(h W^T) of raw h W^T (r, c) to `out`, which may be `raw` itself. by_entropy is (H, dL/dH) of the rows."""
    in_place = out.data_ptr() == raw.data_ptr() and out.dtype == raw.dtype and logit_map.softcap is None
    z = logit_map.logits(raw, overwrite=in_place) if anchor is None else _logits_of(raw, anchor, logit_map)
    # A softcap's derivative reads the logits, so they stay. Without one the gradient takes their memory.
    spent = in_place or (z is not raw and logit_map.softcap is None)
    gradient = softmax_gradient(torch.sub(z, lse[:, None], out=z if spent else None), local_ids, coef, by_entropy)
    logit_map.chain_(gradient, z)
    if gradient.data_ptr() != out.data_ptr():
        out.copy_(gradient)


def _logits_of(exponentials: torch.Tensor, anchor: torch.Tensor, logit_map: LogitMap) -> torch.Tensor:
    """The logits (r, c) of exp(z - anchor)."""
    z = exponentials.to(anchor.dtype).log().add_(anchor[:, None])
    if logit_map.softcap is not None:  # log 0 = -inf, which no softcapped logit is
        torch.maximum(z, (-logit_map.softcap * logit_map.inv_temperature)[:, None], out=z)
    return z


def is_overlaid(tile: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether `out` is a narrower view of the tile's memory, each of its rows over its own logits."""
    return out.data_ptr() == tile.data_ptr() and out.dtype != tile.dtype


def softmax_gradient(
    logp: torch.Tensor,
    local_ids: torch.Tensor,
    coef: torch.Tensor,
    by_entropy: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """dL/dz (r, c) from log p (r, c), which is overwritten."""
    if by_entropy is not None:
        entropy, entropy_coef = by_entropy
        # The clamp makes 0 * -inf 0.
        surprise = logp.clamp(min=-1e30).add_(entropy[:, None]).mul_(entropy_coef[:, None])
        gradient = logp.exp_().mul_(surprise.add_(coef[:, None]).neg_())
    else:
        gradient = logp.exp_().mul_(-coef[:, None])
    subtract_at(gradient, local_ids, -coef)
    return gradient


def _dlogits_triton(
    tile: torch.Tensor, ids: torch.Tensor, first_col: int, lse: torch.Tensor, coef: torch.Tensor, logit_map: LogitMap,
    entropy: torch.Tensor | None, entropy_coef: torch.Tensor | None, anchor: torch.Tensor | None, out: torch.Tensor,
) -> None:  # fmt: skip
    rows, cols = tile.shape
    if not rows:
        return
    ids, lse, coef, entropy, entropy_coef, anchor = dense(ids, lse, coef, entropy, entropy_coef, anchor)  # type: ignore[assignment]
    with device_guard(tile):
        dlogits_kernel[(rows,)](
            tile_ptr=tile, out_ptr=out, ids_ptr=ids, lse_ptr=lse, coef_ptr=coef, entropy_ptr=entropy,
            entropy_coef_ptr=entropy_coef, anchor_ptr=anchor, n_cols=cols, first_col=first_col, row_stride=tile.stride(0),
            out_stride=out.stride(0), ENTROPY=entropy_coef is not None, ANCHORED=anchor is not None,
            OVERLAID=is_overlaid(tile, out), BLOCK=BLOCK, num_warps=NUM_WARPS, **logit_map.kernel_arguments(),
        )  # fmt: skip


@jit
def dlogits_kernel(
    tile_ptr, out_ptr, bias_ptr, ids_ptr, lse_ptr, coef_ptr, inv_temperature_ptr, entropy_ptr, entropy_coef_ptr,
    anchor_ptr, n_cols, first_col, row_stride, out_stride, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ANCHORED: tl.constexpr,
    OVERLAID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes one row of the gradient."""
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    local_id = tl.load(ids_ptr + row) - first_col
    lse = tl.load(lse_ptr + row)
    coef = tl.load(coef_ptr + row)
    entropy = 0.0
    entropy_coef = 0.0
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        entropy_coef = tl.load(entropy_coef_ptr + row)
    anchor = 0.0
    if ANCHORED:
        anchor = tl.load(anchor_ptr + row)
    row_ptr = tile_ptr + row * row_stride
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < n_cols
        if ANCHORED:
            z = tl.log(tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32)) + anchor
            if HAS_SOFTCAP:  # log 0 = -inf, which no softcapped logit is
                z = tl.maximum(z, -softcap * inv_temperature)
        else:
            z = load_logits(
                row_ptr, bias_ptr, cols, inside, logit_scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP
            )
        p = tl.exp(z - lse)
        gradient = tl.where(cols == local_id, coef, 0.0) - coef * p
        if ENTROPY:
            gradient -= tl.where(p > 0, entropy_coef * p * (z - lse + entropy), 0.0)
        gradient = chain(gradient, z, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
        if OVERLAID:
            tl.debug_barrier()  # a narrower row overlays its own logits: all threads read this block before any writes
        tl.store(out_ptr + row * out_stride + cols, gradient.to(out_ptr.dtype.element_ty), mask=inside)
