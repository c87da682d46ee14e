"""Unicode and LaTeX that only change how an answer looks, written in one way."""

import re
import unicodedata
from collections.abc import Callable

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "‒": "-", "﹣": "-", "－": "-", "×": "\\times ", "·": "\\cdot ",
    "⋅": "\\cdot ",
    "÷": "/", "∕": "/", "⁄": "/", "∗": "*", "π": "\\pi ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ",
    "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ",
    "\u202f": "", "\u2009": "", "\u200a": "", "\u200b": "", "\ufeff": "", "\u2062": "", "\u2061": "",
    "“": '"', "”": '"', "‘": "'", "’": "'",
}  # fmt: skip
MONEY = "\x00"
QUOTES = [(mark, mark) for mark in ("**", "__", "*", "_", "`", '"', "'")] + [("\\(", "\\)"), ("\\[", "\\]")]
WRAPPERS = (
    "text", "textbf", "textit", "textrm", "textnormal",
    "textsf", "texttt", "mathrm", "mathbf", "mathit", "mathsf", "mathtt", "mbox",
    "operatorname",
    "underline", "bm", "boldsymbol",
)  # fmt: skip
WRAPPED = re.compile(rf"\\(?:{'|'.join(WRAPPERS)})\s?\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}")
BOLD = re.compile(
    r"(?<![\w)}\]*])\*\*(?=[^\s*])([^*\n]{1,300}?)(?<=[^\s*])\*\*(?![\w({*])|(?<!\w)__(?=[^\s_])([^_\n]{1,300}?)(?<=[^\s_])__(?!\w)"
)
ALIKE: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])", r"\\frac"),
    (r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|limits)(?![A-Za-z])\s*", ""),
    (r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le"),
    (r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge"),
    (r"\\neq(?![A-Za-z])", r"\\ne"),
    (r"\binfinity\b", r"\\infty"),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"\\(?:text)?color\s?\{\w+\}|\\(?:bf|rm|it|sf|large|Large|huge)(?![A-Za-z])\s?", ""),
    (r"_\{(\w)\}", r"_\1"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"(?<!\\)\\[%$#&_]", lambda m: m[0][1]),  # two of them end a row of a matrix
    (r"\{\s*,\s*\}", ","),
    (r"(?<!\\)\\!\s*", ""),
    (r"(?<=\d)\\,(?=\d)", ""),
    (r"(?<!\\)\\[,;: ]|~|\\(?:quad|qquad)(?![A-Za-z])\s*", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b|\\textdegree(?![A-Za-z])", "°"),
]


def plain(text: str) -> str:
    r"""`text` with one sign for each minus, fraction, superscript, space and font, and no digit grouping but commas.

    >>> plain("−5"), plain("3½"), plain(r"\dfrac{1}{2}"), plain("x²"), plain(r"10{,}080")
    ('-5', '3 1/2', '\\frac{1}{2}', 'x^{2}', '10,080')
    """
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub(r"(\d?)([¼½¾⅐-⅞])", lambda m: m[1] + " " * bool(m[1]) + unicodedata.normalize("NFKC", m[2]), text)
    text = _unbolded(text)
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t\r\f\v]+", " ", text))
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\w+))", lambda m: "\\sqrt{" + (m[1] or m[2]) + "}", text)
    for symbol, written in SYMBOLS.items():
        text = text.replace(symbol, written)
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/")
    for pattern, alike in ALIKE:
        text = re.sub(pattern, alike, text)
    for _ in range(3):
        text = WRAPPED.sub(r"\1", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def braced(text: str, start: int) -> tuple[str, int]:
    """The contents of the braces that open at `start`, and the place behind them; to the end if they never close."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1 : place] != "\\" else 0
        if depth == 0:
            return text[start + 1 : place], place + 1
    return text[start + 1 :], len(text)


def undelimited(text: str) -> str:
    """`text` without the `$...$`, `\\(...\\)`, `\\[...\\]`, quotes or markdown around it, and without a final full stop.

    >>> undelimited("**$x$.**"), undelimited("$5"), undelimited("so $5$ or $6$"), undelimited("5!")
    ('x', '$5', 'so 5 or 6', '5!')
    """
    text = _unbolded(text)
    for _ in range(5):
        before, text = text, _unquoted(_unpunctuated(text.strip()))
        if text == before:
            break
    text = text.replace("\\$", MONEY)  # which delimits nothing
    if text.count("$") >= 2:
        return re.sub(r"\$\$?([^$]+)\$?\$", r"\1", text).replace(MONEY, "\\$").strip()
    text = text.replace(MONEY, "\\$")
    return re.sub(r"(?<!\\)\$(?!\s?[-+]?\s?[\d.]|$)", "", text).strip()  # one dollar is money, or half of a formula's


def _unbolded(text: str) -> str:
    """Without Markdown's marks of bold, which are no powers."""
    return BOLD.sub(lambda found: found[1] or found[2], text)


def _unpunctuated(text: str) -> str:
    """Without a final full stop or the like; `...` goes on, and `5!` is a factorial."""
    if text.endswith(("...", "\\dots")):
        return text
    text = re.sub(r"^(?:\\[,;:! ]\s*)+|(?:\\[,;:! ]\s*)+$", "", text).rstrip(".,;: ")
    return re.sub(r"(?<=[^\W\d_]{2})[! ]+$", "", text)


def _unquoted(text: str) -> str:
    for left, right in QUOTES:
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            return text[len(left) : -len(right)].strip()
    for mark in ("**", "__"):
        text = text.removeprefix(mark).removesuffix(mark)
    return text.strip()
