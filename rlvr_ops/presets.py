"""The named losses: `policy_loss` and `policy_loss_from_logps` with some keywords fixed and others given another default."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

from rlvr_ops.from_logps import policy_loss_from_logps
from rlvr_ops.losses import LossOutput, policy_loss
from rlvr_ops.names import AGGREGATION, numbers_of
from rlvr_ops.surrogates import SURROGATES

P = ParamSpec("P")
_CLIP = ("epsilon_low", "epsilon_high", "delta")  # PPO's numbers, which another surrogate has not
_ACE = ("alpha", "confidence", "confidence_reduction", "shape")


def _preset(
    base: Callable[P, LossOutput], name: str, summary: str, *, without: tuple[str, ...] = (), **defaults: Any
) -> Callable[P, LossOutput]:
    """`base` under a name of its own: keywords in `without` are fixed and gone, those in `defaults` start elsewhere."""
    signature = inspect.signature(base)
    parameters = [
        p.replace(default=defaults.get(p.name, p.default))
        for p in signature.parameters.values()
        if p.name not in without
    ]
    known = {p.name for p in parameters}

    @functools.wraps(base)
    def loss(*args: P.args, **kwargs: P.kwargs) -> LossOutput:
        for keyword in kwargs:
            if keyword not in known:
                refusal = _refusal(keyword, known, without, base.__name__, defaults)
                raise TypeError(f"{name}() has no argument {keyword!r}: {refusal}")
        return base(*args, **{**defaults, **kwargs})

    loss.__name__ = loss.__qualname__ = name
    loss.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    loss.__doc__ = f"{summary}\n\nThe arguments, the result and the errors are those of `{base.__name__}`."
    return loss


def _refusal(keyword: str, known: set[str], without: tuple[str, ...], base: str, defaults: dict[str, Any]) -> str:
    surrogate = defaults.get("surrogate")
    if surrogate:
        make = SURROGATES[surrogate]
        if keyword in ("surrogate", *_CLIP, *inspect.signature(make).parameters):
            numbers = f"{base}(..., surrogate={numbers_of(surrogate, make)}, loss_type={AGGREGATION[surrogate]!r})"
            return f"this loss fixes its numbers, and with others it is {numbers}"
    if keyword in without:
        return f"this loss fixes it, {base} takes it"
    near = difflib.get_close_matches(keyword, known - set(without), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"{base} has none either"


def _pair(
    name: str, summary: str, *, without: tuple[str, ...] = (), **defaults: Any
) -> tuple[Callable[..., LossOutput], Callable[..., LossOutput]]:
    """A preset from hidden states and the same one from log-probabilities."""
    return (
        _preset(policy_loss, f"{name}_loss", summary, without=without, **defaults),
        _preset(policy_loss_from_logps, f"{name}_loss_from_logps", summary, without=without, **defaults),
    )


_PLAIN = ("loss_type", "surrogate", "importance_sampling_level", *_ACE)
_OTHER = ("surrogate", *_CLIP)

ace_loss, ace_loss_from_logps = _pair(
    "ace",
    """ACE: a clipped surrogate whose wrong rollouts are penalised the more, the likelier the policy has
made them (arXiv 2602.21420).

`ref_per_token_logps` is required: log-probabilities under the frozen reference. `alpha` defaults to the paper's 1;
alpha=0 is the plain loss bit for bit. The objective under it is `loss_type`: grpo for ACE-GRPO; dapo with
epsilon_high=0.28 for ACE-DAPO; or any `surrogate`. Where all rollouts of a group are wrong their advantage is 0, and
ACE does nothing.""",
    alpha=1.0,
)
grpo_loss, grpo_loss_from_logps = _pair(
    "grpo",
    "GRPO: the mean over rollouts of each one's mean clipped surrogate, with an optional KL term (arXiv 2402.03300).",
    without=_PLAIN,
    loss_type="grpo",
)
dapo_loss, dapo_loss_from_logps = _pair(
    "dapo",
    "DAPO: the token mean over the global batch, with clip-higher: epsilon_high=0.28 (arXiv 2503.14476).",
    without=_PLAIN,
    loss_type="dapo",
    epsilon_high=0.28,
)
dr_grpo_loss, dr_grpo_loss_from_logps = _pair(
    "dr_grpo",
    "Dr. GRPO: the sum over tokens divided by a constant length, which removes GRPO's length bias (arXiv 2503.20783).",
    without=_PLAIN,
    loss_type="dr_grpo",
)
bnpo_loss, bnpo_loss_from_logps = _pair(
    "bnpo",
    "BNPO's aggregation: the token mean over the batch at hand (arXiv 2506.02864); its advantages are "
    "`group_advantages(estimator='bnpo')`.",
    without=_PLAIN,
    loss_type="bnpo",
)
gspo_loss, gspo_loss_from_logps = _pair(
    "gspo",
    """GSPO: one importance ratio for the rollout, its tokens' geometric mean, clipped as a whole (arXiv 2507.18071).

`importance_sampling_level="sequence_token"` is its token form.""",
    without=("surrogate", "delta"),
    importance_sampling_level="sequence",
    epsilon_low=3e-4,
    epsilon_high=4e-4,
)
luspo_loss, luspo_loss_from_logps = _pair(
    "luspo",
    """LUSPO: GSPO's term times the rollout's length, so that long rollouts count for what they are (arXiv 2602.05261).

The clip's defaults are GSPO's; the paper's own are not verified.""",
    without=("surrogate", "loss_type", "delta"),
    importance_sampling_level="sequence",
    loss_type="luspo",
    epsilon_low=3e-4,
    epsilon_high=4e-4,
)
cispo_loss, cispo_loss_from_logps = _pair(
    "cispo",
    """CISPO: a clipped ratio, constant to the gradient, times the log-probability: no token loses its gradient
(arXiv 2506.13585).

TRL's convention: the ratio is at most 5. `policy_loss(surrogate="cispo_two_sided")` is verl's.""",
    without=_OTHER,
    surrogate="cispo",
    loss_type="dapo",
)
dispo_loss, dispo_loss_from_logps = _pair(
    "dispo",
    "DISPO: CISPO with bounds of their own for right and wrong tokens (arXiv 2602.00983); see `surrogates.dispo`.",
    without=_OTHER,
    surrogate="dispo",
    loss_type="dapo",
)
sapo_loss, sapo_loss_from_logps = _pair(
    "sapo",
    "SAPO: a soft gate in the place of the clip, sharper for wrong tokens (arXiv 2511.20347).",
    without=_OTHER,
    surrogate="sapo",
)
gmpo_loss, gmpo_loss_from_logps = _pair(
    "gmpo",
    "GMPO: the geometric mean over the rollout's tokens of their clipped ratios (arXiv 2507.20673).",
    without=(*_OTHER, "importance_sampling_level"),
    surrogate="gmpo",
)
vespo_loss, vespo_loss_from_logps = _pair(
    "vespo",
    "VESPO: the rollout's whole ratio W, through W^k exp(lambda (1 - W)), times the log-probability (arXiv 2602.10693).",
    without=(*_OTHER, "importance_sampling_level"),
    surrogate="vespo",
    loss_type="dapo",
)
reinforce_loss, reinforce_loss_from_logps = _pair(
    "reinforce",
    "REINFORCE: the log-probability times the advantage, without an importance ratio.",
    without=(*_OTHER, "importance_sampling_level"),
    surrogate="reinforce",
)
