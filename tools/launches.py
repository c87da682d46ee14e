"""Every kernel of the library, in every variant worth compiling: a name and a call that launches it on meta tensors.

compile_table.py runs these; to add a kernel, add a call. The shapes are a language model's; only their divisibility and the
dtypes matter to the compiler.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rlvr_kernels.dlogits import dlogits
from rlvr_kernels.linear_exp import linear_exp, linear_probabilities
from rlvr_kernels.linear_lse import linear_lse, linear_scores
from rlvr_kernels.logits import LogitMap
from rlvr_kernels.lse_fold import RowState, lse_fold
from rlvr_kernels.objective import KL, Ace, TokenObjective
from rlvr_kernels.scale import scale_
from rlvr_kernels.surrogates import Cispo, Clip, Dppo, Gmpo, Ipo, Sapo, Surrogate, Vespo
from rlvr_kernels.weigh import Rows, weigh

N, H, V, B, TILE = 8192, 4096, 151936, 64, 32768


def objective(surrogate: Surrogate, alpha: float = 0.0, kl: KL | None = None, **options: Any) -> TokenObjective:
    """The objective of a surrogate, by default without ACE's weight and a KL penalty."""
    return TokenObjective(surrogate, Ace(alpha), KL() if kl is None else kl, **options)


GRPO = objective(Clip())
OBJECTIVES = {
    "ACE, KL": objective(Clip(0.2, 0.2, delta=4.0), alpha=1.0, kl=KL("k3", 0.001)),
    "GSPO, drops, KL": objective(
        Clip(),
        kl=KL("k3", 0.001, bias_correction=True),
        importance_sampling_level="sequence",
        off_policy_mask_threshold=0.5,
    ),
    "GMPO": objective(Gmpo(), alpha=1.0),
    "VESPO": objective(Vespo()),
    "SAPO": objective(Sapo()),
    "CISPO": objective(Cispo()),
    "DPPO by KL": objective(Dppo("kl")),
    "IPO, KL against old": objective(Ipo(), kl=KL("k2", 0.002, against="old")),
}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _ids() -> torch.Tensor:
    return meta(N, dtype=torch.int64)


def _map(dtype: torch.dtype, *, full: bool) -> LogitMap:
    return LogitMap(meta(N), meta(TILE, dtype=dtype), softcap=30.0) if full else LogitMap(meta(N))


def _lse_fold(dtype: torch.dtype, *, full: bool) -> None:
    state = RowState.empty(N, meta(1), entropy=full, mean=full, squares=full)
    lse_fold(meta(N, TILE, dtype=dtype), _ids(), 0, state, _map(dtype, full=full))


def _dlogits(dtype: torch.dtype, *, full: bool, over: torch.dtype | None = None, anchored: bool = False) -> None:
    """`over`: a gradient of that dtype lies in the memory of the logits, as `tile.Tile` has it."""
    tile = meta(N, TILE, dtype=dtype)
    options: dict[str, Any] = {"out": None if over is None else tile.view(over)[:, :TILE]}
    if full:
        options |= {"entropy": meta(N), "entropy_coef": meta(N)}
    if anchored:
        options["anchor"] = meta(N)
    dlogits(tile, _ids(), 0, meta(N), meta(N), _map(dtype, full=full), **options)


def _weigh(of: TokenObjective, *, full: bool = True) -> None:
    given = {"old": meta(N), "ref": meta(N), "mask": meta(N, dtype=torch.bool)} if full else {}
    weigh(meta(N), Rows(meta(N), meta(B + 1, dtype=torch.int64), meta(B), **given), of)


def _linear_lse(hidden: torch.dtype, weight: torch.dtype, *, h: int = H, **options: Any) -> None:
    linear_lse(meta(N, h, dtype=hidden), meta(V, h, dtype=weight), _ids(), **options)


def _linear_exp(*, h: int = H, bias: bool = False, softcap: float | None = None, **options: Any) -> None:
    logit_map = LogitMap(meta(N), meta(V) if bias else None, softcap=softcap)
    linear_exp(meta(N, h, dtype=_bf16), meta(V, h, dtype=_bf16), _ids(), logit_map, meta(N, V, dtype=_bf16), **options)


def _linear_probabilities(*, bias: bool = False, softcap: float | None = None, raw: bool = False) -> None:
    part, logit_map = meta(TILE, H, dtype=_bf16), LogitMap(meta(N), meta(TILE) if bias else None, softcap=softcap)
    out = meta(N, TILE, dtype=_bf16)
    linear_probabilities(meta(N, H, dtype=_bf16), part, _ids(), TILE, logit_map, out, meta(N), None if raw else meta(N))


_bf16, _fp32 = torch.bfloat16, torch.float32

LAUNCHES: dict[str, Callable[[], Any]] = {
    "lse_fold fp32": lambda: _lse_fold(_fp32, full=False),
    "lse_fold bf16, bias, softcap, all sums": lambda: _lse_fold(_bf16, full=True),
    "dlogits fp32": lambda: _dlogits(_fp32, full=False),
    "dlogits bf16, bias, softcap, entropy": lambda: _dlogits(_bf16, full=True),
    "dlogits fp32, fp16 over it": lambda: _dlogits(_fp32, full=False, over=torch.float16),
    "dlogits of exponentials": lambda: _dlogits(_bf16, full=True, anchored=True),
    "weigh GRPO on policy": lambda: _weigh(GRPO, full=False),
    **{f"weigh {name}": partial(_weigh, one) for name, one in OBJECTIVES.items()},
    "scale_ bf16": lambda: scale_(meta(V, H, dtype=_bf16), meta(1)),
    "linear_lse bf16": lambda: _linear_lse(_bf16, _bf16),
    "linear_lse bf16, bias": lambda: _linear_lse(_bf16, _bf16, bias=meta(V)),
    "linear_lse bf16, softcap": lambda: _linear_lse(_bf16, _bf16, softcap=30.0),
    "linear_lse bf16, bias, softcap": lambda: _linear_lse(_bf16, _bf16, bias=meta(V), softcap=30.0),
    "linear_lse bf16, odd H": lambda: _linear_lse(_bf16, _bf16, h=H + 1),
    "linear_lse bf16 by fp32": lambda: _linear_lse(_bf16, _fp32, bias=meta(V), softcap=30.0),
    "linear_lse bf16 by fp32, odd H": lambda: _linear_lse(_bf16, _fp32, h=H + 1),
    "linear_lse bf16, all sums": lambda: linear_scores(
        meta(N, H, dtype=_bf16),
        meta(V, H, dtype=_bf16),
        _ids(),
        LogitMap(meta(N)),
        entropy=True,
        mean=True,
        top1=True,
        squares=True,
    ),
    "linear_lse fp32": lambda: _linear_lse(_fp32, _fp32, bias=meta(V), softcap=30.0),
    "linear_lse fp32, odd H": lambda: _linear_lse(_fp32, _fp32, h=H + 1),
    "linear_exp bf16": _linear_exp,
    "linear_exp bf16, bias": lambda: _linear_exp(bias=True),
    "linear_exp bf16, softcap": lambda: _linear_exp(softcap=30.0),
    "linear_exp bf16, bias, softcap, entropy": lambda: _linear_exp(bias=True, softcap=30.0, entropy=True),
    "linear_exp bf16, as they are, entropy": lambda: _linear_exp(entropy=True, raw=True),
    "linear_exp bf16, odd H": lambda: _linear_exp(h=H + 1),
    "linear_probabilities bf16": _linear_probabilities,
    "linear_probabilities bf16, bias, softcap": lambda: _linear_probabilities(bias=True, softcap=30.0),
    "linear_probabilities bf16, as they are": lambda: _linear_probabilities(raw=True),
}
