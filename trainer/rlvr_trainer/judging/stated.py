r"""What a completion states as its answer.

Thinking is no answer: all before the last `</think>` is left out, and so is a thought that never ends. Of the rest the last of
these counts, in this order: `<answer>...</answer>`, `\boxed{...}`, `#### ...`, "the answer is ..." or "Answer: ...". What has none
of them is judged by its end. A tag or brace that never closes goes on to the end, as in a completion that was cut off.
"""

import re
from dataclasses import dataclass

from rlvr_trainer.judging.numbers import last_number
from rlvr_trainer.judging.plain import braced, plain, undelimited

LONGEST = 2_000  # characters of a statement
TAIL = 20_000  # characters behind the thoughts in which an answer is looked for

THOUGHT = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
ANSWER = re.compile(r"<answer>(.*?)(?=</?answer>|$)", re.IGNORECASE | re.DOTALL)
END_TOKEN = re.compile(r"(?:(?:<\|[^|>\s]{1,30}\|>|</s>)\s{0,9}){1,9}$")
ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)
BOX = re.compile(r"\\f?box(?:ed)?\s?(?=\{)|\\boxed\s(\S+)")
BETWEEN_BOXES = re.compile(r"[\s$.,;&\\()\[\]]*(?:\b(?:and|or)\b)?[\s$.,;&\\()\[\]]*")
MOST_BOXES = 30  # of one list
FARTHEST = 60  # characters between two boxes of one list
HEADING = re.compile(r"(?:step|final|answer|solution|conclusion|explanation)\b", re.IGNORECASE)
PHRASE = re.compile(
    r"(?:^[\s*_#>-]{0,10}(?:(?:final|correct)\s)?|\b(?:the|final|correct|my|our)\s(?:(?:final|correct)\s)?|\b(?=answer\s?[:=]))answer\b"
    r"(?:\s\([^()\n]{0,40}\))?(?:[^\n.:=]{0,60}?(?:\bis\b|\bbe\b|\bequals\b|[:=])|[\s*_#]{0,10}\n)[\s*_:]{0,10}",
    re.IGNORECASE | re.MULTILINE,
)
DENIED = re.compile(r"\b(?:not|never|cannot)\b|n't\b", re.IGNORECASE)
ANY = re.compile("")
STATES = re.compile(r"\d|\\|\$|^\(?[A-Z]\)?$")
FINAL = re.compile(r"\bfinal\b", re.IGNORECASE)
NO_STATEMENT = re.compile(
    r"(?:in)?correct\b|reasonable\b|right\b|valid\b|wrong\b|not\b|as follows\b|clear\b|given\b|below\b|obvious\b",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(
    r"\n|(?<=[^.\s])[.?](?=\s|$)|(?<=[^.\s\d)}\]])!(?=\s|$)|,? (?:because|since|as shown|so that)\b"
)


@dataclass(frozen=True)
class Stated:
    """The part of a completion that is judged, and whether the completion marked it as its answer."""

    text: str
    marked: bool


def stated(completion: str, extract: str = "whole") -> Stated:
    r"""The answer that a completion states. `extract="last_number"` takes the last number of it.

    >>> stated("<think>6?</think> so <answer> 7 </answer>").text, stated(r"Thus $x = \boxed{\frac{1}{2}}$.").text
    ('7', '\\frac{1}{2}')
    >>> stated("2 + 2 = 4.", "last_number").text, stated("#### 18").text, stated("The answer is Paris.").text
    ('4', '18', 'Paris')
    """
    text, tagged = tagged_answer(completion)
    text = text[-TAIL:]
    if extract == "last_number":
        return Stated(last_number(text[-LONGEST:]) or text[-LONGEST:], True)
    for find in (_boxed, _after_hashes, _after_phrase):
        if found := find(text):
            return Stated(undelimited(found[:LONGEST]), True)
    return Stated(text[-LONGEST:], tagged and "\n" not in text)


def tagged_answer(completion: str) -> tuple[str, bool]:
    """All after thinking or, if there is one, the last thing in answer tags; and whether it was in tags."""
    text = END_TOKEN.sub("", _without_thought(completion))
    tagged = [found for found in ANSWER.findall(text) if found.strip()]
    return (tagged[-1] if tagged else ANSWER_TAG.sub("", text)).strip(), bool(tagged)


def _without_thought(text: str) -> str:
    tags = list(THOUGHT.finditer(text))
    if not tags:
        return text
    last = tags[-1]
    if last[1]:
        return text[last.end() :]
    closed = [tag for tag in tags if tag[1]]
    return text[closed[-1].end() : last.start()] if closed else text[: last.start()]


def _boxed(text: str) -> str:
    """The contents of the last box, with those of boxes that only `and`, `or` or a comma keep apart from it.

    A "final answer" that is stated later counts instead.
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return ""
    inner, end = _contents(text, boxes[-1])
    if STATES.search(_after_phrase(text[end:], FINAL)):
        return ""
    contents, start = [inner], boxes[-1].start()
    for box in reversed(boxes[-MOST_BOXES:-1]):
        inner, end = _contents(text, box)
        if end > start:  # around the one before
            continue
        between = text[end:start]
        if len(between) > FARTHEST or not BETWEEN_BOXES.fullmatch(plain(between)):
            break
        start = box.start()
        if plain(inner) not in map(plain, contents):
            contents = [inner, *contents]
    return ", ".join(contents)


def _contents(text: str, box: re.Match[str]) -> tuple[str, int]:
    if box[1]:
        return box[1].rstrip("$."), box.end()
    inner, end = braced(text, box.end())
    return inner.strip(), end


def _after_hashes(text: str) -> str:
    """GSM8K's mark; headings of Markdown look like it."""
    for line in reversed(text.splitlines()):
        found = line.strip()
        if found.startswith("####") and not HEADING.match(content := found.lstrip("#").strip()):
            return content
    return ""


def _after_phrase(text: str, which: re.Pattern[str] = ANY) -> str:
    """What follows the last "the answer is" or "Answer:", up to the end of its sentence."""
    for match in reversed(
        [match for match in PHRASE.finditer(text) if which.search(match[0]) and not DENIED.search(match[0])]
    ):
        rest = re.sub(r"[ \t]+", " ", text[match.end() : match.end() + LONGEST]).strip()
        found = SENTENCE_END.split(rest, maxsplit=1)[0].strip()
        if found and not NO_STATEMENT.match(found):
            return found.rstrip("!")
    return ""
