"""Rows of logits and objectives that the kernels' tests share."""

import pytest
import torch
from rlvr_kernels.objective import KL, Ace, TokenObjective
from rlvr_kernels.surrogates import Cispo, CispoTwoSided, Clip, Dispo, Dppo, Gmpo, Ipo, Reinforce, Sapo, Vespo

ROWS, COLS = 5, 203
HEADS = [{}, {"logit_scale": 0.5, "softcap": 4.0}]
KERNELS = [pytest.param(name, marks=pytest.mark.interpret) for name in ("pointers", "descriptors")]
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpret)]


def make_rows(seed=0, cols=COLS, dtype=torch.float32, spread=3.0):
    """Raw logits (in `dtype`), ids, inverse temperatures and a bias with a token that cannot be."""
    g = torch.Generator().manual_seed(seed)
    raw = (spread * torch.randn(ROWS, cols, generator=g)).to(dtype)
    ids = torch.tensor([0, cols - 1, 7, 100, 3])
    bias = torch.randn(cols, generator=g)
    bias[5] = -float("inf")
    return raw, ids, 1 / torch.linspace(0.5, 2.0, ROWS), bias


def truth(raw, logit_map):
    """The logits in float64, written out."""
    bias = 0 if logit_map.bias is None else logit_map.bias.double()
    u = logit_map.logit_scale * (raw.double() + bias)
    s = u if logit_map.softcap is None else logit_map.softcap * torch.tanh(u / logit_map.softcap)
    return s * logit_map.inv_temperature.double()[:, None]


def policy_rows(seed=1, rows=ROWS):
    """(logp, old, ref, advantages), each (rows,)."""
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(rows, generator=g)
    old, ref = (logp + 0.5 * torch.randn(rows, generator=g) for _ in range(2))
    return logp, old, ref, torch.randn(rows, generator=g)


def objective(surrogate, level="token", *, ace=None, kl=None, threshold=None):
    return TokenObjective(surrogate, ace or Ace(0.0), kl or KL(), level, threshold)


CLIPS = [
    objective(Clip(delta=delta), ace=ace, kl=KL(estimator, beta))
    for ace in (
        Ace(0.0),
        Ace(1.0),
        Ace(0.7, confidence="old", reduction="sum", shape="relu"),
    )
    for beta, estimator, delta in [(0.0, "k3", None), (0.1, "k3", 1.4), (0.1, "k2", None), (0.1, "k1", None)]
]
LEVELS = ("token", "sequence", "sequence_token")
OTHERS = [
    *(objective(Clip(0.1, 0.05), level, kl=KL("k3", 0.1, bias_correction=True)) for level in LEVELS),
    *(objective(Sapo(), level, ace=Ace(0.7)) for level in LEVELS),
    *(objective(surrogate, level) for surrogate in (Cispo(), CispoTwoSided(), Dispo()) for level in LEVELS[:2]),
    *(objective(surrogate, ace=Ace(1.0), kl=KL("k3", 0.05)) for surrogate in (Gmpo(), Vespo(), Reinforce())),
    *(objective(Dppo(divergence, 0.01), ace=Ace(1.0), kl=KL("k3", 0.05)) for divergence in ("tv", "kl")),
    objective(Ipo(0.01), ace=Ace(1.0), kl=KL("k2", 0.05, against="old")),
    *(objective(Clip(), kl=KL(name, 0.1, corrected, "old")) for name, corrected in (("k1", False), ("k3", True))),
    objective(Clip(), threshold=0.01, kl=KL("k1", 0.1, bias_correction=True)),
    objective(Gmpo(0.2, 0.1), threshold=0.01, kl=KL("k2", 0.1, bias_correction=True)),
]
OBJECTIVES = CLIPS + OTHERS
