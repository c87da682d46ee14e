r"""Whether two answers are the same, by what the reference is: a choice, words, a quantity, a tuple, a list, or mathematics.

Only what is left over goes to math-verify. By itself it reads `listen` as a product of letters, takes the last number of `5, 6, 7`,
and sees in `d=4\sqrt{10}, M=(1,-4)` a 4.
"""

import re

from rlvr_trainer.judging.mathematics import same_mathematics, without_unit
from rlvr_trainer.judging.numbers import Quantity, quantity
from rlvr_trainer.judging.parts import elements, listed, right_side, unlabelled
from rlvr_trainer.judging.readings import CHOICE, FUNCTIONS, NEGATION, PROSE, is_prose, normal
from rlvr_trainer.judging.verdict import BadReferenceError

CHOSEN = re.compile(r"(?:(?:option|choice|answer)\s)?\(?([A-Za-z])\)?(?:[).:]\s?(.*)|\s?)", re.DOTALL | re.IGNORECASE)
LETTER = re.compile(
    r"(?<![A-Za-z'\\])(?!A (?!(?:or|and)\b)[a-z]|I\b)[A-Z](?![A-Za-z'])|(?<=\()[a-z](?=\))|\b[a-j](?=\))"
)
SEVERAL = re.compile(r"\b[A-Za-z]\)?\s?(?:,|/|\bor\b|\band\b)\s?\(?[A-Za-z]\b(?!')", re.IGNORECASE)
DATE_TIME_OR_SCORE = re.compile(r"\d{1,4}(?:[-/.:]\d{1,4}){2}|\d+\s*:\s*\d+(?:\s*[ap]\.?m\.?)?", re.IGNORECASE)
DECIMAL_COMMA = re.compile(r"(-?\d+),(\d{1,2}|\d{4,})")
WORD = re.compile(r"[^\W\d_]{2,}")
ARITHMETIC = re.compile(r"[\d)}\]!|]\s*(?:[-+*/]|\\times|\\cdot|\\div)\s*[-+]?\s*[\d({\[\\|]")
OPEN = re.compile(
    r"\\(?:sum|prod|i?i?int|lim|max|min|gcd|lcm|binom|lfloor|lceil)(?![A-Za-z])|(?<![\\A-Za-z])[a-hj-z](?![A-Za-z])"
)
MEANS = re.compile(r"[^\W_]|\\[A-Za-z]")
RELATION = re.compile(r"[<>]|\\[lg]e(?![A-Za-z])")


def same(gold: str, given: str, words: bool = False) -> bool:
    """Whether `given` is the reference `gold`, both as `normal` gives them. `words`: the reference is text.

    Raises:
        BadReferenceError: the reference cannot be read.
    """
    if _spaceless(gold) == _spaceless(given):
        return True
    if choice := CHOICE.fullmatch(gold):
        return _chosen(given) == choice[1]
    if words:
        return _text(gold) == _text(given)
    if (number := quantity(gold)) is not None:
        return _same_number(number, right_side(given))
    if (parts := elements(gold)) is not None and not (elements(given) is None and RELATION.search(given)):
        return _same_elements(parts, elements(unlabelled(gold, given)))
    return same_mathematics(gold, given)


def check_reference(gold: str, words: bool) -> None:
    """Compare the reference with something that it is not, to see that it can be compared.

    Raises:
        BadReferenceError: nothing is there, or it is mathematics that math-verify cannot read.
    """
    if not MEANS.search(gold):
        raise BadReferenceError("it has neither letters nor digits" if gold else "it is empty")
    if quantity(gold) is None:
        same(gold, "0" if gold != "0" else "1", words)
    for part in (elements(gold) or ("", []))[1] if not words else []:
        check_reference(normal(part), is_words(part))


def is_mathematics(reference: str) -> bool:
    """Whether a reference is neither a number, a choice nor text, so that only math-verify can tell if it can be read."""
    gold = normal(reference)
    return not (is_words(reference) or CHOICE.fullmatch(gold) or quantity(gold) is not None)


def is_words(reference: str) -> bool:
    """Whether a reference is text: words, dates, times, scores; not formulas, in which letters are variables."""
    gold = normal(reference)
    if DATE_TIME_OR_SCORE.fullmatch(gold):
        return True
    if quantity(gold) is not None or CHOICE.fullmatch(gold):
        return False
    as_formula = reference.strip().startswith(("$", "\\(")) or bool(re.search(r"[=^<>+]", gold))
    words = [word for word in PROSE.findall(without_unit(gold)) if word.lower() not in FUNCTIONS]
    return any(is_prose(word) or not as_formula for word in words)


def is_unevaluated(gold: str, given: str) -> bool:
    """Whether the reference is a number and the answer a sum, product or quotient that was not worked out."""
    number, given = quantity(gold), right_side(given)
    if number is None:
        return False
    found = quantity(given)
    if found is not None:
        return found.ratio and number.value.denominator == 1 and number.unit != "%"
    return bool(ARITHMETIC.search(given))


def _same_number(number: Quantity, given: str) -> bool:
    comma = DECIMAL_COMMA.fullmatch(given)
    found = quantity(f"{comma[1]}.{comma[2]}" if comma else given)
    if found is not None:
        return number.equals(found)
    several = listed(given) is not None
    value = f"\\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"
    return not (several or OPEN.search(given)) and same_mathematics(value, given)


def _same_elements(gold: tuple[str, list[str]], given: tuple[str, list[str]] | None) -> bool:
    """Elements in order inside the same brackets, or each to one of a list or set."""
    if given is None or len(gold[1]) != len(given[1]):
        return False
    listed_in_python = gold[0] == "{}" and given[0] == "[]" and len(given[1]) != 2  # which would be an interval
    if gold[0] != given[0] and not listed_in_python:
        return False
    if gold[0] != "{}":
        return all(_same_element(one, two) for one, two in zip(gold[1], given[1], strict=True))
    left = list(given[1])
    for one in gold[1]:
        match = next((two for two in left if _same_element(one, two)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_element(gold: str, given: str) -> bool:
    return same(normal(gold), normal(given), is_words(gold))


def _chosen(text: str) -> str:
    """The letter of the one choice that a text names; "" if it names several, denies one, or names none."""
    found = CHOSEN.fullmatch(text)
    letters = {letter.upper() for letter in LETTER.findall((found[2] or "") if found else text)}
    letters |= {found[1].upper()} if found else set()
    return letters.pop() if len(letters) == 1 and not (NEGATION.search(text) or SEVERAL.search(text)) else ""


def _text(text: str) -> str:
    text = re.sub(r"^(?:the|an?)\s+", "", text.casefold().strip(" \t\n.,;:!?\"'`*()"))
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    return re.sub(r"[\s\-_]+", " ", text).replace("solutions", "solution")


def _spaceless(text: str) -> str:
    """`text` without spaces but those that part words or digits."""
    words = WORD.search(re.sub(r"\\[A-Za-z]+", "", text))
    return re.sub(r"\s+", " ", text) if words else re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
