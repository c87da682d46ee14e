"""`rlvr-ops judge`: one pair, a file of pairs, and what is wrong with either."""

import json

import pytest
from rlvr_trainer.cli import main


def test_one_pair_is_explained(capsys):
    assert main(["judge", "--answer", r"\$18.90", "--completion", "so it costs $18.90."]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "score": 1.0,
        "reason": "right",
        "read_reference": "$18.90",
        "read_answer": "$18.90",
    }


def test_any_of_several_answers_is_right(capsys):
    assert main(["judge", "--answer", "7", "--answer", "8", "--completion", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["read_reference"] == "8"


def test_a_reference_that_cannot_be_read_is_exit_code_1(capsys):
    assert main(["judge", "--answer", " ", "--completion", "8"]) == 1
    assert json.loads(capsys.readouterr().out)["reason"] == "bad reference"


def test_every_row_of_a_file_gets_score_and_reason(tmp_path, capsys):
    rows = [
        '\ufeff{"answer": "7", "completion": "it is 5 or 6 or 7", "id": 3}',
        "",
        '{"answer": 1e16, "completion": "10000000000000000"}',
    ]
    rows += [
        '{"answer": ["a", "b"], "completion": "<answer>b</answer>"}',
        '{"answer": 0.00001, "completion": "0.00001\\u2028"}',
    ]
    (tmp_path / "pairs.jsonl").write_text("\r\n".join(rows), encoding="utf-8")
    assert main(["judge", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "judged.jsonl")]) == 0
    judged = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().split("\n")[:-1]]
    assert [row["score"] for row in judged] == [0.0, 1.0, 1.0, 1.0]
    assert judged[0]["id"] == 3
    assert judged[0]["reason"] == "wrong"
    assert capsys.readouterr().err == "3 right, 1 wrong\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{", "line 1 is no row with answer and completion"),
        ('{"answer": "7"}', "line 1 is no row with answer and completion: 'completion'"),
        ('{"answer": [], "completion": "7"}', "answer must be text or a list of texts"),
        ('{"answer": true, "completion": "7"}', "answer must be text or a list of texts"),
        ('{"answer": "7", "completion": 7}', "completion must be text"),
        ("\n[1]", "line 2 is no row"),
        ('{"answer": NaN, "completion": "7"}', "line 1 is no row"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, capsys, rows, message):
    (tmp_path / "pairs.jsonl").write_text(rows)
    assert main(["judge", str(tmp_path / "pairs.jsonl")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["--answer", "7"], ["--completion", "7"], ["f", "--answer", "7", "--completion", "7"]]
)
def test_a_pair_or_a_file_is_wanted(arguments, capsys):
    assert main(["judge", *arguments]) == 2
    assert "either --answer and --completion, or a file of pairs" in capsys.readouterr().err


def test_a_file_is_not_overwritten_and_a_missing_one_is_named(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"answer": "7", "completion": "7"}')
    assert main(["judge", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "pairs.jsonl")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["judge", str(tmp_path / "nowhere.jsonl")]) == 2
    assert "no file" in capsys.readouterr().err
