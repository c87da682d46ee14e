"""The confidence that a completion states in words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)\s*(%?)", flags=re.ASCII)


def stated_confidence(text: str) -> float | None:
    """The number in the last `<confidence>...</confidence>` of a completion, or None if none can be read.

    Read are a decimal in [0, 1] and a percentage with its sign: `0.8` and `80%` are 0.8. Everything else is None, never a
    guess: no closed tag; words, fractions, signs or nothing inside; a value out of range, which is not clipped. `80` is out
    of range, for if it were a percentage, `1` could be either. The last closed tag counts even if only an earlier one can
    be read, as in the code of arXiv 2507.16806 (which reads no percentages).

    >>> stated_confidence("<confidence>0.3</confidence> No: <confidence> 80 % </confidence>")
    0.8
    >>> stated_confidence("<confidence>80</confidence>") is None
    True
    """
    before, closed, _ = text.rpartition("</confidence>")
    _, opened, inside = before.rpartition("<confidence>")
    found = NUMBER.fullmatch(inside.strip()) if closed and opened else None
    if found is None:
        return None
    value = float(found[1]) / (100 if found[2] else 1)
    return value if value <= 1 else None


def stated_confidences(texts: Iterable[str]) -> Tensor:
    """`stated_confidence` of every completion, (B,) float32 on the CPU, NaN where none can be read.

    The rewards pass that NaN on unless their paper says what it is worth, and `group_advantages` refuses it. Count them
    with `torch.isnan`.

    Raises:
        TypeError: texts is a single str.

    >>> stated_confidences(["<confidence>1</confidence>", "quite sure"])
    tensor([1., nan])
    """
    if isinstance(texts, str):
        raise TypeError("texts must be several completions, got one str: give [text], or call stated_confidence(text)")
    found = [stated_confidence(text) for text in texts]
    return torch.tensor([math.nan if value is None else value for value in found], dtype=torch.float32)
