"""What is right and what is wrong: references of each kind beside what models write."""

import doctest
import importlib
import pkgutil
import time

import pytest
import rlvr_trainer.judging
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvr_trainer.judging.compare import check, compare
from rlvr_trainer.judging.numbers import last_number
from rlvr_trainer.judging.stated import stated
from rlvr_trainer.judging.verdict import BAD_REFERENCE, NO_ANSWER, UNEVALUATED
from rlvr_trainer.judging.workers import Workers, answers

MATRIX = r"\begin{pmatrix}1\\ 2\end{pmatrix}"
RIGHT = {
    "currencies": [
        (r"\$18.90", "18.90"), (r"\$18.90", r"\boxed{\$18.90}"), (r"\$18.90", "so it costs $18.90."), ("$5", "5 dollars"),
        ("£5", "£5.00"), ("£5", "It costs 5 pounds."), ("¥500", "500 yen"), ("5 euros", "€5"), ("$1,234.50", "1234.5"),
        ("-$5", "$-5"), ("18.9", "USD 18.90"), ("3", "$3"),
    ],
    "units": [
        ("20 $cm^{2}$", "20"), ("20 $cm^{2}$", "20 square centimeters"), ("20 cm²", r"20\text{ cm}^2"), ("5 km/h", "5"),
        ("60", "60°"), (r"60^\circ", "60 degrees"), ("3 hours", r"3 \text{ hours}"), ("12", "12 cm^2"), ("5 apples", "5"),
        ("7 m", "7 meters"), ("7", "The answer is 7 apples because 3+4=7."),
    ],
    "percent": [(r"50\%", "50"), (r"50\%", "0.5"), ("50", "50%"), ("0.5", r"50\%"), ("12.5%", "12.5 percent")],
    "numbers": [
        ("5e3", "5000"), ("0.00001", "0.00001"), ("1e16", "10000000000000000"), ("1.2e3", r"1.2 \times 10^{3}"),
        ("10080", "$10{,}080$"),
        ("10080", r"\boxed{10,\! 080}"), ("1,234", "1234"), ("3/4", "0.75"), ("0.75", r"\frac{3}{4}"),
        ("1.5", r"1\frac{1}{2}"),
        (r"\frac{1}{3}", "0.333333"), ("1.5", "1,5"), ("0.5", ".5"), ("7", "007"), ("10000", "10 000"), ("-5", "−5"),
        ("1/2", "½"), ("2.5", "2½"), ("7", "７"), ("5", "x = 5."), ("7", "3 + 4 = 7."), ("1024", "2^{10}"),
        ("7", r"\sqrt{49}"), ("8", "The answer is 8!"), ("120", "5!"), ("5!", "120"),
    ],
    "words": [
        ("True", "true"), ("Paris", "The answer is Paris."), ("blue", "The sky is blue"), ("Yes",
        "Yes, because 7 is prime."),
        (r"\text{even}", "Even"), ("even", r"\boxed{\text{even}}"), ("June 20", "june 20"), ("the cat", "cat"),
        ("São Paulo", "são paulo"),
        ("red, blue", "Red, blue"), ("2:30 pm", "2:30 PM"), ("2024-01-05", "2024-01-05"), ("well-known", "well known"),
    ],
    "choices": [
        ("C", "The answer is (C)."), ("C", "C) 12"), ("C", r"\boxed{C}"), ("C", "I think it's C."), (r"\text{(C)}", "C"),
        ("(C)", "c"), ("C", "C. Paris"), ("B, C", "C and B"), ("C", "Option C"), ("C", "**C**"),
    ],
    "lists and tuples": [
        ("(1,2)", "(1, 2)"), ("-2,1", r"\boxed{x=1 \text{ or } x=-2}"), (r"\{1,2\}", "2, 1"), ("[1,2)", "[1,2)"),
        ("1, 2", "1 and 2"),
        ("1, 2", r"\boxed{2} and \boxed{1}"), (r"(3, \frac{\pi}{2})", r"$\left( 3, \frac{\pi}{2} \right)$"),
        ("(0.5, 1)", r"(\frac12, 1)"),
        (r"$d=4\sqrt{10}, M=(1,-4)$", r"M = (1, -4), d = 4\sqrt{10}"), ("$1$ and $2$", r"\boxed{1,2}"),
    ],
    "mathematics": [
        (r"\sqrt{2}", "The answer:\n\\sqrt{2}"), (r"\sqrt{2}", "The answer: \n√2"), ("sqrt(2)", r"\sqrt{2}"),
        ("x^2-1", "$(x-1)(x+1)$"),
        ("x^{2}", "x²"), ("2*x**2", "2x^2"), (r"2\sqrt{3}", r"\sqrt{12}"), (r"\pi", "π"), (r"x \ge 3", r"$x\geq 3$"),
        (r"x \ge 3", r"[3,\infty)"), ("y = 2x + 3", "y=2x+3"), ("x=5", "5"), ("1+2i", "2i+1"),
        (MATRIX, rf"\boxed{{{MATRIX}}}"),
        (r"(-\infty,3)\cup(5,\infty)", r"$(-\infty, 3) \cup (5, \infty)$"),
        ("$x >= 5$", r"Therefore $x \geq 5$ is the solution."),
        (r"-\frac{1}{2}", r"$-\dfrac12$"), ("$x < 3$", r"We find that $x \lt 3$."),
    ],
    "tags and marks": [
        ("8", "<think>use <answer>7</answer></think>8"), ("8", "<answer>8"), ("8", "<Answer>8</Answer>"), ("7", r"\boxed{7"),
        ("7", "**7**"), ("7", "Answer: **7**"), ("7", "**Final Answer**\n\n7"), ("18", "and so on\n#### 18"),
        ("7", "thinking</think> 7"),
        ("7", "<think>8</think>\n\nThe result is 7"), ("7", "<answer>1</answer> no, <answer>7</answer>"), ("7", r"\fbox{7}"),
        ("12", r"$d = \frac{90}{n}$, so there are 12 of them."), ("7", r"\boxed{6}. Final answer: 7"),
    ],
}  # fmt: skip
WRONG = {
    "units": [("20 $cm^{2}$", "cm^2"), ("5 cm", "5 m"), ("$5", "£5"), ("2", "2x"), ("0.5", "0.5x")],
    "numbers": [
        ("7", "5, 6, 7"), ("7", "it is 5 or 6 or 7"), ("7", "-7"), ("10000001", "10000000"), (r"\frac{1}{3}", "0.33"),
        ("0", "0.0000001"),
        ("1e-7", "0"), ("7", r"\boxed{5} or \boxed{7}"), ("7", "7 or 8"), ("4", r"$4\sqrt{2}$"), ("1", "$-[0,1)$"),
        ("2", "x_2"), ("7", "seven"), ("12", "1 2"), ("8", "8 1"),
        ("2", r"\frac{1+\sqrt{5}}{2}"), ("9", "2^9"),
    ],
    "words": [
        ("listen", "silent"), ("No", "on"), ("London", "Paris or London"), ("2024-01-05", "2018"), ("2:30", "1/15"),
        ("Yes", "No. Yes"),
    ],
    "choices": [("C", "D"), ("C", "C or D"), ("A", "A cat"), ("C", "(B), not (C) or (D)"), ("B, C", "B")],
    "lists and tuples": [
        (r"$d=4\sqrt{10}, M=(1,-4)$", r"\boxed{4}"), ("(1,2)", "(2,1)"), ("(2,1)", "(5,3)"), ("[1,2)", "(1,2)"), ("1, 2",
        "1"),
        ("1, 2", "1, 2, 3"), ("1, 1", "1, 2"), ("(1,2)", "3"),
    ],
    "mathematics": [
        (r"\sqrt{2}", r"\sqrt{3}"), ("x^2+1", "x^2-1"), ("x=5", "y=5"), (r"\pi", "3.14159"),
        (r"1 - \frac{1}{e}", r"1 + \frac{1}{e}"),
    ],
    "tags and marks": [
        ("7", "<think>7"), ("7", "<answer>7</answer> <answer>8</answer>"), ("7", "8</think>"), ("2", ""), ("7", "\\boxed{}"),
    ],
}  # fmt: skip
MORE_RIGHT = {
    "scales": [("3 million", "3000000"), ("3 dozen", "36"), ("5 thousand", "5,000")],
    "signs": [("-12", "negative 12"), ("-12", "The answer is minus 12."), ("-5", "‒5"), ("7", "The answer is 7, not 8.")],
    "repeating": [
        (r"0.\overline{3}", "1/3"), (r"\frac{1}{3}", "0.333..."), ("1/3", r"0.\overline{3}"),
        (r"0.\overline{36}", r"\frac{4}{11}"),
    ],
    "quantities": [
        (r"36\pi", r"36\pi \text{ square units}"), (r"36\pi \text{ cm}^2", r"36\pi"), ("12",
        "So he needs 12 eggs for 3 cakes."),
        ("$12", "Thus he pays $12 for 3 apples."), ("12", "12 where x=3"), (r"\frac{1}{2}", r"50\%"), ("12", "(A) 12"),
    ],
    "choices": [("C", "C is correct."), ("C", "Therefore, option (C) is correct."), ("C", "So C"), ("D", "I choose D.")],
    "mathematics": [
        (r"\sqrt{2}", r"Thus the length is $\sqrt{2}$."), (r"\sqrt{2}", r"Hence $x = \sqrt{2}$ as desired."),
        ("x^2-1", "So the polynomial is $x^2-1$."), (r"\frac{\pi}{2}", "the angle is pi/2"), (r"\pm 3", "3, -3"),
        ("[1,2]", r"1 \le x \le 2"), (r"\sin x\cos y+\cos x \sin y", r"\boxed{\sin(x+y)}"), ("(1,2)", r"\langle 1,2\rangle"),
        ("1,2,3", "[1, 2, 3]"), (r"\emptyset", r"\varnothing"), (r"\infty", "infinity"), ("2:30 PM", "2:30 p.m."),
    ],
    "marks": [
        ("12", "#### Step 1: add\n5\n#### Final Answer\n12"), ("12",
        "The total is 12. I checked and the answer is correct."),
        ("12", "To answer this question, let x be 5 apples.\nSo he has 12 apples."), ("12", "```\n12\n```"),
        ("12", r"\boxed{12} is right."),
    ],
}  # fmt: skip
MORE_WRONG = {
    "denied": [
        ("7", "The answer is not 7."), ("7", "The answer can't be 7."), ("C", "The answer can't be C."),
        ("7", r"\boxed{\text{not } 7}"),
    ],
    "several": [
        ("7", "The answer is 5, not 7."), ("7", "The answer is between 5 and 7."), ("7", "5 to 7"), ("7", "at least 7"),
        ("7", "7 or eight"),
        ("7", r"\boxed{6 \text{ maybe } 7}"), ("7", r"\boxed{x=5 \text{ or } x=7}"),
        ("7", r"\boxed{5 \text{ apples and } 7 \text{ pears}}"),
        ("A", "A, B, C, D"), ("A", "A: B"), ("B", "B: no, it's C"), ("C", r"\boxed{C, D}"), ("Yes", "Yes, no"),
        (r"\sqrt{2}", r"either $\sqrt{3}$ or $\sqrt{2}$"),
    ],
    "operations": [
        ("2", "The answer is 14 divided by 2."), ("49", "the square root of 49"), ("2", "2^3 apples"), ("2",
        "2**3 apples"), ("5", "5x10 ft"),
        ("6", "6 squared"), ("6", "6 plus eight"), ("2", "2 thirds"),
    ],
    "units": [
        ("5", "5m"), ("5", "5n"), ("$2h$", r"\boxed{2}"), ("$4s$", "$4h$"), ("6", r"$6\,ab$"), ("20 $cm^{2}$", "20 cm"),
        ("20 cm^2", "20 m^2"),
        ("5 m/s", "5 km/h"), (r"30^\circ", r"30 \text{ radians}"), ("5 million", "5"), ("5", "5 million"),
    ],
    "signs, factorials, bases": [
        ("12", "negative 12"), ("-12", "12"), ("5", r"\boxed{5!}"), ("$5!$", "5"), ("43", "43_7"), ("101_2", "101"),
        ("5", "5_2"),
    ],
}  # fmt: skip
REAL_RIGHT = {
    "bold": [
        ("3", "The total is **3**."), ("3", "So x = **3**."), ("70000", "Josh made a profit of **$70,000**."), ("18",
        "9 × 2 = **$18**"),
        ("45", "He is **45 miles** from home after 4 hours."), ("3", "So, in total, it takes 2 + 1 = **3 bolts**."),
        ("3", "__3__"),
    ],
    "boxes": [
        ("721", "\\boxed{721}\n\n\\boxed{721}"), ("721", r"\boxed{\boxed{721}}"), ("90", r"\boxed{90\,}"),
        ("90", r"\boxed{\,90\;}"),
        ("90", r"\boxed{\underline{90}}"), ("90", r"\boxed{\color{red}{90}}"), ("7",
        "\\boxed{7}\n\nThe final answer is the number of apples."),
    ],
    "rounded": [(r"\frac{7}{12}", r"\boxed{\frac{7}{12} \approx 0.583}"),
    (r"3\sqrt{13}", r"The distance is $d = 3\sqrt{13} \approx 10.8$.")],
    "money": [("18", r"Thus the final answer is $\$18$."), ("70000", r"\boxed{\text{\$}70000}")],
    "tokens": [("34", "Answer: 34<|im_end|>"), ("34", "The answer is 34</s>")],
    "asides": [
        ("16", "There are 16 bugs left after 3 days."), ("16", "He spent $16 on 4 books."), ("16",
        "He read 16 pages in 2 days."),
        ("45", "John is 45 miles from home at the end of the 4 hours."), ("90", "90 minutes (1.5 hours)"),
    ],
    "lists": [("3, 5, 7", "The solutions are $x = 3$, $x=5$, and $x=7$."), ("2516_8", r"\boxed{2516_{8}}")],
}  # fmt: skip
REAL_WRONG = {
    "factorials": [("n!", r"\boxed{n}"), ("2^n n!", "2^n n"), ("x", "x!")],
    "not worked out": [
        ("7", r"\boxed{\frac{3}{1}+4}"), ("12", r"\frac{3\cdot 8}{2}"), ("7", "x+7-x"), ("7", "3!+1"), ("7", "|3|+4"),
        ("7", "3 - -4"),
        ("12", r"\sum_{k=1}^{12} 1"), ("12", r"\int_0^{12} 1 dx"), ("7", r"\max(1,2,3,4,5,6,7)"), ("12", "4!/2"),
    ],
    "labels": [("x+y=5", "5"), (r"\triangle ABC", r"\triangle XYZ"), ("f'(x)", "f(x)"), (r"3 \mod 7", "3")],
    "choices": [("C", "A or C"), ("B", "Both A and B"), ("C", "C, d"), ("C", "(c) (d)"), ("C", "C. or d)")],
    "part of more": [
        ("12", "The answer is twice 12."), ("12", "half of 12"), ("12", "a multiple of 12"),
        ("12", r"\boxed{12 factorial}"), ("12", "12 and a half"),
        ("12", "12 hundredths"), ("12", "unlikely to be 12"),
    ],
}  # fmt: skip
ONE_GUESS = [
    "$A$\nB: C", "A: B", "Yes: No", "No, the result is Yes", "True, it is False", "$5$\n7", "<answer>$5$\n7</answer>",
    r"$\sqrt{2}$ is \sqrt{3}", "$x$ is y+1", "Paris: London", r"\boxed{$5$ 8 = 7}",
]  # fmt: skip
REFERENCES = [
    "A",
    "B",
    "C",
    "Yes",
    "No",
    "True",
    "False",
    "5",
    "7",
    "8",
    r"\sqrt{2}",
    r"\sqrt{3}",
    "x",
    "y+1",
    "Paris",
    "London",
]


@pytest.fixture(scope="module")
def workers():
    made = Workers(1)
    yield made
    made.close()


def rows(table):
    return [pytest.param(*pair, id=f"{kind}-{i}") for kind, pairs in table.items() for i, pair in enumerate(pairs)]


@pytest.mark.parametrize(("reference", "completion"), rows(RIGHT) + rows(MORE_RIGHT) + rows(REAL_RIGHT))
def test_an_equal_answer_is_right(reference, completion):
    verdict = compare([reference], completion)
    assert (verdict.score, verdict.reason) == (1.0, "right"), verdict


@pytest.mark.parametrize(("reference", "completion"), rows(WRONG) + rows(MORE_WRONG) + rows(REAL_WRONG))
def test_another_answer_is_wrong(reference, completion):
    verdict = compare([reference], completion)
    assert verdict.score == 0.0, verdict


@pytest.mark.parametrize("completion", ONE_GUESS)
def test_a_completion_is_right_for_one_reference_at_most(completion):
    assert sum(compare([reference], completion).score == 1.0 for reference in REFERENCES) <= 1


def test_a_worker_says_the_same(workers):
    pairs = [(*pair, 1.0) for table in (RIGHT, MORE_RIGHT, REAL_RIGHT) for kind in table.values() for pair in kind]
    pairs += [(*pair, 0.0) for table in (WRONG, MORE_WRONG, REAL_WRONG) for kind in table.values() for pair in kind]
    found = workers(answers([([reference], completion) for reference, completion, _ in pairs]))
    wrong = [(*pair, verdict) for pair, verdict in zip(pairs, found, strict=True) if verdict.score != pair[2]]
    assert wrong == []


@pytest.mark.parametrize("reference", sorted({reference for pairs in RIGHT.values() for reference, _ in pairs}))
def test_a_reference_is_right_as_an_answer_to_itself_and_in_a_box(reference):
    assert compare([reference], reference).score == 1.0
    assert compare([reference], rf"Therefore $\boxed{{{reference.strip('$')}}}$.").score == 1.0
    assert check(reference).score == 1.0


@pytest.mark.parametrize(
    ("answer", "accepted"), [("3+4", 1), ("3 + 4", 1), ("10-3", 1), (r"\frac{14}{2}", 1), ("14/2", 1)]
)
def test_a_sum_that_is_not_worked_out_is_right_by_an_option(answer, accepted):
    assert compare(["7"], answer).reason == UNEVALUATED
    assert compare(["7"], answer, accept_unevaluated=True).score == accepted


def test_a_fraction_is_worked_out_where_the_answer_is_one():
    assert compare([r"\frac{1}{2}"], "2/4").score == 1.0


def test_any_of_several_references_is_right():
    assert compare(["color", "colour"], "Colour").read_reference == "colour"
    assert compare(["1", "2"], "3").score == 0.0
    assert compare(["", "2"], "2").score == 1.0


@pytest.mark.parametrize(
    "reference", ["", "  ", "$$", "?", "+", r"\frac{", "9" * 5000, r"0.\overline{" + "3" * 5000 + "}"]
)
def test_a_reference_that_cannot_be_read_is_nobodys_wrong_answer(reference):
    verdict = compare([reference], "2")
    assert (verdict.score, verdict.reason) == (None, BAD_REFERENCE)
    assert check(reference).score is None


@pytest.mark.parametrize("reference", [r"\frac{1}{0}", "The answer is 5"])
def test_a_reference_that_is_not_equal_to_itself_is_found_when_it_is_checked(reference):
    assert check(reference).reason == BAD_REFERENCE
    assert compare([reference], "2").score == 0.0


@pytest.mark.parametrize("completion", ["", "   ", "<think>so", "<answer></answer>", "\n"])
def test_a_completion_that_states_nothing_says_so(completion):
    assert compare(["2"], completion).reason == NO_ANSWER


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("−5", "-5"), ("3/4", "3/4"), (r"\frac{3}{4}", "3/4"), (".5", ".5"), ("1e5", "1e5"), ("12 cm^2", "12"),
        ("10{,}080", "10080"),
        ("pages 3-5", "5"), ("minus -3", "-3"), ("3 - 5", "5"), ("= -5", "-5"), ("about 1,234.5, I think", "1234.5"),
        ("3 + 4 = 7.", "7"),
        ("in 1999–2004", "2004"), ("(−5)", "-5"), ("-$5", "-5"), ("50%", "50"), ("1.", "1"), (r"$\dfrac12$", "1/2"),
        ("x_1 = 3", "3"),
        ("x^2", ""), ("H2O", ""), ("none", ""), (r"\sqrt{2}", ""), ("５", "5"), ("½", "1/2"),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("completion", "extract", "answer"),
    [
        (" 7 ", "whole", "7"),
        ("<answer>1</answer> no, <answer>\n2\n</answer>", "whole", "2"),
        ("none", "last_number", "none"),
        ("<answer>so 5</answer> 6", "last_number", "5"),
        ("<think>9</think> 3 + 4 = 7.", "last_number", "7"),
        ("The answer to 3+4 is 7.", "whole", "7"),
        ("The answer is not obvious. Answer: 7", "whole", "7"),
        (r"$\boxed{\frac{1}{2}}$ and more", "whole", r"\frac{1}{2}"),
    ],
)
def test_what_is_judged_of_a_completion(completion, extract, answer):
    assert stated(completion, extract).text == answer


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "The answer is {}.", "\\boxed{{{}}}", "= {}", "<answer>{}</answer>", "#### {}"]),
)
def test_an_integer_is_read_back_from_every_form(number, form):
    for written in (f"{number}", f"{number:,}", f"${number}$", f"{number}.0"):
        assert compare([str(number)], form.format(written)).score == 1.0
    assert compare([str(number)], form.format(number + 1)).score == 0.0


@settings(deadline=None)
@given(st.text(max_size=200))
def test_no_text_breaks_the_judge(text):
    assert compare(["7"], text).score in (0.0, 1.0)
    assert compare(["x+1"], text).score in (0.0, 1.0)
    assert compare(["Paris"], text).score in (0.0, 1.0)
    assert check(text).score in (1.0, None)


STALLS = {
    "boxes": "\\boxed{", "texts": "\\text{", "groups": "111,", "a list": "100, ", "signs": "-1 ", "threes": "3",
    "newlines": "\n", "spaces": " ",
    "brackets": "\\(", "square brackets": "\\[ab", "stars": "*", "quotes": "'", "commas": ",", "answers": "answer: ",
    "dollars": "$", "braces": "{",
    "parentheses": "(", "tags": "<answer>", "thoughts": "<think>", "is": "it is ", "fractions": "\\frac", "roots": "√(",
    "equations": "= 1, 2 ",
    "sentences": "the number is 12 and so 7. ", "words": "a ", "slashes": "7 m/ ",
}  # fmt: skip


@pytest.mark.parametrize("unit", STALLS.values(), ids=STALLS)
@pytest.mark.parametrize(
    "form", ["{}", "7 {}x", "\\boxed{{-{}x}}", "The answer is 0.{}x", "\\boxed{{7}}{}x\\boxed{{7}}"]
)
def test_no_repetition_takes_long(unit, form):
    text = form.format(unit * (64_000 // len(unit)))
    for reference in ("7", "x+1", "Paris"):
        start = time.process_time()
        compare([reference], text)
        assert time.process_time() - start < 4.0  # a second here; what is quadratic takes minutes


def test_every_example_in_the_docstrings_is_as_it_says():
    for module in pkgutil.iter_modules(rlvr_trainer.judging.__path__, "rlvr_trainer.judging."):
        assert doctest.testmod(importlib.import_module(module.name)).failed == 0, module.name
