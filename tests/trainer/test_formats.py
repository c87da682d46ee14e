"""Public shapes by name: where prompt and answer stand in a row of each, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvr_trainer.config import TaskConfig
from rlvr_trainer.files import read_problems
from rlvr_trainer.formats import FORMATS
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.solutions import last_box

USER = {"role": "user", "content": "1+1"}
SYSTEM = {"role": "system", "content": "Add."}
REPLY = {"role": "assistant", "content": "It is 2."}

PUBLIC = {
    "prompt_answer": {"prompt": "1+1", "answer": "2"},
    "gsm8k": {"question": "1+1", "answer": "One and one are <<1+1=2>>2.\n#### 2"},
    "math": {"problem": "1+1", "level": "Level 1", "type": "Algebra", "solution": r"So $\boxed{1}$, no, $\boxed{2}$."},
    "open_r1": {
        "problem": "1+1",
        "solution": r"\boxed{3}",
        "answer": "2",
        "uuid": "x",
        "messages": [USER, REPLY],
    },
    "dapo": {
        "data_source": "math_dapo",
        "prompt": [USER],
        "ability": "MATH",
        "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "0"},
    },
    "messages": {"messages": [USER], "answer": 2},
}


def read(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_problems(TaskConfig(name=str(path), **settings))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("asked", ["by name", "auto"])
def test_every_public_shape_is_read_by_its_name_and_recognised_without(tmp_path, name, asked):
    (problem,) = read(tmp_path, PUBLIC[name], format=name if asked == "by name" else "auto")
    assert (problem.prompt, problem.answers, problem.answer) == ("1+1", ("2",), "2")
    assert problem.where == "rows.jsonl, line 1"
    assert problem.entry.keys() == PUBLIC[name].keys()


def test_messages_keep_their_roles_and_the_reply_is_the_answer_where_no_column_is(tmp_path):
    (problem,) = read(tmp_path, {"messages": [SYSTEM, USER, REPLY]}, instruction=" Think.")
    assert problem.prompt == (("system", "Add."), ("user", "1+1 Think."))
    assert problem.answers == ("It is 2.",)
    assert problem.text == "Add.\n\n1+1 Think."
    hash(problem)


def test_a_reply_is_no_part_of_the_prompt_where_the_answer_has_a_column(tmp_path):
    (problem,) = read(tmp_path, {"messages": [USER, REPLY], "answer": "2"})
    assert (problem.prompt, problem.answers) == ("1+1", ("2",))


def test_several_right_answers_are_a_list(tmp_path):
    rows = [
        {"prompt": "1/2", "answer": ["0.5", r"\frac{1}{2}", "0.5"]},
        {"prompt": "1/4", "answer": [0.25, "a quarter"]},
    ]
    first, second = read(tmp_path, *rows)
    assert first.answers == ("0.5", r"\frac{1}{2}")
    assert second.answers == ("0.25", "a quarter")
    (problem,) = read(tmp_path, {**PUBLIC["dapo"], "reward_model": {"ground_truth": ["2", "two"]}})
    assert problem.answers == ("2", "two")


@pytest.mark.parametrize(
    "written",
    ["0.00001", "1e16", "-0", "1E400", "12345678901234567890.10", "1" * 5000, "true", "false"],
)
def test_a_number_or_truth_value_is_kept_as_it_is_written(tmp_path, written):
    (problem,) = read(tmp_path, f'{{"prompt": "x", "answer": {written}}}')
    assert problem.answer == written


@given(st.integers() | st.decimals(allow_nan=False, allow_infinity=False).map(lambda d: f"{d:f}"))
def test_any_number_is_kept_as_it_is_written(tmp_path_factory, number):
    folder = tmp_path_factory.getbasetemp()
    assert read(folder, f'{{"prompt": "x", "answer": {number}}}')[0].answer == str(number)


balanced = st.recursive(
    st.text("ab ^", max_size=3) | st.sampled_from([r"\{", r"\}"]),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
    max_leaves=8,
)


@given(balanced, st.text("ab$\\ ", max_size=5))
def test_the_last_box_is_read_to_its_own_brace(inside, around):
    assert last_box(r"\boxed{0} \boxed{" + inside + "} " + around) == inside.strip()


def test_a_box_that_never_closes_is_passed_over():
    assert last_box(r"\boxed{1} and \boxed{2") == "1"
    assert last_box(r"\boxed {\left\{1\right.}") == r"\left\{1\right."


def test_columns_rename_the_formats_own(tmp_path):
    row = {"q": "1+1", "meta": {"final": "#### 2"}, "a.b": "3"}
    (plain,) = read(tmp_path, row, columns={"prompt": "q", "answer": "meta.final"})
    assert (plain.prompt, plain.answer) == ("1+1", "#### 2")
    (read_out,) = read(tmp_path, row, format="gsm8k", columns={"prompt": "q", "answer": "meta.final"})
    assert read_out.answer == "2"
    (dotted,) = read(tmp_path, row, columns={"prompt": "q", "answer": "a.b"})
    assert dotted.answer == "3"


def test_an_unknown_shape_is_refused_with_its_columns_and_the_known_formats(tmp_path):
    message = r"rows\.jsonl, line 1: the columns 'text', 'label' are no known format's.*gsm8k \(question, answer\)"
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, {"text": "1+1", "label": "2"})


def test_a_shape_that_is_two_formats_at_once_is_refused(tmp_path):
    row = {**PUBLIC["prompt_answer"], "question": "1+2"}
    with pytest.raises(
        ConfigError, match="'prompt', 'answer', 'question' are those of prompt_answer and gsm8k at once"
    ):
        read(tmp_path, row)
    (problem,) = read(tmp_path, row, format="prompt_answer")
    assert problem.prompt == "1+1"


def test_a_column_that_is_null_is_none_of_a_shape(tmp_path):
    with pytest.raises(ConfigError, match=r"line 1: the columns 'prompt' \(null\), 'answer' are no known format's"):
        read(tmp_path, {"prompt": None, "answer": "2"})
    (problem,) = read(tmp_path, {**PUBLIC["math"], "answer": None})
    assert problem.answer == "2"


def test_an_empty_system_message_is_one(tmp_path):
    (problem,) = read(tmp_path, {"messages": [{"role": "system", "content": ""}, USER], "answer": "2"})
    assert problem.prompt == (("system", ""), ("user", "1+1"))
    assert problem.text == "1+1"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "q"}, r"unknown key task\.columns\.promt: did you mean 'prompt'\?"),
        ({"prompt": 3}, r"task\.columns\.prompt must be the name of a column, got 3"),
        ({"prompt": "q"}, r"line 1: no 'q', only 'prompt', 'answer'"),
    ],
)
def test_wrong_columns_are_named(tmp_path, columns, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, PUBLIC["prompt_answer"], columns=columns)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gsm8k", {"answer": "It is 2."}, "no '####' before the answer"),
        ("gsm8k", {"answer": "It is ####  "}, "'answer' must be text that is not empty"),
        ("math", {"solution": r"It is \boxed{2"}, r"no \\boxed\{\} with balanced braces"),
        ("open_r1", {"answer": None}, "'answer' must be text that is not empty, got null"),
        ("open_r1", {"answer": {"value": 2}}, "'answer' must be text"),
        ("prompt_answer", {"prompt": None}, "'prompt' must be text that is not empty, got null"),
        ("prompt_answer", {"answer": []}, "'answer' is an empty list"),
        ("prompt_answer", {"answer": ["2", None]}, "'answer' must be text that is not empty, got null"),
        ("prompt_answer", {"prompt": "a\0b"}, "'prompt' holds NUL at character 2"),
        ("prompt_answer", {"answer": "2\0"}, "'answer' holds NUL at character 2"),
        ("prompt_answer", {"prompt": "ab\ud800"}, r"'prompt' holds a lone surrogate, \\ud800, at character 3"),
        ("prompt_answer", {"answer": "\udfff"}, r"'answer' holds a lone surrogate, \\udfff, at character 1"),
        ("dapo", {"reward_model": {"style": "rule"}}, r"no 'reward_model\.ground_truth', only 'data_source'"),
        ("dapo", {"prompt": [SYSTEM]}, "'prompt' must end with a user's message"),
        ("dapo", {"prompt": []}, "'prompt' must end with a user's message"),
        ("dapo", {"prompt": [{"role": "human", "content": "x"}]}, "with a role of system, user, assistant, tool"),
        ("dapo", {"prompt": [{"role": "user", "content": "\0"}]}, "'prompt of the user' holds NUL"),
        ("messages", {"messages": ["1+1"]}, "a message of 'messages' must be {role, content}"),
    ],
)
def test_a_row_that_is_no_problem_is_named_by_line(tmp_path, name, changes, message):
    with pytest.raises(ConfigError, match=rf"(?s)has 1 malformed row.*line 2: .*{message}"):
        read(tmp_path, PUBLIC[name], {**PUBLIC[name], **changes}, format=name)
