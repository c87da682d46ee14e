"""The surrogates: from a log ratio x and an advantage A to a token's loss and its slope. One form per file.

Each is a frozen record of numbers. `loss` is the published formula, differentiable; the reference uses it. `terms` is the
PyTorch twin: the same loss, with its slope written out. The Triton branch stands beside it.

    form     loss, with r = exp(x)                 slope by
    clip     -A clip(r, a, b)                      x           PPO, GRPO, DAPO; GSPO at the level of rollouts
    sapo     -A (4 / a) sigmoid(a (r - 1))         x
    gmpo     -A r                                  x
    weight   -A sg[clip(r, a, b)] logp             logp        CISPO, DISPO, REINFORCE
    dppo     -A sg[M min(r, b)] logp               logp        M = 0 outside of a trust region of a; IPO
    vespo    -A sg[r^a exp(b (1 - r))] logp        logp

x is the log ratio of the token or of its rollout. (a, b) is one pair of numbers for A > 0 and another for the rest.
"""

from rlvr_kernels._triton import jit, tl
from rlvr_kernels.surrogates.base import Bounds, Surrogate, SurrogateTerms
from rlvr_kernels.surrogates.clip import Clip, clip_kernel
from rlvr_kernels.surrogates.dppo import Dppo, Ipo, dppo_kernel
from rlvr_kernels.surrogates.gmpo import Gmpo, gmpo_kernel
from rlvr_kernels.surrogates.sapo import Sapo, sapo_kernel
from rlvr_kernels.surrogates.vespo import Vespo, vespo_kernel
from rlvr_kernels.surrogates.weight import Cispo, CispoTwoSided, Dispo, Reinforce, weight_kernel

__all__ = [
    "Bounds",
    "Cispo",
    "CispoTwoSided",
    "Clip",
    "Dispo",
    "Dppo",
    "Gmpo",
    "Ipo",
    "Reinforce",
    "Sapo",
    "Surrogate",
    "SurrogateTerms",
    "Vespo",
    "surrogate_kernel",
]


@jit
def surrogate_kernel(x, logp, advantage, a, b, FORM: tl.constexpr):
    """(loss, slope, below, above) of a block of tokens; a and b are chosen by the sign of each advantage."""
    x = tl.where(advantage == 0, 0.0, x)  # 0 * inf would be NaN
    if FORM == "clip":
        return clip_kernel(x, logp, advantage, a, b)
    elif FORM == "weight":
        return weight_kernel(x, logp, advantage, a, b)
    elif FORM == "dppo_tv":
        return dppo_kernel(x, logp, advantage, a, b, False, False)
    elif FORM == "dppo_kl":
        return dppo_kernel(x, logp, advantage, a, b, True, False)
    elif FORM == "ipo_tv":
        return dppo_kernel(x, logp, advantage, a, b, False, True)
    elif FORM == "sapo":
        return sapo_kernel(x, logp, advantage, a, b)
    elif FORM == "gmpo":
        return gmpo_kernel(x, logp, advantage, a, b)
    else:
        tl.static_assert(FORM == "vespo", "surrogate_kernel has no branch for this form")
        return vespo_kernel(x, logp, advantage, a, b)
