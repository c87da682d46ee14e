"""The one statement that a text makes: itself if a mark singled it out, else what closes it.

A text is never read in two ways that could be two answers. Negations, ranges and alternatives are no answer.
"""

import re

from rlvr_trainer.judging.numbers import CURRENCY, DIGITS, OPERATORS, numbers_in, quantity
from rlvr_trainer.judging.plain import plain, undelimited

PROSE = re.compile(r"(?<![\\{\w])[^\W\d_]{2,}(?![\w}])")
FUNCTIONS = {
    "sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh", "log", "ln", "lg", "exp", "sqrt", "pi", "max",
    "min", "gcd", "lcm",
    "arcsin", "arccos", "arctan", "asin", "acos", "atan", "inf", "det", "mod", "and", "or",
}  # fmt: skip
CHOICE = re.compile(r"\(?([A-Z])\)?[.:)]?")
SMALL_WORDS = {
    "is", "be", "we", "so", "to", "of", "in", "it", "at", "by", "if", "no", "an", "as", "on", "he", "do", "go", "my",
    "up", "us", "am",
}  # fmt: skip
LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore|hence|then|well|ok(?:ay)?)\b,? ?)?"
    r"(?:(?:it|that)(?:'s| is)|this is|the result is|(?:we|i) get)\s",
    re.IGNORECASE,
)
FORMULA = re.compile(r"\$([^$]{1,500})\$|\\\(([^\\]{1,500}?|.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]", re.DOTALL)
BEHIND_VERB = re.compile(r"(?:\s(?:is|are|be|equals)|'s|:)\s")
FIRST_WORD = re.compile(r"\W*(yes|no|true|false)\s?(?:[.,;!](?!\s?(?:yes|no|true|false)\b)|$)", re.IGNORECASE)
AFTERTHOUGHT = re.compile(r",? (?:and |but )?not\b.*$", re.DOTALL)
NEGATION = re.compile(r"\b(?:not|never|cannot|neither|nor|wrong|incorrect|unlikely|hardly)\b|n't\b", re.IGNORECASE)
LIST_BEFORE = 200  # characters
NUMBER = rf"[-+]?[$€£]?(?:{DIGITS})(?!,?\d)"
LIST = re.compile(rf"(?:^|\b(?:is|are)\s|[=:])\s?{NUMBER}(?:\s?(?:,|;|\band\b|,\s?and\b)\s?{NUMBER})+$")
ALTERNATIVE = re.compile(r"\b(?:or|maybe|perhaps|possibly)\b|^\s?[/&–-]\s?$|^\sto\s$", re.IGNORECASE)
CONCLUDES = r"=|:|\b(?:is|are|gives?|makes?|gets?|leaves?|equals|totals?|becomes?|so|then)\b"
JOINED = re.compile(rf"^[^=:]{{0,40}}\band\b(?!.*(?:{CONCLUDES}))", re.DOTALL)
JOIN = re.compile(r"\s?(?:,|,?\s?and)\s?")
OPERATION = re.compile(
    r"\b(?:divided by|multiplied by|times|plus|minus|over|under|below|above|near|exceeds|twice|double|half|up to|between"
    r"|at (?:least|most)|about to|(?:root|power|half|square|cube|multiple|divisor|factor|negative|reciprocal|percent|one) of"
    r"|(?:less|more|greater|fewer|other) than)\s?[$€£]?$",
    re.IGNORECASE,
)
PART_OF_MORE = re.compile(
    rf"\s?(?:[\^_*/+×-]\s?[\w\\({{*]|\\[a-z]|x\d|and\sa\shalf|(?:{'|'.join(OPERATORS)})\b)", re.IGNORECASE
)
ASIDE = re.compile(
    r"(?:\b(?:for|per|where|when|with|if|after|in|on|within|all|buy|complete|end of)\s(?:\w+\s?=\s?)?"
    r"(?:(?:the|every|each|all|his|her|their)\s){0,2}|\(\s?)[$€£]?$",
    re.IGNORECASE,
)
SIGN_IN_WORDS = re.compile(r"\b(?:minus|negative)\s(?=[$\d.\\])", re.IGNORECASE)
UNIT = re.compile(r"\s?(?:%|°|[a-z]{1,12}(?:\^\{?\d\}?)?(?=[\s.,]|$))")


def normal(text: str) -> str:
    """A statement in plain form, without what only wraps it; `minus 5` and `negative 5` as -5."""
    text = undelimited(plain(undelimited(text)))
    return SIGN_IN_WORDS.sub(lambda found: found[0] if _behind_a_number(text, found.start()) else "-", text)


def _behind_a_number(text: str, start: int) -> bool:
    return bool(re.search(r"[\d)}]\s?$", text[max(start - 2, 0) : start]))


def is_prose(text: str) -> bool:
    r"""Whether there are words in `text` that are no functions, commands or environments of LaTeX."""
    return any(
        word.lower() in SMALL_WORDS or (len(word) > 2 and not word.isupper() and word.lower() not in FUNCTIONS)
        for word in PROSE.findall(text)
    )


def readings(gold: str, answer: str, marked: bool, words: bool = False) -> list[str]:
    """The statement of `answer` beside the reference `gold`, which is as `normal` gives it; empty if there is none.

    More than one only where they are ways to write the same statement. `words`: the reference is text.
    """
    if quantity(gold) is not None:
        return _distinct(_numeric(answer, marked))
    given = normal(answer if marked else _last_line(answer))
    if CHOICE.fullmatch(gold):
        return _distinct([given])
    if words:
        return _distinct(_verbal(given))
    if marked or not is_prose(given):
        return _distinct([given])
    return _distinct([_formula(answer) or undelimited(BEHIND_VERB.split(LEAD_IN.sub("", given))[-1])])


def closing_number(text: str) -> str:
    """The number that a sentence states, with its unit; "" if it states several, denies one, or says only what it is part of.

    >>> closing_number("so it costs $18.90"), closing_number("5 and 6 give 11 cm"), closing_number("it is 5 or 6")
    ('$18.90', '11 cm', '')
    """
    shown = plain(AFTERTHOUGHT.sub("", text) or text)
    found = numbers_in(shown)
    while len(found) > 1 and ASIDE.search(shown[found[-2][2] : found[-1][1]]):
        found.pop()
    if not found or NEGATION.search(shown):
        return ""
    number, start, end = found[-1]
    between = shown[found[-2][2] if len(found) > 1 else 0 : start]
    if OPERATION.search(between) or (len(found) > 1 and _several(between, shown[max(end - LIST_BEFORE, 0) : end])):
        return ""
    currency = re.match(rf"[+-]?\s?({CURRENCY})", shown[start:end])
    unit = UNIT.match(shown[end:])
    behind = unit[0].rstrip(",") if unit and quantity(number + unit[0]) else ""
    if not behind and PART_OF_MORE.match(shown[end:]):
        return ""
    return (currency[1] if currency else "") + number + behind


def _several(between: str, up_to: str) -> bool:
    return bool(ALTERNATIVE.search(between) or JOINED.search(between) or LIST.search(up_to))


def _numeric(answer: str, marked: bool) -> list[str]:
    """The formula, the last line, or the number that closes it."""
    given, formula = normal(answer), "" if marked else _formula(answer)
    if not marked and "\n" in given:
        if formula:
            return [formula]
        given = normal(_last_line(answer, with_number=True))
    if not is_prose(given):
        return [re.sub(r"^\(?[A-J]\)\s", "", given)]
    whole = LEAD_IN.sub("", given)
    return [whole if quantity(whole) else formula or closing_number(given)]


def _verbal(given: str) -> list[str]:
    """Text in whole and what stands behind its last `is` or colon; of an answer that begins with yes or no only that."""
    if first := FIRST_WORD.match(given):
        return [first[1]]
    whole = undelimited(LEAD_IN.sub("", given))
    tail = undelimited(BEHIND_VERB.split(whole)[-1])
    return [given, whole] if NEGATION.search(given) else [given, whole, tail]


def _formula(answer: str) -> str:
    """The last formula between dollars or LaTeX's brackets, if only prose follows, with those that commas or `and` join to it.

    Words between sums of money are none.
    """
    found = [(match, normal("".join(match.groups(default="")))) for match in FORMULA.finditer(answer)]
    found = [(match, formula) for match, formula in found if not is_prose(formula)]
    if not found:
        return ""
    first, formula = found.pop()
    behind = answer[first.end() :]
    while found and JOIN.fullmatch(answer[found[-1][0].end() : first.start()]):
        first, before = found.pop()
        formula = f"{before}, {formula}"
    before = answer[max(first.start() - 60, 0) : first.start()].rpartition("\n")[2]
    clear = not (re.search(r"\d|\\|\$", behind) or NEGATION.search(before + behind) or ALTERNATIVE.search(before))
    return formula if clear else ""


def _last_line(text: str, with_number: bool = False) -> str:
    """The last line that says something: no fence of code, and with a number if one is wanted."""
    lines = [
        line.strip() for line in text.splitlines() if re.search(r"\w", line) and not line.strip().startswith("```")
    ]
    wanted = [line for line in lines if numbers_in(line)] if with_number else lines
    return (wanted or lines or [""])[-1]


def _distinct(found: list[str]) -> list[str]:
    return list(dict.fromkeys(reading for reading in found if reading))
