"""What a judge says about one completion, and why."""

from collections.abc import Iterable
from dataclasses import dataclass

RIGHT, WRONG, PARTLY = "right", "wrong", "partly right"
NO_ANSWER, UNREADABLE, UNEVALUATED, REFUSED, TOO_LONG = "no answer", "unreadable", "unevaluated", "refused", "too long"
TIME, MEMORY, CRASHED = "time limit", "memory limit", "crashed"
BAD_REFERENCE = "bad reference"

COUNTED = (NO_ANSWER, UNREADABLE, UNEVALUATED, REFUSED, TOO_LONG, TIME, MEMORY, CRASHED, BAD_REFERENCE)
"""Reasons for which an answer was not simply right or wrong. Each is counted under its name."""


class BadReferenceError(ValueError):
    """A reference answer that no judge can read: the data is at fault, not the completion."""


class UnreadableError(ValueError):
    """An answer on which the judge fails."""


@dataclass(frozen=True)
class Verdict:
    """The score of one completion.

    Attributes:
        score: in [0, 1]; None if the reference cannot be read, which is the only thing that no answer is blamed for.
        reason: `right`, `wrong`, `partly right`, or what else made the answer score 0.
        read_reference: the reference as it was understood.
        read_answer: what the completion was understood to state; empty if nothing was found.
    """

    score: float | None
    reason: str
    read_reference: str = ""
    read_answer: str = ""


def counts(verdicts: Iterable[Verdict], prefix: str = "judge/") -> dict[str, float]:
    """How many verdicts have each of the reasons in `COUNTED`, by names for a log such as `judge/time_limit`."""
    reasons = [verdict.reason for verdict in verdicts]
    return {prefix + reason.replace(" ", "_"): float(reasons.count(reason)) for reason in COUNTED}
