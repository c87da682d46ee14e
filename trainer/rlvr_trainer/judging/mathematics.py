"""math-verify's opinion on two single expressions, relations, sets or matrices, each alone and in a box."""

import re
from functools import lru_cache
from typing import Any

from rlvr_trainer.judging.parts import right_side, unlabelled
from rlvr_trainer.judging.verdict import BadReferenceError, UnreadableError

LONGEST = 2000  # characters


def same_mathematics(gold: str, given: str) -> bool:
    """Whether `given` is mathematically equal to the reference `gold`.

    Raises:
        BadReferenceError: math-verify cannot read the reference.
        UnreadableError: math-verify fails on the answer, in whatever way.
    """
    wanted = _parsed(gold)
    if not wanted:
        raise BadReferenceError("math-verify cannot read it")
    if not re.search(r"=|<|>|\\[lgn]e\b", gold):
        given = right_side(unlabelled(gold, given))
    return _verified(wanted, _parsed(given))


def _verified(wanted: list[Any], found: list[Any]) -> bool:
    from math_verify import verify

    try:
        return bool(found) and bool(verify(wanted, found, timeout_seconds=None, raise_on_error=True))
    except Exception as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error


@lru_cache(maxsize=256)
def _parsed(text: str) -> list[Any]:
    """What math-verify reads in `text`, without its fall-back to the text itself."""
    from math_verify import parse

    if len(text) > LONGEST:
        return []
    try:
        found = parse(f"\\boxed{{{_latex(text)}}}", parsing_timeout=None, raise_on_error=True)
    except Exception:
        return []
    return [one for one in found if not isinstance(one, str)]


def _latex(text: str) -> str:
    """Plain text such as `sqrt(2)*x**2` as LaTeX."""
    text = re.sub(r"(?<!\\)\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp|pi|infty)(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"\*\*\s*(-?\d+|\w|\([^()]*\))", r"^{\1}", text).replace("*", "\\cdot ")
    return text.replace("<=", "\\le ").replace(">=", "\\ge ").replace("!=", "\\ne ").replace("°", "^\\circ")
