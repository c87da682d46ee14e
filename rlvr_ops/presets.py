"""The named losses: `policy_loss` and `policy_loss_from_logps` with some keywords fixed and others given another default."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

from rlvr_ops.from_logps import policy_loss_from_logps
from rlvr_ops.losses import LossOutput, policy_loss

P = ParamSpec("P")
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
                raise TypeError(
                    f"{name}() has no argument {keyword!r}: {_refusal(keyword, known, without, base.__name__)}"
                )
        return base(*args, **{**defaults, **kwargs})

    loss.__name__ = loss.__qualname__ = name
    loss.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    loss.__doc__ = f"{summary}\n\nThe arguments, the result and the errors are those of `{base.__name__}`."
    return loss


def _refusal(keyword: str, known: set[str], without: tuple[str, ...], base: str) -> str:
    if keyword in without:
        return f"this loss fixes it, {base} takes it"
    near = difflib.get_close_matches(keyword, known - set(without), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"{base} has none either"


_ACE_SUMMARY = """ACE: a clipped surrogate whose wrong rollouts are penalised the more, the likelier the policy has
made them (arXiv 2602.21420).

`ref_per_token_logps` is required: log-probabilities under the frozen reference. `alpha` defaults to the paper's 1;
alpha=0 is the plain loss bit for bit. The objective under it is `loss_type`: grpo for ACE-GRPO; dapo with
epsilon_high=0.28 for ACE-DAPO. Where all rollouts of a group are wrong their advantage is 0, and ACE does nothing."""
_GRPO_SUMMARY = (
    "GRPO: the mean over rollouts of each one's mean clipped surrogate, with an optional KL term (arXiv 2402.03300)."
)
_DAPO_SUMMARY = "DAPO: the token mean over the global batch, with clip-higher: epsilon_high=0.28 (arXiv 2503.14476)."
_DR_GRPO_SUMMARY = (
    "Dr. GRPO: the sum over tokens divided by a constant length, which removes GRPO's length bias (arXiv 2503.20783)."
)

_PLAIN = ("loss_type", *_ACE)
ace_loss = _preset(policy_loss, "ace_loss", _ACE_SUMMARY, alpha=1.0)
grpo_loss = _preset(policy_loss, "grpo_loss", _GRPO_SUMMARY, without=_PLAIN, loss_type="grpo")
dapo_loss = _preset(policy_loss, "dapo_loss", _DAPO_SUMMARY, without=_PLAIN, loss_type="dapo", epsilon_high=0.28)
dr_grpo_loss = _preset(policy_loss, "dr_grpo_loss", _DR_GRPO_SUMMARY, without=_PLAIN, loss_type="dr_grpo")

ace_loss_from_logps = _preset(policy_loss_from_logps, "ace_loss_from_logps", _ACE_SUMMARY, alpha=1.0)
grpo_loss_from_logps = _preset(
    policy_loss_from_logps, "grpo_loss_from_logps", _GRPO_SUMMARY, without=_PLAIN, loss_type="grpo"
)
dapo_loss_from_logps = _preset(
    policy_loss_from_logps, "dapo_loss_from_logps", _DAPO_SUMMARY, without=_PLAIN, loss_type="dapo", epsilon_high=0.28
)
dr_grpo_loss_from_logps = _preset(
    policy_loss_from_logps, "dr_grpo_loss_from_logps", _DR_GRPO_SUMMARY, without=_PLAIN, loss_type="dr_grpo"
)
