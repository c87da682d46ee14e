"""Problems: reproducible, never held out and trained on at once, and refused early when malformed."""

import json
from dataclasses import replace

import pytest
from rlvr_trainer.config import TaskConfig
from rlvr_trainer.files import FileTask, read_problems
from rlvr_trainer.gym import ReasoningGymTask
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.tasks import make_task

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def sums(**changes):
    return ReasoningGymTask(TaskConfig(**{"parameters": ONE_DIGIT, "held_out": 32, **changes}))


def write_lines(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return TaskConfig(name=str(path), held_out=2)


def test_no_held_out_prompt_is_ever_trained_on():
    task = sums()
    held_out = {problem.prompt for problem in task.held_out}
    assert len(held_out) == 32
    trained, _ = task.problems(0, 600)  # there are only 200 different ones
    assert held_out.isdisjoint(problem.prompt for problem in trained)


def test_held_out_problems_are_the_same_for_every_training_seed():
    config = TaskConfig(parameters=ONE_DIGIT, held_out=8)
    first, second = ReasoningGymTask(config, seed=0), ReasoningGymTask(config, seed=1)
    assert first.held_out == second.held_out
    assert first.problems(0, 8)[0] != second.problems(0, 8)[0]


def test_the_cursor_alone_says_which_problems_come_next():
    task = sums()
    first, cursor = task.problems(0, 300)  # crosses a chunk of seeds
    second, _ = task.problems(cursor, 5)
    assert sums().problems(0, 305)[0] == first + second
    assert task.problems(cursor, 5)[0] == second


def test_the_generator_itself_judges():
    task = sums(extract="last_number")
    problem, _ = task.problems(0, 1)
    answer = problem[0].answer
    texts = [answer, f"It is {answer}.", f"<answer> {answer} </answer> or 99", "no idea", ""]
    assert [verdict.score for verdict in task.score(problem * 5, texts)] == [1.0, 1.0, 1.0, 0.0, 0.0]
    task.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "chain_sun"}, r"unknown task\.name 'chain_sun': did you mean 'chain_sum'\?"),
        ({"parameters": {"min_term": 2}}, r"unknown key task\.parameters\.min_term.*did you mean 'min_terms'\?"),
        ({"parameters": {"min_terms": 3, "max_terms": 2}}, r"do not suit 'chain_sum': max_terms must be >= min_terms"),
        ({"parameters": {"seed": 3}}, r"unknown key task\.parameters\.seed"),
        ({"held_out": 201}, r"gave only 200 different problems"),
    ],
)
def test_a_wrong_generator_or_parameter_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        sums(**changes)


def test_holding_out_everything_is_refused():
    with pytest.raises(ConfigError, match="leaves nothing to train on"):
        sums(held_out=200).problems(0, 1)


def test_malformed_lines_are_all_reported_by_number(tmp_path):
    rows = [
        {"prompt": "1+1", "answer": "2"},
        "{not json",
        "",
        {"prompt": "1+2"},
        {"prompt": " ", "answer": "3"},
        ["1+3", "4"],
        {"prompt": "1+4", "answer": None},
    ]
    config = write_lines(tmp_path / "problems.jsonl", rows)
    with pytest.raises(ConfigError, match=r"5 malformed rows") as error:
        make_task(config)
    text = str(error.value)
    for expected in (
        "line 2: Expecting property name",
        "line 4: no 'answer', only 'prompt'",
        "line 5: 'prompt' must be text that is not empty",
        "line 6: an object is wanted, got list",
        "line 7: 'answer' must be text that is not empty, got null",
    ):
        assert expected in text
    assert "line 3" not in text


def test_a_file_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"no file 'nowhere\.jsonl'"):
        make_task(TaskConfig(name="nowhere.jsonl"))


def test_too_few_lines_to_hold_any_out_are_refused(tmp_path):
    config = write_lines(tmp_path / "few.jsonl", [{"prompt": "1+1", "answer": 2}] * 5)
    with pytest.raises(ConfigError, match=r"holds 1 different problems and task\.held_out = 2"):
        make_task(config)


def test_a_file_is_read_to_the_end_of_an_epoch_in_an_order_of_its_own(tmp_path):
    rows = [{"prompt": f"{i}+{i}", "answer": 2 * i} for i in range(10)]
    config = write_lines(tmp_path / "problems.jsonl", rows)
    task = FileTask(config, seed=3)
    assert [p.prompt for p in task.held_out] == ["8+8", "9+9"]
    first, cursor = task.problems(0, 8)
    second, _ = task.problems(cursor, 8)
    assert sorted(p.prompt for p in first) == sorted(p.prompt for p in second) == [f"{i}+{i}" for i in range(8)]
    assert first != second
    assert FileTask(config, seed=3).problems(4, 8)[0] == first[4:] + second[:4]


def test_an_instruction_follows_every_prompt(tmp_path):
    config = write_lines(tmp_path / "problems.jsonl", [{"prompt": "1+1", "answer": "2"}])
    assert read_problems(replace(config, instruction=" Think."))[0].prompt == "1+1 Think."


def test_a_file_that_is_not_utf8_is_named_with_the_line(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_bytes(b'{"prompt": "1+1", "answer": "2"}\n{"prompt": "\xff", "answer": "2"}\n')
    with pytest.raises(
        ConfigError, match=r"problems.jsonl has 1 malformed row, .*\n  line 2: not UTF-8: invalid start byte"
    ):
        read_problems(TaskConfig(name=str(file)))


def write_evaluation(tmp_path, **changes):
    training = write_lines(tmp_path / "train.jsonl", [{"prompt": f"{i}", "answer": "1"} for i in range(10)])
    write_lines(tmp_path / "test.jsonl", [{"question": f"{i}", "answer": "#### 1"} for i in range(8, 14)])
    return replace(training, evaluation=str(tmp_path / "test.jsonl"), **changes)


def test_a_separate_evaluation_file_is_held_out_and_nothing_of_the_training_file(tmp_path):
    task = make_task(write_evaluation(tmp_path, held_out=4))
    assert [(p.prompt, p.where) for p in task.held_out] == [(str(7 + i), f"test.jsonl, line {i}") for i in range(1, 5)]
    assert {p.prompt for p in task.problems(0, 16)[0]} == {str(i) for i in range(8)}  # 8 and 9 are in both


def test_an_evaluation_file_shorter_than_held_out_is_used_whole(tmp_path):
    assert len(make_task(write_evaluation(tmp_path, held_out=64)).held_out) == 6


def test_a_message_and_its_text_are_one_prompt(tmp_path):
    config = write_evaluation(tmp_path, held_out=64)
    rows = [{"messages": [{"role": "user", "content": f"{i}"}], "answer": "1"} for i in range(8)]
    write_lines(tmp_path / "test.jsonl", rows)
    assert {p.prompt for p in make_task(config).problems(0, 10)[0]} == {"8", "9"}


def test_a_generator_with_an_evaluation_file_is_refused():
    with pytest.raises(ConfigError, match=r"task\.evaluation is for rows, and task\.name 'chain_sum' is a generator"):
        make_task(TaskConfig(evaluation="test.jsonl"))


def test_the_fingerprint_of_a_file_changes_with_all_that_decides_which_problems_come(tmp_path):
    config = write_evaluation(tmp_path, held_out=4)
    base = make_task(config).fingerprint()
    assert make_task(config).fingerprint() == base
    found = [
        make_task(config, seed=1).fingerprint(),
        make_task(replace(config, held_out=3)).fingerprint(),
        make_task(replace(config, evaluation="")).fingerprint(),
        make_task(replace(config, instruction=" ?")).fingerprint(),
        make_task(replace(config, evaluation=str(tmp_path / "train.jsonl"))).fingerprint(),
    ]
    write_lines(tmp_path / "test.jsonl", [{"question": f"{i}", "answer": "#### 2"} for i in range(8, 14)])
    found.append(make_task(config).fingerprint())
    assert len({base, *found}) == 7


def test_the_fingerprint_of_a_file_changes_with_format_and_columns(tmp_path):
    rows = [{"question": f"{i}", "answer": "so #### 1", "problem": f"p{i}"} for i in range(6)]
    config = replace(write_lines(tmp_path / "rows.jsonl", rows), format="gsm8k")
    others = [replace(config, format="open_r1"), replace(config, columns={"prompt": "problem"})]
    assert len({make_task(c).fingerprint() for c in [config, *others]}) == 3


def test_the_fingerprint_of_a_generator_changes_with_all_that_decides_which_problems_come():
    changes = [{}, {"held_out": 31}, {"instruction": "?"}, {"parameters": {**ONE_DIGIT, "max_terms": 3}}]
    assert len({sums(**change).fingerprint() for change in changes}) == 4
    assert sums().fingerprint() == sums().fingerprint()
    assert ReasoningGymTask(sums().config, seed=1).fingerprint() != sums().fingerprint()


def test_a_generated_problem_knows_where_it_comes_from():
    task = sums()
    assert task.problems(5, 1)[0][0].where.startswith("chain_sum, problem ")
    assert task.held_out[0].where == "chain_sum, held-out problem 0"
