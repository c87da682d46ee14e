"""The published surrogates and their numbers: what `policy_loss(..., surrogate=)` takes, by name or made here.

A name stands for its function's defaults; `surrogate=rlvr_ops.surrogates.sapo(tau_negative=1.1)` for other numbers. rho
is exp(logp - old), or the rollout's geometric mean of it where `importance_sampling_level` says so; sg is a constant to
the gradient. Each loss is minimised.
"""

import math
from collections.abc import Callable

from rlvr_kernels.spec import PPO_CLIP, Surrogate

from rlvr_ops.aggregation import LOSS_TYPES
from rlvr_ops.names import numbers_of, unknown_surrogate

__all__ = [
    "SURROGATES",
    "Surrogate",
    "cispo",
    "cispo_two_sided",
    "dispo",
    "gmpo",
    "ppo_clip",
    "reinforce",
    "resolve",
    "sapo",
    "vespo",
]

Bounds = tuple[float, float]
EPSILON = 0.2


def ppo_clip(epsilon_low: float = EPSILON, epsilon_high: float | None = None, delta: float | None = None) -> Surrogate:
    """-min(min(rho, delta) A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A) (GRPO 2402.03300, DAPO 2503.14476).

    epsilon_high=None means epsilon_low. delta, above 1 + epsilon_high, bounds the ratio of wrong tokens (2505.07291);
    dual clip with the constant c (verl, 3.0) is delta=c.
    """
    high = epsilon_low if epsilon_high is None else epsilon_high
    for name, value in (("epsilon_low", epsilon_low), ("epsilon_high", high), ("delta", delta)):
        if not isinstance(value, int | float) and (name, value) != ("delta", None):
            raise TypeError(f"{name} must be a number, got {value!r}")
    for name, value in (("epsilon_low", epsilon_low), ("epsilon_high", high)):
        _check(name, value)
    if epsilon_low > 1:
        raise ValueError(f"epsilon_low must be <= 1, since a ratio is never negative, got {epsilon_low}")
    if delta is not None and not 1 + high < delta < math.inf:
        raise ValueError(f"delta must be > 1 + epsilon_high = {1 + high:g} or None, got {delta}")
    upper = math.inf if delta is None else float(delta)
    return Surrogate("clip", positive=(0.0, 1.0 + high), negative=(1.0 - epsilon_low, upper))


def cispo(ratio_max: float = 5.0) -> Surrogate:
    """-sg[min(rho, ratio_max)] A logp: CISPO with an upper bound alone (2506.13585), the convention of TRL."""
    _check("ratio_max", ratio_max)
    return Surrogate("weight", (0.0, float(ratio_max)), (0.0, float(ratio_max)))


def cispo_two_sided(epsilon_low: float = EPSILON, epsilon_high: float = EPSILON) -> Surrogate:
    """-sg[clip(rho, 1 - epsilon_low, 1 + epsilon_high)] A logp: CISPO (2506.13585) in the convention of verl."""
    _check("epsilon_low", epsilon_low)
    _check("epsilon_high", epsilon_high)
    bounds = (max(1.0 - epsilon_low, 0.0), 1.0 + epsilon_high)
    return Surrogate("weight", bounds, bounds)


def dispo(positive: Bounds = (0.2, 10.0), negative: Bounds = (1.0, 100.0)) -> Surrogate:
    """-sg[clip(rho, 1 - low, 1 + high)] A logp with (low, high) = `positive` where A > 0, `negative` elsewhere (2602.00983).

    The formula is from a reading note of the paper. The default numbers are not verified.
    """
    for name, bounds in (("positive", positive), ("negative", negative)):
        if not isinstance(bounds, tuple | list) or len(bounds) != 2 or not all(0 <= e < math.inf for e in bounds):
            raise ValueError(f"{name} must be (low, high), both >= 0 and finite, got {bounds}")
    right, wrong = ((max(1.0 - low, 0.0), 1.0 + high) for low, high in (positive, negative))
    return Surrogate("weight", right, wrong)


def sapo(tau_positive: float = 1.0, tau_negative: float = 1.05) -> Surrogate:
    """-(4 / tau) sigmoid(tau (rho - 1)) A: a soft gate in the place of the clip, tau by the sign of A (SAPO 2511.20347)."""
    _check("tau_positive", tau_positive)
    _check("tau_negative", tau_negative)
    return Surrogate("sapo", (float(tau_positive), 0.0), (float(tau_negative), 0.0))


def gmpo(epsilon_low: float = 0.4, epsilon_high: float = 0.4) -> Surrogate:
    """-exp(mean over tokens of the clipped log rho) A: the rollout's geometric mean (GMPO 2507.20673).

    A token's log ratio is clipped from above at epsilon_high where A > 0, from below at -epsilon_low where A < 0.
    """
    _check("epsilon_low", epsilon_low)
    _check("epsilon_high", epsilon_high)
    return Surrogate("gmpo", (-math.inf, float(epsilon_high)), (-float(epsilon_low), math.inf))


def vespo(
    k_positive: float = 2.0, lambda_positive: float = 3.0, k_negative: float = 3.0, lambda_negative: float = 2.0
) -> Surrogate:
    """-sg[W^k exp(lambda (1 - W))] A logp, W the product of the rollout's ratios (VESPO 2602.10693)."""
    numbers = {
        "k_positive": k_positive,
        "lambda_positive": lambda_positive,
        "k_negative": k_negative,
        "lambda_negative": lambda_negative,
    }
    for name, value in numbers.items():
        _check(name, value)
    return Surrogate("vespo", (float(k_positive), float(lambda_positive)), (float(k_negative), float(lambda_negative)))


def reinforce() -> Surrogate:
    """-A logp: no importance ratio at all."""
    return Surrogate("weight", (1.0, 1.0), (1.0, 1.0))


SURROGATES: dict[str, Callable[[], Surrogate]] = {
    "ppo_clip": ppo_clip,
    "cispo": cispo,
    "cispo_two_sided": cispo_two_sided,
    "dispo": dispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "vespo": vespo,
    "reinforce": reinforce,
}


def resolve(
    surrogate: object, epsilon_low: float = EPSILON, epsilon_high: float | None = None, delta: float | None = None
) -> Surrogate:
    """The numbers that a loss's `surrogate`, epsilon_low, epsilon_high and delta mean together.

    A function of the user's own gives PPO's defaults, which nothing reads.

    Raises:
        TypeError: `surrogate` is no name, Surrogate or function.
        ValueError: an unknown name, or a number of PPO's clip for another surrogate.
    """
    if surrogate in SURROGATES.values():
        raise TypeError(f"surrogate must be a name, or what its function gives: call surrogates.{surrogate.__name__}()")  # type: ignore[attr-defined]
    if isinstance(surrogate, str) and surrogate == "ppo_clip":
        return ppo_clip(epsilon_low, epsilon_high, delta)
    given = {"epsilon_low": (epsilon_low, EPSILON), "epsilon_high": (epsilon_high, None), "delta": (delta, None)}
    for name, (value, default) in given.items():
        if value != default:
            known = isinstance(surrogate, str) and surrogate in SURROGATES
            instead = f", say surrogate={numbers_of(str(surrogate), SURROGATES[str(surrogate)])}" if known else ""
            raise ValueError(
                f"{name}={value} belongs to surrogate='ppo_clip', and surrogate is {surrogate!r}: give its own numbers to its "
                f"function in rlvr_ops.surrogates{instead}"
            )
    if isinstance(surrogate, Surrogate):
        return surrogate
    if isinstance(surrogate, str):
        if surrogate not in SURROGATES:
            raise ValueError(unknown_surrogate(surrogate, SURROGATES, LOSS_TYPES))
        return SURROGATES[surrogate]()
    if not callable(surrogate):
        raise TypeError(f"surrogate must be a name, one of rlvr_ops.surrogates or a function, got {surrogate!r}")
    return PPO_CLIP


def _check(name: str, value: float) -> None:
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {value}")
