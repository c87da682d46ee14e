"""References that no judge can read: an error when the rows are read, by line, or dropped if asked for; never a wrong answer."""

import json

import pytest
from rlvr_trainer import loop
from rlvr_trainer.config import TaskConfig
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.tasks import make_task

GOOD = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(6)]
BAD = [{"prompt": "half", "answer": "\\frac{"}, {"prompt": "root", "answer": ["2", "\\sqrt{"]}]


def config(tmp_path, rows, **changes):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TaskConfig(name=str(tmp_path / "rows.jsonl"), held_out=2, **changes)


def test_every_reference_that_cannot_be_read_is_listed_by_line(tmp_path):
    with pytest.raises(
        ConfigError, match=r"the answers of 2 rows cannot be read; task\.on_bad_reference=drop"
    ) as error:
        make_task(config(tmp_path, [GOOD[0], BAD[0], *GOOD[1:], BAD[1]]))
    assert r"rows.jsonl, line 2: '\\frac{': math-verify cannot read it" in str(error.value)
    assert r"rows.jsonl, line 8: '\\sqrt{': " in str(error.value)


def test_they_are_dropped_if_asked_for_and_that_is_said(tmp_path):
    task = make_task(config(tmp_path, [GOOD[0], BAD[0], *GOOD[1:], BAD[1]], on_bad_reference="drop"))
    prompts = {problem.prompt for problem in (*task.problems(0, 20)[0], *task.held_out)}
    assert prompts == {row["prompt"] for row in GOOD}
    assert task.notices[0].startswith("dropped: ")
    task.close()


def test_a_separate_evaluation_file_is_read_as_strictly(tmp_path):
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, [GOOD[0], BAD[0]])))
    with pytest.raises(ConfigError, match=r"held\.jsonl, line 2"):
        make_task(config(tmp_path, GOOD[1:], evaluation=str(tmp_path / "held.jsonl")))


def test_it_is_said_before_a_model_is_loaded(small, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_policy", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, GOOD + BAD)))
    with pytest.raises(ConfigError, match="cannot be read"):
        loop.train(small(f"task.name={tmp_path / 'rows.jsonl'}", "task.parameters={}"), quiet=True)


def test_any_of_several_answers_is_right_and_an_odd_one_is_only_wrong(tmp_path):
    rows = [*GOOD, {"prompt": "a colour", "answer": ["red", "blue"]}]
    task = make_task(config(tmp_path, rows))
    problem = task.held_out[-1]
    texts = ["Blue", "<answer>red", "green", r"\boxed{9^{9^{9^", "(" * 3000, ""]
    assert [verdict.score for verdict in task.score([problem] * 6, texts)] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    task.close()
