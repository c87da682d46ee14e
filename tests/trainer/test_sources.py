"""Rows from every kind of source, as they are written there, and by the numbers that an editor shows."""

import gzip
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvr_trainer.config import TaskConfig
from rlvr_trainer.files import read_problems
from rlvr_trainer.json_rows import json_array, json_lines
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.sources import read_rows
from rlvr_trainer.tasks import make_task

ROWS = [{"prompt": f"{i}+{i}", "answer": str(2 * i)} for i in range(5)]


def problems(path):
    return read_problems(TaskConfig(name=str(path)))


def malformed(path, data):
    path.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        problems(path)
    return str(error.value)


def write_lines(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_array(path):
    path.write_text(json.dumps(ROWS, indent=1))


def write_gzip(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_parquet(path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)


def write_saved(path):
    pytest.importorskip("datasets").Dataset.from_list(ROWS).save_to_disk(str(path))


KINDS = {
    "rows.jsonl": write_lines,
    "rows.json": write_array,
    "lines.json": write_lines,
    "rows.jsonl.gz": write_gzip,
    "rows.parquet": write_parquet,
    "no_ending": write_lines,
    "saved": write_saved,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_problems_in_their_order(tmp_path, kind):
    KINDS[kind](tmp_path / kind)
    task = make_task(TaskConfig(name=str(tmp_path / kind), held_out=2))
    assert [(p.prompt, p.answer) for p in task.held_out] == [("3+3", "6"), ("4+4", "8")]
    assert {p.prompt for p in task.problems(0, 3)[0]} == {"0+0", "1+1", "2+2"}


def test_a_problem_knows_where_it_stands(tmp_path):
    for kind in ("rows.jsonl", "rows.json", "rows.parquet"):
        KINDS[kind](tmp_path / kind)
    assert problems(tmp_path / "rows.jsonl")[1].where == "rows.jsonl, line 2"
    assert problems(tmp_path / "rows.json")[1].where == "rows.json, row 2 on line 6"
    assert problems(tmp_path / "rows.parquet")[1].where == "rows.parquet, row 2"


def test_a_saved_set_of_splits_is_asked_for_one(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert len(read_rows(str(tmp_path / "saved"))) == 5
    assert len(read_rows(str(tmp_path / "saved"), split="test")) == 1
    with pytest.raises(ConfigError, match=r"task\.name: .* has no split 'tset': did you mean 'test'\?"):
        read_rows(str(tmp_path / "saved"), split="tset")


def test_a_folder_of_files_is_read_by_datasets(tmp_path):
    pytest.importorskip("datasets")
    write_parquet(tmp_path / "train-00000.parquet")
    assert [p.prompt for p in problems(tmp_path)] == [row["prompt"] for row in ROWS]


def test_a_name_goes_to_datasets_with_split_and_subset(monkeypatch):
    seen = []

    class Fake:
        @staticmethod
        def load_dataset(*given, **named):
            seen.append((given, named))
            return ROWS

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    config = TaskConfig(name="someone/rows", subset="main", evaluation="someone/rows", held_out=1)
    task = make_task(config)
    assert seen == [(("someone/rows", "main"), {"split": "train"}), (("someone/rows", "main"), {"split": "test"})]
    assert [p.prompt for p in task.held_out] == ["0+0"]


def test_what_datasets_cannot_find_is_named(monkeypatch):
    class Fake:
        @staticmethod
        def load_dataset(*_, **__):
            raise FileNotFoundError("no network")

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    with pytest.raises(
        ConfigError, match=r"task\.name: datasets cannot load 'some/where' \(split 'train'\): no network"
    ):
        make_task(TaskConfig(name="some/where"))


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "rows.parquet"), ("datasets", "some/where")])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package, name):
    path = tmp_path / name
    if package == "pyarrow":
        write_parquet(path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"needs the package {package}: pip install {package}"):
        read_rows(str(path) if package == "pyarrow" else name)


def test_damaged_files_are_named(tmp_path):
    whole = gzip.compress(b'{"prompt": "1+1", "answer": "2"}\n' * 50)
    for name, data, said in [
        ("cut.jsonl.gz", whole[:-12], "is damaged"),
        ("bad.jsonl.gz", whole[:12] + b"\xff" * 20 + whole[32:], "is damaged"),
        ("bad.parquet", b"PAR1 and nothing else", "cannot be read as Parquet"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=rf"{name} {said}"):
            read_rows(str(tmp_path / name))


def test_a_byte_order_mark_and_carriage_returns_are_no_data(tmp_path):
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in ROWS) + b"\r\n")
    array.write_bytes(b"\xef\xbb\xbf \r\n" + json.dumps(ROWS).encode())
    assert problems(lines) == problems(array)
    assert [p.prompt for p in problems(lines)] == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c", "é"])
def test_a_line_ends_at_its_newline_alone(tmp_path, character):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"a{character}b", "answer": "1"}, {"prompt": "c"}]
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=character < " ") for row in rows).encode())
    with pytest.raises(ConfigError, match="line 2: no 'answer'"):
        problems(path)
    rows[1]["answer"] = "2"
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=character < " ") for row in rows).encode())
    assert [p.prompt for p in problems(path)] == [f"a{character}b", "c"]


texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))


@given(st.lists(st.dictionaries(texts, texts | st.none() | st.booleans(), max_size=3), max_size=4), st.booleans())
def test_lines_and_array_hold_the_rows_that_were_written(rows, escaped):
    lines = "\n\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows).encode()
    array = json.dumps(rows, ensure_ascii=escaped, indent=2).encode()
    assert [row.value for row in json_lines(lines)] == rows == [row.value for row in json_array(array)]
    assert [row.where for row in json_lines(lines)] == [f"line {2 * i + 1}" for i in range(len(rows))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a", "answer": NaN}', "NaN is no JSON"),
        (b'{"prompt": "a", "answer": "1", "more": [-Infinity]}', "-Infinity is no JSON"),
        (b'{"prompt": "a", "answer": 1, "answer": 2}', "the key 'answer' comes twice"),
        (b'{"prompt": "a\\ud800", "answer": 1}', "'prompt' holds a lone surrogate, \\ud800, at character 2"),
        (b'{"prompt": "a\\u0000", "answer": 1}', "'prompt' holds NUL at character 2"),
        (b'{"prompt": "a\0", "answer": 1}', "Invalid control character at column 14"),
        (b"\0\0\0", "Expecting value at column 1"),
        (b'{"prompt": "\xff", "answer": 1}', "not UTF-8: invalid start byte"),
        (b'{"prompt": "\xed\xa0\x80", "answer": 1}', "not UTF-8: invalid continuation byte"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "answer": 1} trailing', "Extra data at column 30"),
        (b'"text"', "an object is wanted, got str"),
    ],
)
def test_a_line_that_is_no_row_is_named_by_its_number_in_the_file(tmp_path, line, said):
    good = json.dumps(ROWS[0]).encode()
    text = malformed(tmp_path / "rows.jsonl", b"\n".join([b"\xef\xbb\xbf" + good, b" \r", line, good]))
    assert "has 1 malformed row," in text
    assert f"\n  line 3: {said}" in text


@pytest.mark.parametrize(
    ("array", "said"),
    [
        ('[{"prompt": "a", "answer": 1},\n\n {"prompt": "a", "answer": NaN}]', "row 2 on line 3: NaN is no JSON"),
        ('[{"prompt": "a", "answer": 1}\n {"prompt": "a"}]', "behind row 1 on line 1: a comma or the array's end"),
        ('[{"prompt": "a", "answer": 1}', "behind row 1 on line 1: a comma or the array's end"),
        ('[{"prompt": "a", "answer": 1}] x', "behind row 1: the array has ended and something follows"),
        ('[{"prompt": "a", "answer": 1},\n]', "row 2 on line 2: Expecting value"),
        ('[{"prompt": "a", "answer": 1},\n 3]', "row 2 on line 2: an object is wanted, got str"),
        ('[{"prompt": "a", "answer": 1},\n "\udcff"]', "line 2: not UTF-8"),
    ],
)
def test_an_element_that_is_no_row_is_named_by_number_and_line(tmp_path, array, said):
    assert f"\n  {said}" in malformed(tmp_path / "rows.json", array.encode("utf-8", "surrogateescape"))


def test_the_first_ten_bad_lines_are_listed_and_the_rest_counted(tmp_path):
    text = malformed(tmp_path / "rows.jsonl", b'{"prompt": "a", "answer": 1}\n' + b"{\n" * 13)
    assert "has 13 malformed rows" in text
    assert "line 11:" in text
    assert "line 12:" not in text
    assert text.endswith("and 3 more")


def test_parquet_keeps_nested_columns_and_refuses_values_that_are_no_text(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good = {"prompt": [{"role": "user", "content": "1+1"}], "reward_model": {"ground_truth": ["2", "two"]}}
    parquet.write_table(arrow.Table.from_pylist([good]), tmp_path / "rows.parquet")
    assert [(p.prompt, p.answers) for p in problems(tmp_path / "rows.parquet")] == [("1+1", ("2", "two"))]
    rows = [{"prompt": "a", "answer": b"2"}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="row 1: 'answer' must be text that is not empty, got b'2'"):
        problems(tmp_path / "rows.parquet")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_of_parquet_that_is_not_finite_is_refused(tmp_path, value):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": "a", "answer": 0.5}, {"prompt": "b", "answer": value}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"row 2: 'answer' must be a finite number, got (nan|inf)"):
        problems(tmp_path / "rows.parquet")


def test_a_missing_evaluation_file_is_named_by_its_own_setting(tmp_path):
    write_lines(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match=r"task\.evaluation: no file 'nowhere\.jsonl'"):
        make_task(TaskConfig(name=str(tmp_path / "rows.jsonl"), evaluation="nowhere.jsonl"))


def test_an_evaluation_file_without_rows_is_refused(tmp_path):
    write_lines(tmp_path / "rows.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"task\.evaluation: .*empty\.jsonl holds no problem"):
        make_task(TaskConfig(name=str(tmp_path / "rows.jsonl"), evaluation=str(tmp_path / "empty.jsonl")))
