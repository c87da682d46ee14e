"""Numbers as people write them: signs, grouping, fractions, exponents, currencies, percent, units."""

import re
from dataclasses import dataclass
from fractions import Fraction

from rlvr_trainer.judging.plain import plain

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
EXPONENT = (
    r"(?:[eE][+-]?\d{1,4}(?![A-Za-z\d])|\s*(?:\\times|\\cdot|[x*])\s*10\s*(?:\^|\*\*)\s*\{?\s*[+-]?\d{1,4}\s*\}?)"
)
DECIMAL = rf"(?:{DIGITS}){EXPONENT}?"
RATIO = r"\d[\d,]*\s?/\s?\d[\d,]*(?![\d,]*\.\d)|\\frac\s*(?:\{\s*-?[\d.,]+\s*\}|\d)\s*(?:\{\s*-?[\d.,]+\s*\}|\d)"
NUMERAL = rf"(?:\d+\s+\d+/\d+|\d+\s*\\frac\s*(?:\{{\d+\}}|\d)\s*(?:\{{\d+\}}|\d)|{RATIO}|{DECIMAL})"
CURRENCY = r"(?:US\$|[$€£¥₹₩₽¢]|USD|EUR|GBP)"
SIGN = r"[+-]"
QUANTITY = re.compile(
    rf"(?P<sign>{SIGN}?)\s*(?P<money>{CURRENCY}?)\s*(?P<inner>{SIGN}?)\s*(?P<numeral>{NUMERAL})\s*(?P<unit>[^\d\s].*)?",
    re.DOTALL,
)
IN_TEXT = re.compile(rf"(?:{SIGN}\s?)?{CURRENCY}?{NUMERAL}")
NO_NUMBER_FOLLOWS = re.compile(r"(?:[A-Za-z_\d.]|(?:\^|\*\*)\s*\{?\s*-?|\\sqrt\s*\{)$")

SHORT = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "mile": "mi", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "day": "day", "week": "week", "month": "month",
    "year": "year", "yr": "year", "gram": "g", "kilogram": "kg", "liter": "l", "litre": "l", "milliliter": "ml", "ounce": "oz",
    "lb": "lb", "pound": "lb", "dollar": "$", "usd": "$", "us$": "$", "euro": "€", "eur": "€", "gbp": "£", "cent": "¢",
    "percent": "%", "pct": "%", "percentage": "%", "degree": "°", "deg": "°", "unit": "", "mph": "mi/h", "kph": "km/h",
}  # fmt: skip
KNOWN = {*SHORT.values(), "$", "€", "£", "¥", "₹", "¢", "%", "°", "v", "w", "j", "n", "k", "hz", "pa", "mg", "ms"} - {
    ""
}
NO_UNITS = {
    "pi",
    "sqrt",
    "sin",
    "cos",
    "tan",
    "log",
    "ln",
    "exp",
    "mod",
    "or",
    "and",
    "to",
    "is",
    "choose",
    "times",
    "over",
}


@dataclass(frozen=True)
class Quantity:
    """A rational number and the unit behind it, "" if there is none or none that is known."""

    value: Fraction
    unit: str = ""
    written: str = ""
    ratio: bool = False  # written as a fraction

    def equals(self, other: "Quantity") -> bool:
        """Whether both are the same number, in units that do not contradict each other; percent count as hundredths or not."""
        if (
            self.unit in KNOWN
            and other.unit in KNOWN
            and self.unit != other.unit
            and "%" not in (self.unit, other.unit)
        ):
            return False
        scales = (1, 100) if (self.unit == "%") != (other.unit == "%") else (1,)
        one, two = (self.value, other.value) if self.unit == "%" else (other.value, self.value)
        return any(_close(one / scale, two) for scale in scales)


def quantity(text: str) -> Quantity | None:
    """The number, with its unit, that all of `text` is; None if it is anything else.

    >>> quantity("$18.90").value, quantity("1e3").value, quantity("12 cm^2").unit, quantity("2x"), quantity("1 1/2").value
    (Fraction(189, 10), Fraction(1000, 1), 'cm^2', None, Fraction(3, 2))
    """
    text = plain(text)
    text = re.sub(r"(?<=\d) (?=\d{3}(?:\D|$))", ",", text) if re.fullmatch(r"\D*\d{1,3}(?: \d{3})+\D*", text) else text
    found = QUANTITY.fullmatch(text.strip())
    if not found or (found["sign"] and found["inner"]):
        return None
    unit = _unit(found["unit"] or "", apart=found.start("unit") > found.end("numeral"))
    value = _value(found["numeral"])
    if unit is None or value is None:
        return None
    money = SHORT.get(found["money"].lower(), found["money"])
    negative = "-" in (found["sign"], found["inner"])
    ratio = "/" in found["numeral"] or "frac" in found["numeral"]
    return Quantity(-value if negative else value, unit or money, text, ratio)


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
    before = text[:start] if text[start + 1] != " " else text[:start].rstrip()
    return bool(re.search(r"[\w)\]}]$", before))


def _ascii(number: str) -> str:
    number = re.sub(rf"{CURRENCY}|,(?=\d{{3}})", "", number).replace(" /", "/").replace("/ ", "/")
    number = re.sub(r"\\frac\s*\{?\s*(-?[\d.]+?)\s*\}?\s*\{?\s*(-?[\d.]+)\s*\}?$", r"\1/\2", number)
    return re.sub(r"^([+-])\s", r"\1", number).lstrip("+")


def _value(numeral: str) -> Fraction | None:
    numeral = numeral.replace(",", "")
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
    """A unit in its short form; None if `text` is no unit but something to be multiplied with."""
    text = re.sub(r"^[({\[]\s*(.*?)\s*[)}\]]$", r"\1", text.strip().rstrip(".")).strip()
    text = re.sub(r"\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", text)
    if not text:
        return ""
    if not re.fullmatch(
        r"[%°$€£¥₹¢A-Za-zµμΩ'\"][^\d=+<>\\(){}\[\],;*]*(?:\^-?\d)?(?:\s*/\s*[A-Za-z ]+(?:\^-?\d)?)?", text
    ):
        return None
    words = [_short(word) for word in re.split(r"\s+", text.lower())]
    known = _dimension(words)
    if known in KNOWN or known.split("^")[0] in KNOWN or known.split("/")[0] in KNOWN:
        return known
    named = len(re.sub(r"[^A-Za-z]", "", text)) > 1 and words[0] not in NO_UNITS
    return known if apart and named else None


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
