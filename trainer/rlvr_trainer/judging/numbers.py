"""Numbers as people write them: signs, grouping, fractions, exponents, currencies, percent, units."""

import re
from dataclasses import dataclass
from fractions import Fraction

from rlvr_trainer.judging.plain import plain

DIGITS = r"(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|\.\d++"
EXPONENT = (
    r"(?:[eE][+-]?\d{1,4}(?![A-Za-z\d])|\s*(?:\\times|\\cdot|[x*])\s*10\s*(?:\^|\*\*)\s*\{?\s*[+-]?\d{1,4}\s*\}?)"
)
DECIMAL = rf"(?:{DIGITS}){EXPONENT}?"
RATIO = r"\d[\d,]*+\s?/\s?\d[\d,]*+(?!\.\d)|\\frac\s?(?:\{\s?-?[\d.,]++\s?\}|\d)\s?(?:\{\s?-?[\d.,]++\s?\}|\d)"
NUMERAL = rf"(?:\d++\s\d++/\d++|\d++\s?\\frac\s?(?:\{{\d++\}}|\d)\s?(?:\{{\d++\}}|\d)|{RATIO}|{DECIMAL})"
CURRENCY = r"(?:US\$|[$€£¥₹₩₽¢]|USD|EUR|GBP)"
SIGN = r"[+-]"
QUANTITY = re.compile(
    rf"(?P<sign>{SIGN}?)\s?(?P<money>{CURRENCY}?)\s?(?P<inner>{SIGN}?)\s?(?P<numeral>{NUMERAL})(?P<unit>\s?[^\d\s].*)?",
    re.DOTALL,
)
REPEATING = re.compile(
    r"(?P<head>\d*\.\d*?)(?:\\(?:overline|bar|dot)\s?\{(?P<over>\d+)\}|\((?P<round>\d+)\)|(?P<twice>\d{1,6}?)(?P=twice)+(?:\.\.\.|…|\\l?dots))"
)
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALE = re.compile(rf"\s({'|'.join(SCALES)}|dozen)\b\s?", re.IGNORECASE)
IN_TEXT = re.compile(rf"(?:{SIGN}\s?)?{CURRENCY}?{NUMERAL}")
NO_NUMBER_FOLLOWS = re.compile(r"(?:[A-Za-z_\d.]|(?:\^|\*\*)\s*\{?\s*-?|\\sqrt\s*\{)$")

SHORT = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "mile": "mi", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft",
    "yard": "yd",
    "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "day": "day", "week": "week", "month": "month",
    "year": "year", "yr": "year", "gram": "g", "kilogram": "kg", "liter": "l", "litre": "l", "milliliter": "ml",
    "ounce": "oz",
    "lb": "lb", "pound": "lb", "dollar": "$", "usd": "$", "us$": "$", "euro": "€", "eur": "€", "gbp": "£", "yen": "¥", "cent": "¢",
    "percent": "%", "pct": "%", "percentage": "%", "degree": "°", "radian": "rad", "deg": "°", "unit": "", "mph": "mi/h",
    "kph": "km/h",
}  # fmt: skip
KNOWN = {*SHORT.values(), *"$€£¥₹¢%°vwjnk", "hz", "pa", "mg", "ms"} - {""}
OPERATORS = (
    "plus", "minus", "times", "divided", "multiplied", "squared", "cubed", "factorial", "doubled", "tripled", "halved",
    "halves", "half",
    "thirds", "quarters", "fourths", "fifths", "sixths", "sevenths", "eighths", "ninths", "tenths", "twelfths",
    "hundredths", "thousandths",
    "hundred", "thousand", "million", "billion", "dozen", "pairs", "score", "or", "maybe", "perhaps", "versus",
    "alternatively", "choose",
    "mod", "modulo", "base", "negative", "incorrect",
)  # fmt: skip
NO_UNITS = {
    *OPERATORS, "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "over", "and", "to", "is", "not", "more", "less",
    "than", "wrong", "but",
    "because", "if", "where", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
}  # fmt: skip
POUNDS = {"lb", "£"}  # a word for both
LONGEST = 2_000  # characters of a number with its unit
MOST_DIGITS = 1_000
MOST_WORDS = 3  # of a unit that is not known


@dataclass(frozen=True)
class Quantity:
    """A rational number and the unit behind it, "" if there is none or none that is known."""

    value: Fraction
    unit: str = ""
    ratio: bool = False  # written as a fraction

    def equals(self, other: "Quantity") -> bool:
        """Whether both are the same number, in units that do not contradict each other; percent count as hundredths or not."""
        units = {self.unit, other.unit}
        if len(units) == 2 and all(map(_is_known, units)) and "%" not in units and units != POUNDS:
            return False
        scales = (1, 100) if (self.unit == "%") != (other.unit == "%") else (1,)
        one, two = (self.value, other.value) if self.unit == "%" else (other.value, self.value)
        return any(_close(one / scale, two) for scale in scales)


def quantity(text: str) -> Quantity | None:
    """The number, with its unit, that all of `text` is; None if it is anything else.

    >>> quantity("$18.90").value, quantity("1e3").value, quantity("12 cm^2").unit, quantity("2x"), quantity("1 1/2").value
    (Fraction(189, 10), Fraction(1000, 1), 'cm^2', None, Fraction(3, 2))
    """
    text = re.sub(r"\s+", " ", plain(text)).strip()
    if len(text) > LONGEST:
        return None
    text = _repeating_as_fraction(text)
    text = re.sub(r"(?<=\d) (?=\d{3}(?:\D|$))", ",", text) if re.fullmatch(r"\D*\d{1,3}(?: \d{3})+\D*", text) else text
    found = QUANTITY.fullmatch(text)
    if not found or (found["sign"] and found["inner"]):
        return None
    behind, factor = _scaled(found["unit"] or "")
    unit, value = _unit(behind.strip(), apart=behind[:1] == " "), _value(found["numeral"])
    if unit is None or value is None:
        return None
    money = SHORT.get(found["money"].lower(), found["money"])
    sign = -1 if "-" in (found["sign"], found["inner"]) else 1
    ratio = "/" in found["numeral"] or "frac" in found["numeral"]
    return Quantity(sign * factor * value, unit or money, ratio)


def _repeating_as_fraction(text: str) -> str:
    """A repeating decimal as the fraction that it is."""
    found = REPEATING.search(text)
    if not found:
        return text
    head, period = found["head"], found["over"] or found["round"] or found["twice"]
    places = len(head.partition(".")[2])
    value = Fraction(head + "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
    return f"{text[: found.start()]}\\frac{{{value.numerator}}}{{{value.denominator}}}{text[found.end() :]}"


def _scaled(behind: str) -> tuple[str, int]:
    """What follows a numeral without `million` and the like, and what that multiplies it by."""
    found = SCALE.match(behind)
    if not found:
        return behind, 1
    name = found[1].lower()
    return " " + behind[found.end() :], 12 if name == "dozen" else 10 ** SCALES[name]


def last_number(text: str) -> str:
    r"""The last number in `text`, in ASCII and without grouping; "" if there is none. Exponents and indices are not numbers.

    >>> [last_number(t) for t in ("−5", r"\frac{3}{4}", "12 cm^2", "10{,}080", "pages 3-5", ".5", "1e5", "x2")]
    ['-5', '3/4', '12', '10080', '5', '.5', '1e5', '']
    """
    found = numbers_in(text)
    return found[-1][0] if found else ""


def numbers_in(text: str) -> list[tuple[str, int, int]]:
    """Every number in `text`, plain, with its place in `plain(text)`."""
    text = plain(text)
    found = []
    for match in IN_TEXT.finditer(text):
        start, end = match.span()
        if _subtracts(text, start):
            start += 1 + (text[start + 1] == " ")
        if not NO_NUMBER_FOLLOWS.search(text[max(start - 20, 0) : start]):
            found.append((_ascii(text[start:end]), start, end))
    return found


def _subtracts(text: str, start: int) -> bool:
    """Whether the sign at `start` stands between two numbers, as in `3-5` and `3 - 5`, or is a hyphen."""
    if text[start] not in "+-":
        return False
    place = start - 1 - (text[start + 1] == " " and text[start - 1 : start] == " ")
    return place >= 0 and bool(re.match(r"[\w)\]}]", text[place]))


def _ascii(number: str) -> str:
    number = re.sub(rf"{CURRENCY}|,(?=\d{{3}})", "", number).replace(" /", "/").replace("/ ", "/")
    number = re.sub(r"\\frac\s*\{?\s*(-?[\d.]+?)\s*\}?\s*\{?\s*(-?[\d.]+)\s*\}?$", r"\1/\2", number)
    return re.sub(r"^([+-])\s", r"\1", number).lstrip("+")


def _value(numeral: str) -> Fraction | None:
    numeral = numeral.replace(",", "")
    if len(numeral) > MOST_DIGITS or re.search(r"(?:e|\^|\*\*)\s?\{?\s?[+-]?\d{4}", numeral, re.IGNORECASE):
        return None
    try:
        if mixed := re.fullmatch(r"(\d+)\s+(\d+)/(\d+)", numeral):
            return int(mixed[1]) + Fraction(int(mixed[2]), int(mixed[3]))
        if latex := re.fullmatch(r"(\d*)\s*\\frac\s*(?:\{\s*(\S+?)\s*\}|(\d))\s*(?:\{\s*(\S+?)\s*\}|(\d))", numeral):
            return int(latex[1] or 0) + Fraction(latex[2] or latex[3]) / Fraction(latex[4] or latex[5])
        if power := re.fullmatch(
            r"(\S+?)\s*(?:\\times|\\cdot|[x*])\s*10\s*(?:\^|\*\*)\s*\{?\s*([+-]?\d+)\s*\}?", numeral
        ):
            return Fraction(power[1]) * Fraction(10) ** int(power[2])
        return Fraction(re.sub(r"\s", "", numeral))
    except (ValueError, ZeroDivisionError):
        return None


def _unit(text: str, apart: bool) -> str | None:
    """A unit in its short form; None if `text` is no unit but something to be multiplied with, or something else."""
    text = re.sub(r"^[({\[]\s?(.*?)\s?[)}\]]$", r"\1", text.rstrip(".")).strip()
    text = re.sub(r"\^\s?\{?\s?(-?\d)\s?\}?", r"^\1", text)
    if not text:
        return ""
    if not re.fullmatch(
        r"[%°$€£¥₹¢A-Za-zµμΩ'\"][^\d=+<>\\(){}\[\],;*/]*(?:\^-?\d)?(?:\s?/\s?[A-Za-z ]+(?:\^-?\d)?)?", text
    ):
        return None
    words = [_short(word) for word in text.lower().split()]
    known = _dimension(words)
    if _is_known(known) and (apart or len(text) > 1 or not text.isalpha()):
        return known
    if not apart or len(words) > MOST_WORDS or NO_UNITS & {*words}:
        return None
    return known if len(re.sub(r"[^A-Za-z]", "", text)) > 2 else None


def _is_known(unit: str) -> bool:
    """Whether every base of a unit in short form is in the table."""
    return bool(unit) and all(re.sub(r"\^-?\d$", "", part.strip()) in KNOWN for part in unit.split("/"))


def _dimension(words: list[str]) -> str:
    """`square cm` and `cm squared` as `cm^2`."""
    for name, power in (("square", 2), ("sq", 2), ("cubic", 3)):
        if words[0] in (name, f"{name}.") and len(words) == 2:
            return f"{words[1]}^{power}"
    if len(words) == 2 and words[1] in ("squared", "square", "cubed"):
        return f"{words[0]}^{3 if words[1] == 'cubed' else 2}"
    return " ".join(words)


def _short(word: str) -> str:
    whole = "/".join(SHORT.get(part, SHORT.get(part.removesuffix("s"), part)) for part in word.split("/"))
    base, power, exponent = whole.partition("^")
    return SHORT.get(base, SHORT.get(base.removesuffix("s"), base)) + power + exponent


def _close(one: Fraction, two: Fraction) -> bool:
    """Equal; or to six digits if a repeating decimal had to be rounded, to nine if both end."""
    if one == two:
        return True
    if one.denominator == 1 and two.denominator == 1:
        return False
    tolerance = Fraction(1, 10**9) if _ends(one) and _ends(two) else Fraction(1, 10**6)
    return abs(one - two) <= tolerance * max(abs(one), abs(two))


def _ends(value: Fraction) -> bool:
    """Whether the decimal expansion of `value` ends."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
