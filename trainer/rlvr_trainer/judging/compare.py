"""Reference and completion to verdict, in this process: what runs inside a worker."""

from collections.abc import Sequence

from rlvr_trainer.judging.equality import MEANS, check_reference, is_unevaluated, is_words, same
from rlvr_trainer.judging.readings import normal, readings
from rlvr_trainer.judging.stated import Stated, stated
from rlvr_trainer.judging.verdict import (
    BAD_REFERENCE,
    NO_ANSWER,
    RIGHT,
    UNEVALUATED,
    UNREADABLE,
    WRONG,
    BadReferenceError,
    UnreadableError,
    Verdict,
)

LONGEST_READING = 300  # characters of what was read, for logs


def compare(
    references: Sequence[str], completion: str, *, extract: str = "whole", accept_unevaluated: bool = False
) -> Verdict:
    """1 if the completion states any of the references, else 0 and why.

    A reference that cannot be read makes the score None, unless another one says that the answer is right.
    """
    answer = stated(completion, extract)
    verdicts = [_compare(reference, answer, accept_unevaluated) for reference in references]
    right = [verdict for verdict in verdicts if verdict.score == 1]
    unread = [verdict for verdict in verdicts if verdict.score is None]
    odd = [verdict for verdict in verdicts if verdict.reason != WRONG]
    return (right or unread or odd or verdicts)[0]


def check(reference: str) -> Verdict:
    """Whether a reference can be read: 1, or None with what is wrong with it."""
    try:
        gold, words = read(reference)
        check_reference(gold, words)
        if _compare(reference, stated(reference), accept_unevaluated=True).score != 1.0:
            raise BadReferenceError("it is not equal to itself: give the answer alone")
        return Verdict(1.0, RIGHT, gold)
    except (BadReferenceError, UnreadableError) as error:
        return Verdict(None, BAD_REFERENCE, f"{reference!r}: {error}")


def read(reference: str) -> tuple[str, bool]:
    """A reference in plain form, of a box only what is in it; and whether it is text."""
    if "\\boxed" in reference:
        reference = stated(reference).text
    return normal(reference), is_words(reference)


def _compare(reference: str, answer: Stated, accept_unevaluated: bool) -> Verdict:
    gold, words = read(reference)
    found = readings(gold, answer.text, answer.marked, words)
    read_answer = found[-1] if found else normal(answer.text[:LONGEST_READING])
    verdict = Verdict(0.0, WRONG if answer.text.strip() else NO_ANSWER, gold, read_answer)
    for reading in found:
        try:
            if not same(gold, reading, words):
                continue
        except BadReferenceError:
            return check(reference)
        except UnreadableError:
            verdict = Verdict(0.0, UNREADABLE, gold, reading)
            continue
        if accept_unevaluated or not is_unevaluated(gold, reading):
            return Verdict(1.0, RIGHT, gold, reading)
        verdict = Verdict(0.0, UNEVALUATED, gold, reading)
    return verdict if MEANS.search(gold) else check(reference)
