r"""What a completion states as its answer.

Thinking is no answer: all before the last `</think>` is left out, and so is a thought that never ends. Of the rest the last of
these counts, in this order: `<answer>...</answer>`, `\boxed{...}`, `#### ...`, "the answer is ..." or "Answer: ...". What has none
of them is judged whole. A tag or brace that never closes goes on to the end, as in a completion that was cut off.
"""

import re
from dataclasses import dataclass

from rlvr_trainer.judging.numbers import last_number
from rlvr_trainer.judging.plain import braced, plain, undelimited

THOUGHT = re.compile(r"<\s*(/?)\s*(?:think|thinking|thought|reasoning)\s*>", re.IGNORECASE)
ANSWER = re.compile(r"<\s*answer\s*>(.*?)(?=<\s*/?\s*answer\s*>|$)", re.IGNORECASE | re.DOTALL)
EMPTY = re.compile(r"<\s*/?\s*answer\s*>", re.IGNORECASE)
PHRASE = re.compile(
    r"\banswer\b(?:\s*\([^()\n]*\))?(?:[^\n.:=]{0,60}?(?:\bis\b|\bbe\b|\bequals\b|[:=])|[\s*_#]*\n)[\s*_:]*",
    re.IGNORECASE,
)
BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)|\\boxed\s+(\S+)")
BETWEEN_BOXES = re.compile(r"[\s$.,;&\\()\[\]]*(?:\b(?:and|or)\b)?[\s$.,;&\\()\[\]]*")
FINAL = re.compile(r"\bfinal\s+$", re.IGNORECASE)
SENTENCE_END = re.compile(r"\n|(?<=[^.\s])[.!?](?=\s|$)|,?\s+(?:because|since|as shown|so that)\b")


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
    if extract == "last_number":
        return Stated(last_number(text) or text, True)
    for find in (_boxed, _after_hashes, _after_phrase):
        if found := find(text):
            return Stated(undelimited(found), True)
    return Stated(text, tagged)


def tagged_answer(completion: str) -> tuple[str, bool]:
    """All after thinking or, if there is one, the last thing in answer tags; and whether it was in tags."""
    text = _without_thought(completion)
    tagged = [found for found in ANSWER.findall(text) if found.strip()]
    return (tagged[-1] if tagged else EMPTY.sub("", text)).strip(), bool(tagged)


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
    contents: list[str] = []
    end = 0
    for match in BOX.finditer(text):
        inner, stop = (match[1].rstrip("$."), match.end()) if match[1] else braced(text, match.end())
        if contents and not BETWEEN_BOXES.fullmatch(plain(text[end : match.start()])):
            contents = []
        contents.append(inner.strip())
        end = stop
    later = [match for match in PHRASE.finditer(text, end) if FINAL.search(text[: match.start()])]
    return "" if later else ", ".join(contents)


def _after_hashes(text: str) -> str:
    found = re.findall(r"^\s*####\s*(.+)$", text, flags=re.MULTILINE)
    return found[-1] if found else ""


def _after_phrase(text: str) -> str:
    """What follows the last "answer is" or "answer:", up to the end of its sentence."""
    places = [match.end() for match in PHRASE.finditer(text)]
    for place in reversed(places):
        rest = text[place:].lstrip()
        if found := SENTENCE_END.split(rest, maxsplit=1)[0].strip():
            return found
    return ""
