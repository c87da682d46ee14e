"""The configurations of `examples/`: their rows are what the script writes, and they run."""

import runpy
from pathlib import Path

import pytest
from rlvr_trainer.config import load
from rlvr_trainer.console import read_jsonl
from rlvr_trainer.formats import FORMATS
from rlvr_trainer.loop import train
from rlvr_trainer.sources import read_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))
SHORT = ["policy.warm_start_steps=2", "run.steps=1", "rollout.prompts=2", "evaluation.samples=1"]


def test_the_rows_are_those_that_the_script_writes(tmp_path):
    runpy.run_path(str(EXAMPLES / "data" / "make_rows.py"))["write"](tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in (EXAMPLES / "data").glob("*.jsonl")}


def test_no_row_of_the_evaluation_file_is_in_the_training_file():
    training, evaluation = (read_rows(str(EXAMPLES / "data" / name)) for name in ("dapo.jsonl", "dapo_test.jsonl"))
    assert (len(training), len(evaluation)) == (60, 16)
    asked = [row.value["prompt"][0]["content"] for row in [*training, *evaluation]]
    assert len(set(asked)) == 76


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_example_is_of_the_shape_it_names_and_trains(path, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    config = load(path, [*SHORT, f"run.out={tmp_path / 'run'}"])
    first = read_rows(config.task.name)[0].value
    assert [name for name, form in FORMATS.items() if form.fits(first)] == [path.stem] == [config.task.format]
    summary = train(config, quiet=True)
    assert summary["task"] == config.task.name
    assert len(read_jsonl(tmp_path / "run" / "evaluations.jsonl")) == 2
