"""An answer taken apart: its elements, its brackets, the sides of its equations."""

import re

BRACKETS = ("()", "(]", "[]", "[)", "{}")


def bracketed(text: str) -> tuple[str, list[str]] | None:
    r"""The brackets around all of `text` and the elements between them; None if it is no tuple, set or interval.

    >>> bracketed("(1, -4)"), bracketed(r"\{1\}"), bracketed("(1)"), bracketed("(1,2)+(3,4)")
    (('()', ['1', '-4']), ('{}', ['1']), None, None)
    """
    text = re.sub(r"\\([{}])", r"\1", text.strip())
    if text[:1] + text[-1:] not in BRACKETS or 0 in _depths(text)[1:-1]:
        return None
    parts = split(text[1:-1], r",|;")
    return (text[0] + text[-1], parts) if len(parts) > 1 or text[0] in "{[" else None


def elements(text: str) -> tuple[str, list[str]] | None:
    r"""The elements of a tuple, interval, set or list; a list is a set without its braces, and `\pm 3` is one.

    >>> elements(r"2 \pm 3")
    ('{}', ['2 + 3', '2 - 3'])
    """
    if text.count("\\pm") == 1 and listed(text) is None:
        return "{}", [text.replace("\\pm", sign).strip() for sign in ("+", "-")]
    return bracketed(text) or listed(text)


def listed(text: str) -> tuple[str, list[str]] | None:
    """The elements of `a, b and c`, as those of a set; None if there is only one.

    >>> listed("1, 2 or 3"), listed("10,000")
    (('{}', ['1', '2', '3']), None)
    """
    parts = split(text, r",|;|\band\b|\bor\b|\\(?:land|lor)\b")
    return ("{}", parts) if len(parts) > 1 else None


def split(text: str, separator: str) -> list[str]:
    """`text` at the separators that stand outside of all brackets and inside no number such as 1,000."""
    depths, parts, start = _depths(text), [], 0
    for match in re.finditer(separator, text):
        if depths[match.start()] == 0 and not _groups_digits(text, match):
            parts.append(text[start : match.start()])
            start = match.end()
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def right_side(text: str) -> str:
    """What stands behind the last = of an equation or chain, and before what it is rounded to.

    >>> right_side("3 + 4 = 7"), right_side("x >= 3"), right_side("f(x=1)"), right_side("x = 1/3 ≈ 0.33"), right_side("x ≈ 2")
    ('7', 'x >= 3', 'f(x=1)', '1/3', '2')
    """
    if listed(text) is not None:
        return text
    exact, *rounded = split(text, r"\\approx(?![A-Za-z])|≈") or [text]
    if rounded and re.fullmatch(r"\\?[A-Za-z]+", exact):
        exact = rounded[-1]
    return (split(exact, r"(?<![<>!\\])=") or [exact])[-1]


def unlabelled(gold: str, given: str) -> str:
    r"""`given` without the `x =` or `x \in` that the reference does not have."""
    if "=" in gold or "\\in" in gold:
        return given
    return re.sub(r"^\s*(?:[A-Za-z]\w?|\([a-z, ]+\))\s*(?:=|\\in\b)\s*", "", given)


def deepest(text: str) -> int:
    """How many brackets are open at once."""
    return max(_depths(text))


def _depths(text: str) -> list[int]:
    """How many brackets are open before each character, and behind the last."""
    found = [0]
    for character in text:
        found.append(found[-1] + (character in "([{") - (character in ")]}"))
    return found


def _groups_digits(text: str, comma: re.Match[str]) -> bool:
    before, behind = text[max(comma.start() - 4, 0) : comma.start()], text[comma.end() : comma.end() + 4]
    grouped = re.search(r"(?:^|[^\d.])\d{1,3}$|,\d{3}$", before) and re.match(r"\d{3}(?!\d)", behind)
    return comma[0] == "," and bool(grouped)
