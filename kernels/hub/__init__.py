"""What Hugging Face `kernels` loads: the operations of rlvr_kernels and the records that they take."""

from .backend import explain_backend
from .linear_lse import linear_lse
from .logits import LogitMap
from .objective import KL, Ace, Entropy, TokenObjective
from .pull_back import Needs, pull_back
from .score import score
from .single_pass import single_pass
from .surrogates import Cispo, CispoTwoSided, Clip, Dispo, Dppo, Gmpo, Ipo, Reinforce, Sapo, Vespo
from .weigh import Rows, weigh

__all__ = [
    "KL",
    "Ace",
    "Cispo",
    "CispoTwoSided",
    "Clip",
    "Dispo",
    "Dppo",
    "Entropy",
    "Gmpo",
    "Ipo",
    "LogitMap",
    "Needs",
    "Reinforce",
    "Rows",
    "Sapo",
    "TokenObjective",
    "Vespo",
    "explain_backend",
    "linear_lse",
    "pull_back",
    "score",
    "single_pass",
    "weigh",
]
