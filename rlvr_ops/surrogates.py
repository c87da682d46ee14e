"""The published surrogates by name, and their records: what a loss's `surrogate=` takes.

A name means its record's defaults. Write `surrogate=Sapo(tau_negative=1.1)` for other numbers. The records of `FUNCTIONS` are
functions of (per_token_logps, rows), like a user's own: they need more of a batch than a token and its rollout's ratio. `Real`
has no name, since it must be told the size of a group.
"""

from rlvr_kernels.surrogates import (
    Bounds,
    Cispo,
    CispoTwoSided,
    Clip,
    Dispo,
    Dppo,
    Gmpo,
    Ipo,
    Reinforce,
    Sapo,
    Surrogate,
    Vespo,
)

from rlvr_ops.objectives.covariance import ClipCov, KLCov
from rlvr_ops.objectives.fipo import Fipo
from rlvr_ops.objectives.real import Real

FORMS: dict[str, type[Surrogate]] = {
    "ppo_clip": Clip,
    "cispo": Cispo,
    "cispo_two_sided": CispoTwoSided,
    "dispo": Dispo,
    "dppo": Dppo,
    "ipo": Ipo,
    "sapo": Sapo,
    "gmpo": Gmpo,
    "vespo": Vespo,
    "reinforce": Reinforce,
}
FUNCTIONS: dict[str, type[ClipCov | KLCov | Fipo]] = {"clip_cov": ClipCov, "kl_cov": KLCov, "fipo": Fipo}
SURROGATES = {**FORMS, **FUNCTIONS}
ppo_clip, cispo, cispo_two_sided, dispo, dppo, ipo, sapo, gmpo, vespo, reinforce = FORMS.values()
clip_cov, kl_cov, fipo = FUNCTIONS.values()

__all__ = [
    "FORMS",
    "FUNCTIONS",
    "SURROGATES",
    "Bounds",
    "Cispo",
    "CispoTwoSided",
    "Clip",
    "ClipCov",
    "Dispo",
    "Dppo",
    "Fipo",
    "Gmpo",
    "Ipo",
    "KLCov",
    "Real",
    "Reinforce",
    "Sapo",
    "Surrogate",
    "Vespo",
    *SURROGATES,
]
