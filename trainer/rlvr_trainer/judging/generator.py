"""An answer to a problem of a reasoning-gym generator, judged by the generator itself: what runs inside a worker."""

import json
import re
from functools import lru_cache
from typing import Any

from rlvr_trainer.judging.stated import stated, tagged_answer
from rlvr_trainer.judging.verdict import (
    BAD_REFERENCE,
    MEMORY,
    NO_ANSWER,
    PARTLY,
    REFUSED,
    RIGHT,
    UNREADABLE,
    WRONG,
    Verdict,
)

ARITHMETIC = ("countdown", "puzzle24")
"""Generators whose answers are arithmetic with given numbers, each used once. They evaluate more than that, so that
`ceiling(exp(pi)) + False*(1+2+3+4)` would be 24, and puzzle24 does not look at the numbers."""


@lru_cache(maxsize=8)
def _dataset(name: str, parameters: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(parameters))


def score(name: str, parameters: dict[str, Any], entry: dict[str, Any], completion: str, extract: str) -> Verdict:
    """The generator's own score of what the completion states.

    An answer at which the generator raises scores 0. If it raises at its own answer too, or scores it outside [0, 1], the problem
    cannot be judged.
    """
    judge = _dataset(name, json.dumps(parameters))
    answer = _stated(completion, extract)
    reference = str(entry["answer"])
    if not answer:
        return Verdict(0.0, NO_ANSWER, reference)
    if name in ARITHMETIC and not re.fullmatch(r"(?:[\d\s+()-]|(?<!\*)\*(?!\*)|(?<!/)/(?!/))+", answer):
        return Verdict(0.0, REFUSED, reference, answer)
    if name in ARITHMETIC and sorted(map(int, re.findall(r"\d+", answer))) != sorted(entry["metadata"]["numbers"]):
        return Verdict(0.0, WRONG, reference, answer)
    try:
        found = float(judge.score_answer(answer, entry))
    except MemoryError:
        return Verdict(0.0, MEMORY, reference, answer)
    except Exception as error:
        return _at_fault(judge, entry, reference, answer, error)
    if not 0.0 <= found <= 1.0:  # NaN included
        return Verdict(None, BAD_REFERENCE, f"{name} scored {found}", answer)
    return Verdict(found, RIGHT if found == 1.0 else WRONG if found == 0.0 else PARTLY, reference, answer)


def _stated(completion: str, extract: str) -> str:
    """All after thinking, or what is in answer tags or a box: grids and programs must stay as they are."""
    text = tagged_answer(completion)[0]
    return stated(completion, extract).text if extract == "last_number" or "\\boxed" in text else text


def _at_fault(judge: Any, entry: dict[str, Any], reference: str, answer: str, error: Exception) -> Verdict:
    """Whether the answer or the problem is to blame for an exception."""
    try:
        judge.score_answer(reference, entry)
    except Exception:
        return Verdict(None, BAD_REFERENCE, f"{reference!r}: {type(error).__name__}: {error}", answer)
    return Verdict(0.0, UNREADABLE, reference, answer)
