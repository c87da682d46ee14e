"""What a statement may be read as: itself or, where no box, tag or phrase marked it as the answer, what closes it."""

import re

from rlvr_trainer.judging.numbers import DIGITS, numbers_in, quantity
from rlvr_trainer.judging.plain import plain, undelimited

LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore|hence|then|well|ok(?:ay)?)\b,?\s*)?"
    r"(?:(?:it|that)(?:'s| is)|this is|the result is|(?:we|i) get)\s+",
    re.IGNORECASE,
)
FORMULA = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
NUMBER = rf"[-+]?[$€£]?(?:{DIGITS})(?!,?\d)"
LIST = re.compile(rf"(?:^|\b(?:is|are)\s|[=:])\s*{NUMBER}(?:\s*(?:,|;|\band\b|,\s*and\b)\s*{NUMBER})+$")
HEDGE = re.compile(r"\s*(?:,?\s*or|/|,\s*and)\s*[$€£]?")
UNIT = re.compile(r"\s*(?:%|°|[a-z]{1,12}(?:\^\{?\d\}?)?(?=[\s.]|$))")


def normal(text: str) -> str:
    """A statement in plain form, without what only wraps it."""
    return undelimited(plain(undelimited(text)))


def readings(gold: str, answer: str, marked: bool) -> list[str]:
    """`answer` as it can be read beside the reference `gold`, best first; `gold` as `normal` gives it.

    What no mark singled out is read as its last line, the formula in or before it, and what its last sentence closes with.
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if not lines:
        return []
    given, closing = normal(answer), undelimited(LEAD_IN.sub("", normal(lines[-1])))
    found = [given] if marked or len(lines) == 1 else []
    formula, behind = _closing_formula(answer)
    if quantity(gold) is not None:
        prose = behind if formula else closing if numbers_in(closing) else given
        found += [closing, given.rstrip("!"), (closing_number(prose) if PROSE.search(prose) else "") or formula]
    elif not marked:
        found += [closing, formula, _tail(closing)]
    return list(dict.fromkeys(reading for reading in found if reading))


def closing_number(text: str) -> str:
    """The last number of a sentence, with its unit; or the list that it ends.

    >>> closing_number("it is 5 or 6"), closing_number("so it costs $18.90"), closing_number("5 and 6 give 11 cm")
    ('5, 6', '$18.90', '11 cm')
    """
    shown, found = plain(text), numbers_in(text)
    if not found:
        return ""
    number, start, end = found[-1]
    if len(found) > 1 and (HEDGE.fullmatch(shown[found[-2][2] : start]) or LIST.search(shown[:end])):
        return f"{found[-2][0]}, {number}"
    currency = re.search(r"[$€£]", shown[max(start - 1, 0) : start + 2])
    unit = UNIT.match(shown[end:])
    behind = unit[0] if unit and quantity(number + unit[0]) else ""
    return (currency[0] if currency else "") + number + behind


def _closing_formula(answer: str) -> tuple[str, str]:
    """The last formula between dollars or LaTeX's brackets, and what follows it; words between sums of money are none."""
    for match in reversed(list(FORMULA.finditer(answer))):
        formula = normal("".join(match.groups(default="")))
        if not PROSE.search(formula):
            return formula, normal(answer[match.end() :])
    return "", ""


def _tail(closing: str) -> str:
    """What stands behind the last `is`, `equals` or colon of a sentence."""
    return undelimited(re.split(r"(?:\s(?:is|are|be|equals|to)|'s|:)\s", closing)[-1])
