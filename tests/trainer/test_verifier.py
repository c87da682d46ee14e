"""math-verify in its processes: equivalent forms are right, failures are None, and the pool outlives both."""

import pytest
from rlvr_trainer.verifier import MathVerifier, judge


@pytest.fixture(scope="module")
def verifier():
    made = MathVerifier(processes=1, timeout=30.0)
    yield made
    made.close()


def test_equivalent_forms_are_right_and_unreadable_references_are_errors(verifier):
    pairs = [
        ("\\frac{1}{2}", "so the answer is $0.5$"),
        ("7", "\\boxed{8}"),
        ("2", ""),
        ("", "2"),
        ("x^2-1", "$(x-1)(x+1)$"),
    ]
    assert verifier(pairs) == [1.0, 0.0, 0.0, None, 1.0]


def test_an_answer_out_of_time_is_none_and_the_next_ones_are_still_judged(verifier, monkeypatch):
    seconds = iter([0.0, 30.0, 30.0])
    monkeypatch.setattr(MathVerifier, "timeout", property(lambda _: next(seconds), lambda *_: None), raising=False)
    assert verifier([("3", "\\boxed{3}"), ("4", "\\boxed{4}")]) == [None, 1.0]


def test_no_pairs_start_no_process():
    idle = MathVerifier()
    assert idle([]) == []
    assert idle._pool is None


def test_a_reference_nobody_can_read_raises_in_the_worker():
    with pytest.raises(ValueError, match="cannot read the reference answer ''"):
        judge("", "2")


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (r"\sqrt{2}", r"\sqrt{2}", r"\sqrt{3}"),
        ("(1,2)", "(1, 2)", "(2,1)"),
        ("x^2+1", "1+x^2", "x^2-1"),
        ("A", "A", "B"),
        ("Paris", "Paris", "London"),
        ("7", "the answer is 7.", "the answer is 8."),
    ],
)
def test_bare_answers_are_read_like_boxed_ones(answer, right, wrong):
    assert judge(answer, right) == 1.0
    assert judge(answer, wrong) == 0.0
