"""Judging: what a completion states, whether it is the reference, and the worker processes in which both are found out."""

import atexit
from collections.abc import Sequence
from functools import lru_cache

from rlvr_trainer.judging.verdict import BadReferenceError, Verdict
from rlvr_trainer.judging.workers import WorkerError, Workers, answers

__all__ = ["BadReferenceError", "Verdict", "WorkerError", "Workers", "judge"]


@lru_cache(maxsize=1)
def _workers() -> Workers:
    made = Workers(processes=1)
    atexit.register(made.close)
    return made


def judge(
    reference: str | Sequence[str], completion: str, *, extract: str = "whole", accept_unevaluated: bool = False
) -> Verdict:
    r"""Score a completion against a reference answer, in a worker process that can do nothing else.

    The first call starts the worker and takes a second. An answer that takes longer than ten seconds is wrong.

    Args:
        reference: the right answer, or several, any of which is right: numbers, LaTeX, words, the letter of a choice.
        completion: what a model wrote.
        extract: `whole` reads what the completion states as its answer; `last_number` takes the last number of it.
        accept_unevaluated: whether `3+4` is right where the reference is 7.

    Raises:
        BadReferenceError: no reference can be read.
        TypeError: something else than text.
        ValueError: another `extract`.

    Example:
        >>> judge("1/2", "So the answer is $0.5$.").score, judge("7", "it is 5 or 6 or 7").reason
        (1.0, 'wrong')
    """
    references = [reference] if isinstance(reference, str) else reference
    if not isinstance(references, Sequence) or not all(isinstance(one, str) for one in references):
        raise TypeError(f"reference must be text or a list of texts, got {reference!r}")
    if not isinstance(completion, str):
        raise TypeError(f"completion must be text, got {completion!r}")
    if extract not in ("whole", "last_number"):
        raise ValueError(f"extract must be 'whole' or 'last_number', got {extract!r}")
    if not references:
        raise BadReferenceError("reference holds no answer")
    asked = answers([(references, completion)], extract=extract, accept_unevaluated=accept_unevaluated)
    (verdict,) = _workers()(asked)
    if verdict.score is None:
        raise BadReferenceError(f"reference cannot be read: {verdict.read_reference}")
    return verdict
