"""math-verify's opinion on two single expressions, relations, sets or matrices, each alone and in a box."""

import re
from functools import lru_cache
from typing import Any

from rlvr_trainer.judging.numbers import quantity
from rlvr_trainer.judging.parts import deepest, right_side, unlabelled
from rlvr_trainer.judging.readings import is_prose
from rlvr_trainer.judging.verdict import BadReferenceError, UnreadableError

LONGEST = 1000  # characters
ENDLESS = re.compile(
    r"(?:\^|\*\*)\s?\{?\s?-?\d{5,}|\d{5,}\s?!|!\s?!|\d\s?\^\s?\{?\s?\d+\s?\^|[)\]}a-z]\s?\^\s?\{?\s?\d{3,}|\\binom\s?\{\s?\d{5,}"
)
MOST_UNIONS, DEEPEST = 20, 15
AS_TEXT = re.compile(r"\\(?:triangle|angle|overline|widehat|p?mod|equiv)(?![A-Za-z])|'|\bmod\b")
COMPUTED = re.compile(r"[-+*^\d]")  # in the left side of an equation that is more than a name for the right one
IN_BASE = re.compile(r"\d_\{?\d")


def same_mathematics(gold: str, given: str) -> bool:
    """Whether `given` is mathematically equal to the reference `gold`.

    Raises:
        BadReferenceError: math-verify cannot read the reference.
        UnreadableError: math-verify fails on the answer, in whatever way.
    """
    wanted = _reference(gold)
    if not wanted:
        raise BadReferenceError("math-verify cannot read it")
    if any(pattern.search(text) for pattern in (IN_BASE, AS_TEXT) for text in (gold, given)):
        return False  # it drops the base of 101_2, what follows \triangle, and primes
    left, *right = re.split(r"(?<![<>!\\])=", gold)
    if right and "=" not in given and COMPUTED.search(re.sub(r"_(?:\w|\{[^{}]*\})", "", left)):
        return False  # x + y = 5 is not 5
    if not re.search(r"=|<|>|\\[lgn]e\b", gold):
        given = right_side(unlabelled(gold, given))
    return _verified(wanted, _parsed(given))


def _verified(wanted: list[Any], found: list[Any]) -> bool:
    from math_verify import verify

    try:
        return bool(found) and bool(
            verify(wanted, found, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
        )
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error


@lru_cache(maxsize=64)
def _reference(text: str) -> list[Any]:
    return _parsed(text)


def _parsed(text: str) -> list[Any]:
    """What math-verify reads in `text`, without its fall-back to the text itself; nothing in prose, nor in huge powers."""
    from math_verify import parse

    text = without_unit(text)
    if (
        len(text) > LONGEST
        or text.count("\\cup") > MOST_UNIONS
        or deepest(text) > DEEPEST
        or ENDLESS.search(text)
        or is_prose(text)
    ):
        return []
    try:
        found = parse(f"\\boxed{{{_latex(text)}}}", _reader(), parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        return []
    return [one for one in found if not isinstance(one, str)]


@lru_cache(maxsize=1)
def _reader() -> list[Any]:
    """LaTeX with every letter a variable: units are known here, and `5m` is no 5."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    return [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)]


def without_unit(text: str) -> str:
    r"""An expression without its unit.

    >>> without_unit(r"36\pi cm^2"), without_unit("3 x")
    ('36\\pi', '3 x')
    """
    for count in (3, 2, 1):
        words = text.split(" ")
        value, unit = " ".join(words[:-count]), " ".join(words[-count:])
        if value and unit[:1].isalpha() and quantity(f"1 {unit}") is not None:
            return value
    return text


def _latex(text: str) -> str:
    """Plain text such as `sqrt(2)*x**2` as LaTeX."""
    text = re.sub(r"(?<!\\)\bsqrt\s?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp|pi|infty)(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"\*\*\s?(-?\d+|\w|\([^()]*\))", r"^{\1}", text).replace("*", "\\cdot ")
    return text.replace("<=", "\\le ").replace(">=", "\\ge ").replace("!=", "\\ne ").replace("°", "^\\circ")
