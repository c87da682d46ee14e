"""Every kernel of the library in every variant worth compiling: a name, and a call that launches it on meta tensors.

To add a kernel, add a call. compile_table.py runs these. The shapes are a language model's; what matters to the
compiler is their divisibility and the dtypes.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from rlvr_kernels.dlogits import dlogits
from rlvr_kernels.fused_policy import PolicyRows, fused_policy
from rlvr_kernels.linear_lse import linear_lse
from rlvr_kernels.logits import Head
from rlvr_kernels.lse_fold import RowState, lse_fold
from rlvr_kernels.scale import scale_
from rlvr_kernels.spec import PPO_CLIP, PolicySpec, Surrogate
from rlvr_kernels.weigh import weigh

N, H, V, B, TILE = 8192, 4096, 151936, 64, 32768
ACE = PolicySpec(Surrogate("clip", (0.0, 1.2), (0.8, 4.0)), alpha=1.0, beta=0.001)
GRPO = PolicySpec(PPO_CLIP)
GSPO = PolicySpec(PPO_CLIP, "sequence", off_policy_mask_threshold=0.5, use_bias_correction_kl=True, beta=0.001)
GMPO = PolicySpec(Surrogate("gmpo", (-math.inf, 0.4), (-0.4, math.inf)), alpha=1.0)
VESPO = PolicySpec(Surrogate("vespo", (2.0, 3.0), (3.0, 2.0)))
SAPO = PolicySpec(Surrogate("sapo", (1.0, 0.0), (1.05, 0.0)))
CISPO = PolicySpec(Surrogate("weight", (0.0, 5.0), (0.0, 5.0)))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _ids() -> torch.Tensor:
    return meta(N, dtype=torch.int64)


def _lse_fold(dtype: torch.dtype, *, full: bool) -> Any:
    state = RowState.empty(N, meta(1), entropy=full, mean=full, squares=full)
    options: dict[str, Any] = {"bias": meta(TILE, dtype=dtype), "head": Head(softcap=30.0)} if full else {}
    return lse_fold(meta(N, TILE, dtype=dtype), _ids(), 0, state, meta(N), **options)


def _over(tile: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
    """The gradient in the memory of the logits, as `tile.Tile` has it."""
    return None if dtype is None else tile.view(dtype)[:, : tile.shape[1]]


def _dlogits(dtype: torch.dtype, *, full: bool, over: torch.dtype | None = None) -> Any:
    tile = meta(N, TILE, dtype=dtype)
    options: dict[str, Any] = {"out": _over(tile, over)}
    if full:
        options |= {
            "bias": meta(TILE, dtype=dtype),
            "head": Head(softcap=30.0),
            "entropy": meta(N),
            "entropy_coef": meta(N),
        }
    return dlogits(tile, _ids(), 0, meta(N), meta(N), meta(N), **options)


def _weigh(spec: PolicySpec, *, full: bool) -> Any:
    old, ref, mask = (meta(N), meta(N), meta(N, dtype=torch.bool)) if full else (None, None, None)
    return weigh(meta(N), old, ref, meta(N), mask, meta(B + 1, dtype=torch.int64), meta(B), spec)


def _fused_policy(
    dtype: torch.dtype, spec: PolicySpec, *, full: bool, deferred: bool = False, over: torch.dtype | None = None
) -> Any:
    tile = meta(N, V, dtype=dtype)
    rows = PolicyRows(meta(N), meta(N), *((meta(N), meta(N), meta(N)) if full else ()))
    options: dict[str, Any] = {"bias": meta(V, dtype=dtype), "head": Head(softcap=30.0)} if full else {}
    return fused_policy(tile, _ids(), rows, meta(N), spec, deferred=deferred, out=_over(tile, over), **options)


def _linear_lse(hidden: torch.dtype, weight: torch.dtype, *, h: int = H, **options: Any) -> Any:
    return linear_lse(meta(N, h, dtype=hidden), meta(V, h, dtype=weight), _ids(), **options)


_bf16, _fp32 = torch.bfloat16, torch.float32

LAUNCHES: dict[str, Callable[[], Any]] = {
    "lse_fold fp32": lambda: _lse_fold(_fp32, full=False),
    "lse_fold bf16, bias, softcap, all sums": lambda: _lse_fold(_bf16, full=True),
    "dlogits fp32": lambda: _dlogits(_fp32, full=False),
    "dlogits bf16, bias, softcap, entropy": lambda: _dlogits(_bf16, full=True),
    "dlogits fp32, bf16 over it": lambda: _dlogits(_fp32, full=False, over=_bf16),
    "weigh GRPO on policy": lambda: _weigh(GRPO, full=False),
    "weigh ACE, KL, mask": lambda: _weigh(ACE, full=True),
    "weigh GSPO, drops, KL": lambda: _weigh(GSPO, full=True),
    "weigh GMPO": lambda: _weigh(GMPO, full=True),
    "weigh VESPO": lambda: _weigh(VESPO, full=True),
    "weigh SAPO": lambda: _weigh(SAPO, full=True),
    "fused_policy fp32 GRPO on policy": lambda: _fused_policy(_fp32, GRPO, full=False),
    "fused_policy fp32 deferred": lambda: _fused_policy(_fp32, GRPO, full=False, deferred=True),
    "fused_policy fp32 deferred, bf16 over it": lambda: _fused_policy(
        _fp32, GRPO, full=False, deferred=True, over=_bf16
    ),
    "fused_policy bf16 ACE, KL, bias, softcap": lambda: _fused_policy(_bf16, ACE, full=True),
    "fused_policy fp32 CISPO": lambda: _fused_policy(_fp32, CISPO, full=True),
    "fused_policy fp32 SAPO": lambda: _fused_policy(_fp32, SAPO, full=True),
    "scale_ bf16": lambda: scale_(meta(V, H, dtype=_bf16), meta(1)),
    "linear_lse bf16": lambda: _linear_lse(_bf16, _bf16),
    "linear_lse bf16, bias": lambda: _linear_lse(_bf16, _bf16, bias=meta(V)),
    "linear_lse bf16, softcap": lambda: _linear_lse(_bf16, _bf16, softcap=30.0),
    "linear_lse bf16, bias, softcap": lambda: _linear_lse(_bf16, _bf16, bias=meta(V), softcap=30.0),
    "linear_lse bf16, odd H": lambda: _linear_lse(_bf16, _bf16, h=H + 1),
    "linear_lse bf16 by fp32": lambda: _linear_lse(_bf16, _fp32, bias=meta(V), softcap=30.0),
    "linear_lse bf16 by fp32, odd H": lambda: _linear_lse(_bf16, _fp32, h=H + 1),
    "linear_lse fp32": lambda: _linear_lse(_fp32, _fp32, bias=meta(V), softcap=30.0),
    "linear_lse fp32, odd H": lambda: _linear_lse(_fp32, _fp32, h=H + 1),
}
