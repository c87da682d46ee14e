"""The page on judging, held against what the judge and math-verify say."""

import re
from pathlib import Path

import pytest
from math_verify import parse, verify
from rlvr_trainer.judging.compare import compare
from rlvr_trainer.judging.verdict import COUNTED

PAGE = (Path(__file__).parents[2] / "docs" / "judging.md").read_text()
FAULTS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (right|wrong) \| (right|wrong) \|$", PAGE, flags=re.MULTILINE)


def alone(reference, completion):
    boxed = reference if "$" in reference else rf"\boxed{{{reference}}}"
    read = [parse(text, parsing_timeout=None) for text in (boxed, completion)]
    return verify(*read, timeout_seconds=None)


@pytest.mark.parametrize(("reference", "completion", "theirs", "ours"), FAULTS)
def test_math_verify_alone_and_the_judge_say_what_the_page_says(reference, completion, theirs, ours):
    assert theirs != ours
    assert alone(reference, completion) == (theirs == "right")
    assert compare([reference], completion).reason == ours


def test_the_page_names_every_reason():
    assert len(FAULTS) == 21
    assert all(f"`{reason}`" in PAGE for reason in ("right", "wrong", "partly right", *COUNTED))


def test_every_answer_in_the_table_of_kinds_is_equal_to_its_reference():
    table = PAGE.split("## What is equal")[1].split("\n\n")[1]
    choice = re.search(r"\| `C`, `\(C\)` \| a choice \| (.*) \|", table)[1]
    assert all(compare(["C"], answer).score == 1.0 for answer in re.findall(r"`(.*?)`", choice))
    assert all(compare([reference], "50%").score == 1.0 for reference in ("50%", "50", "0.5"))
