"""The published surrogates by name, and their records: what a loss's `surrogate=` takes.

A name means its record's defaults. Write `surrogate=Sapo(tau_negative=1.1)` for other numbers.
"""

from rlvr_kernels.surrogates import (
    Bounds,
    Cispo,
    CispoTwoSided,
    Clip,
    Dispo,
    Dppo,
    Gmpo,
    Reinforce,
    Sapo,
    Surrogate,
    Vespo,
)

SURROGATES: dict[str, type[Surrogate]] = {
    "ppo_clip": Clip,
    "cispo": Cispo,
    "cispo_two_sided": CispoTwoSided,
    "dispo": Dispo,
    "dppo": Dppo,
    "sapo": Sapo,
    "gmpo": Gmpo,
    "vespo": Vespo,
    "reinforce": Reinforce,
}
ppo_clip, cispo, cispo_two_sided, dispo, dppo, sapo, gmpo, vespo, reinforce = SURROGATES.values()

__all__ = [
    "SURROGATES",
    "Bounds",
    "Cispo",
    "CispoTwoSided",
    "Clip",
    "Dispo",
    "Dppo",
    "Gmpo",
    "Reinforce",
    "Sapo",
    "Surrogate",
    "Vespo",
    *SURROGATES,
]
