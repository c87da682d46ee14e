"""What TRL, verl and the papers call things that have another name here, for error messages. A wrong hint is worse than none."""

import difflib
import inspect
from collections.abc import Iterable

AGGREGATION = {
    "cispo": "dapo",
    "cispo_two_sided": "dapo",
    "dispo": "dapo",
    "vespo": "dapo",
    "sapo": "grpo",
    "gmpo": "grpo",
    "reinforce": "grpo",
}
"""The loss_type that goes with each surrogate in its paper or in TRL."""

_GSPO = (
    "GSPO is gspo_loss, or importance_sampling_level='sequence' (verl's form: 'sequence_token') with epsilon_low=3e-4 and "
    "epsilon_high=4e-4"
)
_PPO = "that is surrogate='ppo_clip'"
_GMPO = "that is surrogate='gmpo'"
_REINFORCE = "that is surrogate='reinforce'"
ELSEWHERE = {
    "gspo": _GSPO,
    "gspo_token": _GSPO,
    "ppo": _PPO,
    "vanilla": _PPO,
    "clip": _PPO,
    "dual_clip": "dual clip with the constant c is surrogate='ppo_clip' with delta=c",
    "geo_mean": _GMPO,
    "gpg": _REINFORCE,
    "dro": "DRO is surrogate='reinforce' with kl_estimator='k2', kl_against='old' and its weight as beta",
    "bypass_mode": "bypass mode is any surrogate with the sampling engine's log-probabilities as old_per_token_logps",
    "fipo": "FIPO is surrogate='fipo' with loss_type='dapo'",
    "real": "REAL is surrogate=Real(group_size=...) with loss_type='grpo'",
    "token-sum": "verl's token-sum is loss_type='dapo' with num_items_in_batch=1",
}


def unknown_surrogate(given: str, known: Iterable[str], loss_types: Iterable[str]) -> str:
    """The error message for an unknown surrogate."""
    if given in loss_types:
        hint = f": {given} is a loss_type, with surrogate 'ppo_clip'"
        hint += " and importance_sampling_level='sequence' (luspo_loss)" if given == "luspo" else ""
    else:
        hint = _hint(given, known)
    return f"surrogate must be one of {', '.join(map(repr, known))}, or a function itself, got {given!r}{hint}"


def unknown_loss_type(given: object, known: Iterable[str]) -> str:
    """The error message for an unknown loss_type."""
    if isinstance(given, str) and given in AGGREGATION:
        call = "" if given == "cispo_two_sided" else f"call {given}_loss, or "
        return (
            f"loss_type says how tokens are averaged, and {given!r} is a surrogate: {call}pass surrogate={given!r} with "
            f"loss_type={AGGREGATION[str(given)]!r}"
        )
    return f"loss_type must be one of {', '.join(map(repr, known))}, got {given!r}{_hint(str(given), known)}"


def _hint(given: str, known: Iterable[str]) -> str:
    if given in ELSEWHERE:
        return f": {ELSEWHERE[given]}"
    near = difflib.get_close_matches(given.lower().replace("-", "_"), list(known), n=1, cutoff=0.8)
    return f"; did you mean {near[0]!r}?" if near else ""


def numbers_of(record: type) -> str:
    """Show how to set a surrogate's numbers: `Cispo(ratio_max=5.0)`."""
    defaults = (f"{p.name}={p.default!r}" for p in inspect.signature(record).parameters.values())
    return f"{record.__name__}({', '.join(defaults)})"
